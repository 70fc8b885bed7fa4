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

from opensora_dist.config.train import SpConfig
from opensora_dist.core.errors import ConfigError
from opensora_dist.parallel.sequence.base import Links
from opensora_dist.parallel.sequence.exchange import Exchange


class AxisName(StrEnum):
    """Axes of the device mesh, outermost first."""

    DP_REPLICATE = "dp_replicate"  # ranks that hold copies
    DP_SHARD = "dp_shard"  # ranks that hold shards of one copy, and see different samples
    RING = "ring"  # groups of ulysses ranks that share a sample
    ULYSSES = "ulysses"  # ranks that share a sample, next to each other


FSDP_AXIS = "fsdp"
"""dp_shard x ring x ulysses, flattened: all that hold shards of one copy."""


@dataclass(frozen=True, kw_only=True)
class Mesh:
    """Where this rank stands.

    Args:
        device_mesh: Axes as ``AxisName``.
        device: What this rank computes on.
        sp_size: Ranks that share a sample; consecutive ranks do.
        links: For each number of ranks that may share a sample, those that do with this one.
        control: gloo group of all ranks, for small CPU messages (stop flags, agreement on a save) beside the training traffic.
    """

    device_mesh: DeviceMesh
    device: torch.device
    rank: int
    world: int
    sp_size: int
    links: dict[int, Links]
    control: dist.ProcessGroup

    @property
    def data_rank(self) -> int:
        """Which of the groups that share a sample this rank is in."""
        return self.rank // self.sp_size

    @property
    def data_size(self) -> int:
        """Groups that share a sample."""
        return self.world // self.sp_size

    @property
    def is_main(self) -> bool:
        """Whether this rank writes what is written once."""
        return self.rank == 0

    def __str__(self) -> str:
        sizes = {name: self.device_mesh[name].size() for name in AxisName}
        axes = " x ".join(f"{name} {size}" for name, size in sizes.items() if size > 1 or name == AxisName.DP_SHARD)
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


def build_mesh(device: torch.device, *, dp_replicate: int, sp: SpConfig, timeout_s: float) -> Mesh:
    """The mesh of the initialised process group. Collective.

    Args:
        dp_replicate: Groups of ranks holding copies; dp_replicate x sp.degree divides the world (checked with the config).
        sp: Who shares a sample.
    """
    world, rank = dist.get_world_size(), dist.get_rank()
    ulysses = sp_ulysses(sp)
    assert world % (dp_replicate * sp.degree) == 0 and sp.degree % ulysses == 0, (world, dp_replicate, sp)
    shape = (dp_replicate, world // (dp_replicate * sp.degree), sp.degree // ulysses, ulysses)
    device_mesh = init_device_mesh(device.type, shape, mesh_dim_names=tuple(str(a) for a in AxisName))
    device_mesh[AxisName.DP_SHARD, AxisName.RING, AxisName.ULYSSES]._flatten(FSDP_AXIS)
    timeout = timedelta(seconds=timeout_s)
    control = dist.new_group(backend="gloo", timeout=timeout)
    links = {}
    for degree in range(1, sp.degree + 1):
        if sp.degree % degree == 0:
            inner = ulysses if degree == sp.degree else degree
            links[degree] = Links(
                sp=_exchange(world, block=degree, stride=1, timeout=timeout),
                ring=_exchange(world, block=degree, stride=inner, timeout=timeout),
                ulysses=_exchange(world, block=inner, stride=1, timeout=timeout),
            )
    return Mesh(device_mesh=device_mesh, device=device, rank=rank, world=world, sp_size=sp.degree, links=links, control=control)


def sp_ulysses(sp: SpConfig) -> int:
    """Size of the axis ``ulysses``, where the config may leave it open."""
    return sp.ulysses or (1 if sp.scheme == "ring" else sp.degree)


def _exchange(world: int, *, block: int, stride: int, timeout: timedelta) -> Exchange:
    """The group of this rank among groups of ranks ``stride`` apart, within blocks of ``block``. Collective: all make all groups."""
    mine = None
    for start in range(0, world, block):
        for first in range(start, start + stride):
            ranks = list(range(first, start + block, stride))
            group = dist.new_group(ranks, timeout=timeout)
            mine = group if dist.get_rank() in ranks else mine
    assert mine is not None
    return Exchange(mine)
