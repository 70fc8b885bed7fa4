"""Linears whose parameters are DTensors over the ranks of ``tp``, used as this rank's part of them.

A column-wise linear gives each rank some outputs, a row-wise one takes some inputs from each. ``weight`` and ``bias`` read as this
rank's part, so that whatever works with a linear's parameters (a sequence scheme does) works with the part; ``named_parameters`` and
FSDP2 see the DTensors, and ``in_features`` and ``out_features`` are those of the whole.

Where one linear holds several things side by side (queries, keys and values), each rank needs its heads of every one. Rows are then
held rank by rank, so that plain ``Shard(0)`` gives each rank its own; a checkpoint has them in the linear's own order
(``rows_by_rank``, ``rows_in_order``).
"""

# P parts side by side, R ranks, D width

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor


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


class ColumnLinear(nn.Linear):
    """This rank's outputs of a linear."""

    def __init__(self, whole: nn.Linear, tp: DeviceMesh, *, parts: int) -> None:
        _take(self, whole)
        self.parts = parts
        for name in ("weight", "bias"):
            self._parameters[name] = _shard(whole.get_parameter(name), tp, dim=0)

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """[out / ranks, in]."""
        return _local(self._parameters["weight"])

    @property
    def bias(self) -> Tensor:  # type: ignore[override]
        """[out / ranks]."""
        return _local(self._parameters["bias"])


class RowLinear(nn.Linear):
    """What this rank's inputs give to a linear's outputs, without the bias."""

    def __init__(self, whole: nn.Linear, tp: DeviceMesh) -> None:
        _take(self, whole)
        self._parameters["weight"] = _shard(whole.weight, tp, dim=1)
        self._parameters["bias"] = nn.Parameter(whole.get_parameter("bias").detach())

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """[out, in / ranks]."""
        return _local(self._parameters["weight"])

    @property
    def bias(self) -> None:  # type: ignore[override]
        """None here: a bias on every rank would be summed, too."""
        return None

    @property
    def summed_bias(self) -> Tensor:
        """[out], for after the sum; the same on every rank."""
        return _local(self._parameters["bias"])


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
    if not isinstance(parameter, DTensor) or "tp" not in (parameter.device_mesh.mesh_dim_names or ()):
        return 1
    return parameter.device_mesh["tp"].size()


@torch.no_grad()
def copy_whole(target: Tensor, whole: Tensor, *, parts: int) -> None:
    """Gives a parameter, sharded in any way, its rows of a whole one. Not collective: every rank has it.

    Args:
        parts: As ``packed_parts`` has it; 1 for other parameters.
    """
    if not isinstance(target, DTensor):
        target.copy_(whole)
        return
    if parts > 1:
        whole = rows_by_rank(whole, parts=parts, ranks=tp_size(target))
    # src_data_rank=None: every rank holds the whole tensor already, so sharding it needs no communication.
    shard = distribute_tensor(whole, target.device_mesh, target.placements, src_data_rank=None)
    target.to_local().copy_(shard.to_local())


def _take(linear: nn.Linear, whole: nn.Linear) -> None:
    """What ``nn.Linear.__init__`` does, but for parameters of its own."""
    nn.Module.__init__(linear)
    linear.in_features, linear.out_features = whole.in_features, whole.out_features


def _shard(parameter: Tensor, tp: DeviceMesh, *, dim: int) -> nn.Parameter:
    return nn.Parameter(distribute_tensor(parameter.detach(), tp, [Shard(dim)], src_data_rank=None))


def _local(parameter: Tensor | None) -> Tensor:
    """This rank's part; its gradient comes back as that of the DTensor."""
    assert parameter is not None
    return cast(DTensor, parameter).to_local() if isinstance(parameter, DTensor) else parameter
