"""Which linears of a block ranks of ``tp`` share: attention by heads, the MLP by hidden units. The rest is whole on each of them."""

from __future__ import annotations

from torch import nn

from opensora_dist.models.base import VideoTransformer
from opensora_dist.models.layers import Block, CrossAttention, Mlp, SelfAttention
from opensora_dist.parallel.mesh import Mesh
from opensora_dist.parallel.sequence.exchange import Exchange
from opensora_dist.parallel.tensor.group import TensorGroup
from opensora_dist.parallel.tensor.linear import Columns, Plan, Rows, share_linears

PLANS: dict[type[nn.Module], Plan] = {
    SelfAttention: {"qkv": Columns(parts=3), "proj": Rows()},
    CrossAttention: {"q_linear": Columns(), "kv_linear": Columns(parts=2), "proj": Rows()},
    Mlp: {"fc1": Columns(), "fc2": Rows()},
}
"""Every model's blocks are made of these."""


def share_blocks(model: VideoTransformer, mesh: Mesh) -> None:
    """Leaves this rank its part of every block, in place; nothing is done where ``mesh`` has no tensor parallelism.

    Args:
        model: On the meta device.
    """
    if mesh.tp_size == 1:
        return
    group = TensorGroup(Exchange(mesh.tp.get_group()))
    model.tensor = group
    for block in model.blocks:
        assert isinstance(block, Block)
        block.tensor = group
        for module in list(block.modules()):
            plan = PLANS.get(type(module))
            if plan is None:
                continue
            share_linears(module, plan, mesh.tp)
            if isinstance(module, SelfAttention | CrossAttention):
                module.heads //= mesh.tp_size
