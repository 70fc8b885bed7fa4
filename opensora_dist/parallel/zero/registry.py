"""The ZeRO backends by name."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import nn

from opensora_dist.config.train import OptimConfig, ParallelConfig
from opensora_dist.parallel.mesh import Mesh
from opensora_dist.parallel.zero.base import ZeroBackend
from opensora_dist.parallel.zero.native import NativeBackend


def build_backend(
    model: nn.Module,
    *,
    mesh: Mesh,
    units: Sequence[nn.Module],
    init: Callable[[nn.Module], None],
    parallel: ParallelConfig,
    optim: OptimConfig,
    compute_dtype: torch.dtype,
) -> ZeroBackend:
    """What ``parallel.zero`` asks for, around a model on the meta device. Collective. Arguments as ``NativeBackend`` has them."""
    return _class(parallel.zero.backend)(
        model, mesh=mesh, units=units, init=init, parallel=parallel, optim=optim, compute_dtype=compute_dtype
    )


def _class(name: str) -> Callable[..., ZeroBackend]:
    """Imported on use: two of them come with packages that not everyone has."""
    if name == "deepspeed":
        from opensora_dist.parallel.zero.deepspeed import DeepSpeedBackend

        return DeepSpeedBackend
    if name == "colossalai":
        from opensora_dist.parallel.zero.colossalai import ColossalaiBackend

        return ColossalaiBackend
    return NativeBackend
