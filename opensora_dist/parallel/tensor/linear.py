"""Linears whose parameters are DTensors over the ranks of ``tp``, used as this rank's part of them.

A column-wise linear gives each rank some outputs, a row-wise one takes some inputs from each. ``in_features`` and ``out_features``
are those of the whole. A sequence scheme, which works with the parameters of an attention, is given this rank's part (``part_of``).

Where one linear holds several things side by side (queries, keys and values), each rank needs its heads of every one. Rows are then
held rank by rank, so that plain ``Shard(0)`` gives each rank its own; a checkpoint has them in the linear's own order
(``rows_by_rank``, ``rows_in_order``).
"""

# P parts side by side, R ranks, D width

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from opensora_dist.parallel.places import AxisName
from opensora_dist.parallel.sequence.base import Projections


@dataclass(frozen=True)
class Columns:
    """Outputs are dealt out.

    Args:
        parts: Things of equal size that the outputs hold side by side; each is dealt out by itself.
    """

    parts: int = 1


@dataclass(frozen=True)
class Rows:
    """Inputs are dealt out; outputs are summed over ranks, and then the bias is added."""


Plan = Mapping[str, Columns | Rows]
"""How the linears of a module are shared, by name."""


@dataclass(frozen=True, kw_only=True)
class ColumnPart:
    """This rank's outputs of a linear. Gradients of its parameters come back as those of the DTensors."""

    weight: Tensor
    bias: Tensor

    def __call__(self, x: Tensor) -> Tensor:
        """[..., in] to [..., out / ranks]."""
        return F.linear(x, self.weight, self.bias)


@dataclass(frozen=True, kw_only=True)
class RowPart:
    """What this rank's inputs contribute to the outputs of a linear. No bias: one on every rank would be summed, too."""

    weight: Tensor
    bias: None = None

    def __call__(self, x: Tensor) -> Tensor:
        """[..., in / ranks] to [..., out]."""
        return F.linear(x, self.weight)


class ColumnLinear(nn.Linear):
    """A linear whose outputs are dealt out: gives this rank's."""

    def __init__(self, whole: nn.Linear, tp: DeviceMesh, *, parts: int) -> None:
        _start(self, whole)
        self.parts = parts
        self.weight = _shard(whole.weight, tp, dim=0)
        self.bias = _shard(whole.bias, tp, dim=0)

    @property
    def part(self) -> ColumnPart:
        """Of this rank, while the parameters are gathered."""
        return ColumnPart(weight=_local(self.weight), bias=_local(self.bias))

    def forward(self, input: Tensor) -> Tensor:
        return self.part(input)


class RowLinear(nn.Linear):
    """A linear whose inputs are dealt out: gives what this rank's contribute, without the bias."""

    def __init__(self, whole: nn.Linear, tp: DeviceMesh) -> None:
        _start(self, whole)
        self.weight = _shard(whole.weight, tp, dim=1)
        self.bias = nn.Parameter(whole.bias.detach())

    @property
    def part(self) -> RowPart:
        """Of this rank, while the parameters are gathered."""
        return RowPart(weight=_local(self.weight))

    @property
    def summed_bias(self) -> Tensor:
        """For after the sum; the same on every rank."""
        return self.bias

    def forward(self, input: Tensor) -> Tensor:
        return self.part(input)


@dataclass(frozen=True, kw_only=True)
class PartProjections:
    """One rank's heads of a self-attention: ``Projections`` for a sequence scheme."""

    heads: int
    head_dim: int
    qkv: ColumnPart
    proj: RowPart


def part_of(attn: Projections) -> Projections:
    """What a scheme is to work with: this rank's part of shared linears, or the linears as they are."""
    if isinstance(attn.qkv, ColumnLinear) and isinstance(attn.proj, RowLinear):
        return PartProjections(heads=attn.heads, head_dim=attn.head_dim, qkv=attn.qkv.part, proj=attn.proj.part)
    return attn


def weight_and_bias(linear: nn.Linear) -> tuple[Tensor, Tensor]:
    """Of a linear that is whole, or column-wise: those of the outputs that this rank computes."""
    here = linear.part if isinstance(linear, ColumnLinear) else linear
    return here.weight, here.bias


def share_linears(module: nn.Module, plan: Plan, tp: DeviceMesh) -> None:
    """Puts this rank's part of each linear that ``plan`` names in its place. Parameters keep their names.

    Args:
        module: On the meta device.
        tp: Its size divides what is dealt out (``config.rules`` has seen to it).
    """
    for name, how in plan.items():
        whole = getattr(module, name)
        assert isinstance(whole, nn.Linear) and whole.weight.is_meta, name
        dealt = whole.in_features if isinstance(how, Rows) else whole.out_features // how.parts
        assert dealt % tp.size() == 0, (name, dealt, tp.size())
        setattr(module, name, RowLinear(whole, tp) if isinstance(how, Rows) else ColumnLinear(whole, tp, parts=how.parts))


def packed_parts(model: nn.Module) -> dict[str, int]:
    """Parameters whose rows are held rank by rank: by name, the parts they hold side by side."""
    return {
        f"{name}.{parameter}": module.parts
        for name, module in model.named_modules()
        if isinstance(module, ColumnLinear) and module.parts > 1
        for parameter in ("weight", "bias")
    }


def rows_by_rank(whole: Tensor, *, parts: int, ranks: int) -> Tensor:
    """[P R n, ...] in the linear's own order to that in which ranks hold rows, [R P n, ...]; a copy."""
    return whole.view(parts, ranks, -1, *whole.shape[1:]).transpose(0, 1).flatten(0, 2)


def rows_in_order(held: Tensor, *, parts: int, ranks: int) -> Tensor:
    """Back from ``rows_by_rank``."""
    return rows_by_rank(held, parts=ranks, ranks=parts)


def tp_size(parameter: Tensor) -> int:
    """Ranks that share a parameter by tensor parallelism; 1 for one that is whole on each of them."""
    if not isinstance(parameter, DTensor) or AxisName.TP not in (parameter.device_mesh.mesh_dim_names or ()):
        return 1
    return parameter.device_mesh[AxisName.TP].size()


@torch.no_grad()
def copy_whole(target: Tensor, whole: Tensor, *, parts: int) -> None:
    """Gives a parameter, sharded in any way, its rows of a whole one. Not collective: every rank has it.

    Args:
        parts: As ``packed_parts`` has it; 1 for other parameters.
    """
    assert not target.is_meta, "to_empty must come before values"
    if not isinstance(target, DTensor):
        target.copy_(whole)
        return
    if parts > 1:
        whole = rows_by_rank(whole, parts=parts, ranks=tp_size(target))
    # src_data_rank=None: every rank holds the whole tensor already, so sharding it needs no communication.
    shard = distribute_tensor(whole, target.device_mesh, target.placements, src_data_rank=None)
    target.to_local().copy_(shard.to_local())


def _start(linear: nn.Linear, whole: nn.Linear) -> None:
    """What ``nn.Linear.__init__`` does, but for parameters of its own."""
    nn.Module.__init__(linear)
    linear.in_features, linear.out_features = whole.in_features, whole.out_features


def _shard(parameter: Tensor, tp: DeviceMesh, *, dim: int) -> nn.Parameter:
    return nn.Parameter(distribute_tensor(parameter.detach(), tp, [Shard(dim)], src_data_rank=None))


def _local(parameter: Tensor) -> Tensor:
    assert isinstance(parameter, DTensor)
    return parameter.to_local()
