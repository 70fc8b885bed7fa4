"""Ranks and how they are laid out: one process group, one mesh, named axes."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from enum import StrEnum

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from opensora_dist.core.errors import ConfigError


class AxisName(StrEnum):
    """Axes of the device mesh, outermost first."""

    DP_REPLICATE = "dp_replicate"  # ranks that hold copies
    DP_SHARD = "dp_shard"  # ranks that hold shards of one copy


@dataclass(frozen=True, kw_only=True)
class Mesh:
    """Where this rank stands.

    Args:
        device_mesh: Axes as ``AxisName``.
        device: What this rank computes on.
        data_rank: Which slice of the global batch is this rank's.
        data_size: How many slices there are: ranks that see different samples.
        control: gloo group of all ranks, for small CPU messages (stop flags, agreement on a save) beside the training traffic.
    """

    device_mesh: DeviceMesh
    device: torch.device
    rank: int
    world: int
    data_rank: int
    data_size: int
    control: dist.ProcessGroup

    @property
    def is_main(self) -> bool:
        """Whether this rank writes what is written once."""
        return self.rank == 0

    def __str__(self) -> str:
        axes = " x ".join(f"{name} {self.device_mesh[name].size()}" for name in AxisName)
        return f"{self.world} rank{'s' if self.world > 1 else ''} on {self.device.type}: {axes}"


def launched_world() -> int | None:
    """Number of ranks a launcher (torchrun, Slurm's srun with torchrun, our own spawner) has set, or None."""
    return int(os.environ["WORLD_SIZE"]) if "RANK" in os.environ and "WORLD_SIZE" in os.environ else None


def resolve_device(name: str) -> torch.device:
    """``run.device`` to a torch device of this rank.

    Raises:
        ConfigError: CUDA was asked for and is not there.
    """
    if name == "cuda" and not torch.cuda.is_available():
        raise ConfigError("run.device=cuda, but torch sees no CUDA device here; use run.device=cpu or auto, or check the driver")
    if name == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))


def default_nproc(device: str) -> int:
    """Ranks per machine where the config names none: one per GPU, or one."""
    return torch.cuda.device_count() if resolve_device(device).type == "cuda" else 1


@contextmanager
def process_group(device: torch.device, *, timeout_s: float) -> Iterator[None]:
    """Joins the process group that the launcher's environment describes; a single process makes one of its own.

    A group of one keeps one code path: FSDP2, checkpoints and sums run the same way on a laptop and on a cluster.
    """
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    if device.type == "cuda":
        torch.cuda.set_device(device)
    timeout = timedelta(seconds=timeout_s)
    if launched_world() is None:
        store = dist.HashStore()  # type: ignore[attr-defined]  # not in torch's __all__
        dist.init_process_group(backend, store=store, rank=0, world_size=1, timeout=timeout)
    else:
        dist.init_process_group(backend, timeout=timeout)
    try:
        yield
    finally:
        dist.destroy_process_group()


def build_mesh(device: torch.device, *, dp_replicate: int, timeout_s: float) -> Mesh:
    """The mesh of the initialised process group.

    Args:
        dp_replicate: Groups of ranks holding copies; divides the world (checked with the config).
    """
    world, rank = dist.get_world_size(), dist.get_rank()
    assert world % dp_replicate == 0, (world, dp_replicate)
    shape = (dp_replicate, world // dp_replicate)
    device_mesh = init_device_mesh(device.type, shape, mesh_dim_names=tuple(str(a) for a in AxisName))
    control = dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout_s))
    return Mesh(device_mesh=device_mesh, device=device, rank=rank, world=world, data_rank=rank, data_size=world, control=control)
