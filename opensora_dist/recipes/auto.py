"""What ``parallel.sp.scheme=auto`` needs of a model, and of the machine."""

from __future__ import annotations

import torch

from opensora_dist.config.load import expand
from opensora_dist.config.train import TrainConfig
from opensora_dist.core.logging import get_logger
from opensora_dist.core.types import Thw
from opensora_dist.models.base import VideoTransformer
from opensora_dist.models.dit.model import DiTBlock
from opensora_dist.models.layers import Block, linear_flops
from opensora_dist.parallel.mesh import Mesh
from opensora_dist.parallel.sequence.auto import AutoChoice
from opensora_dist.parallel.sequence.network import Network, agree, measure_network, read_network
from opensora_dist.parallel.sequence.predict import SampleCost

_log = get_logger(__name__)


def sample_cost(model: VideoTransformer, grid: Thw, *, text_tokens: int) -> SampleCost:
    """FLOPs of one sample of a token grid, in the parts that a prediction asks for; all from the model's own counts."""
    block = model.blocks[0]
    assert isinstance(block, Block)
    text = linear_flops(block.cross_attn.kv_linear, tokens=text_tokens)
    replicated = linear_flops(model.t_embedder, tokens=1) + linear_flops(model.t_block, tokens=1)
    replicated += linear_flops(model.y_embedder, tokens=text_tokens) + len(model.blocks) * text
    whole = Thw(grid.t * model.patch.t, grid.h * model.patch.h, grid.w * model.patch.w)
    return SampleCost(
        width=block.scale_shift_table.shape[1],
        heads=block.attn.heads,
        joint=isinstance(block, DiTBlock),
        blocks=len(model.blocks),
        flops=model.flops(whole, text_tokens=text_tokens),
        replicated_flops=replicated,
        then_flops=block.flops(grid, text_tokens=text_tokens) - block.mix_flops(grid) - text,
    )


def auto_choice(config: TrainConfig, mesh: Mesh, model: VideoTransformer, *, text_tokens: int) -> AutoChoice:
    """The chooser of a run: the file that ``parallel.sp.network`` names, or a measurement of about a second. Collective.

    Args:
        model: Built, with or without values; its FLOPs are counted.
        text_tokens: Of a caption, padding included.
    """
    parallel = config.parallel
    dtype = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float64": torch.float64}[config.run.dtype]
    return AutoChoice(
        sp=parallel.sp,
        world=mesh.world,
        global_batch=config.data.global_batch,
        accum=parallel.grad_accum,
        recompute=parallel.recompute == "block",
        element_bytes=dtype.itemsize,
        cost=lambda grid: sample_cost(model, grid, text_tokens=text_tokens),
        network=_network(config, mesh, width=config.model.shape.width, dtype=dtype),
    )


def _network(config: TrainConfig, mesh: Mesh, *, width: int, dtype: torch.dtype) -> Network:
    sp = config.parallel.sp
    if sp.network is not None:
        # Read by every rank; where files differ between machines, all take the worst of their numbers.
        network = read_network(expand(sp.network))
    else:
        network = measure_network(mesh.links[sp.degree].sp, device=mesh.device, width=width, dtype=dtype)
    network = agree(network, group=mesh.control)
    _log.info(
        "network%s: %.3g GB/s to others and %.3g us a message per rank, %.3g TFLOP/s",
        "" if sp.network is None else f" of {sp.network}",
        network.bytes_per_s / 1e9,
        network.latency_s * 1e6,
        network.flops_per_s / 1e12,
    )
    return network
