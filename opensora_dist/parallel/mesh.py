"""Ranks and how they are laid out: one process group, one mesh, named axes.

Every group is made here, by ``dist.new_group`` with the run's own timeout: those that ``init_device_mesh`` makes keep torch's
default, half an hour on gloo. Traffic of schemes has groups of its own, apart from that of parameters: two kinds of messages in one
NCCL communicator would queue behind each other.
"""

from __future__ import annotations

import os
import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from opensora_dist.config.train import SpConfig
from opensora_dist.core.errors import DeviceError
from opensora_dist.parallel.places import AxisName, Places
from opensora_dist.parallel.sequence.base import Links
from opensora_dist.parallel.sequence.exchange import Exchange

_POLL_S = 0.02
FSDP_AXIS = "fsdp"
"""dp_shard x ring x ulysses, flattened: all that hold shards of one copy."""


@dataclass(frozen=True, kw_only=True)
class Mesh:
    """Where this rank stands.

    Args:
        places: The sizes of the axes.
        device_mesh: Axes as ``AxisName``.
        parameters: dp_replicate x fsdp (dp_shard x ring x ulysses, flattened) x tp: what parameters are laid out over.
        copy: fsdp x tp, flattened: the ranks that hold one copy of all parameters together.
        device: What this rank computes on.
        links: For each number of ranks of ``sp_degrees`` above 1, those that hold the other parts of this rank's samples.
        control: gloo group of all ranks, for small CPU messages (stop flags, agreement on a save) beside the training traffic.
        saving: gloo group of all ranks for the thread that writes checkpoints beside training.
        sp_control: The same for the ranks that share a sample, those that hold the same part of it included.
    """

    places: Places
    device_mesh: DeviceMesh
    parameters: DeviceMesh
    copy: DeviceMesh
    device: torch.device
    rank: int
    world: int
    links: dict[int, Links]
    control: dist.ProcessGroup
    saving: dist.ProcessGroup
    sp_control: dist.ProcessGroup

    @property
    def is_main(self) -> bool:
        """Whether this rank writes what is written once."""
        return self.rank == 0

    @property
    def sp_size(self) -> int:
        """Ranks that hold parts of one sample."""
        return self.places.ring * self.places.ulysses

    @property
    def tp_size(self) -> int:
        """Ranks that hold the same tokens, and share the linears; consecutive ranks do."""
        return self.places.tp

    @property
    def tp_rank(self) -> int:
        """Among the ranks that hold the same tokens. What is to count once, the first of them counts."""
        return self.rank % self.tp_size

    @property
    def token_rank(self) -> int:
        """Which tokens this rank holds: of the parts of all samples, in order; parts of one sample are next to each other."""
        return self.rank // self.tp_size

    @property
    def token_ranks(self) -> int:
        """How many ranks hold different tokens."""
        return self.world // self.tp_size

    @property
    def fsdp(self) -> DeviceMesh:
        """What parameters are sharded over: dp_shard x ring x ulysses, flattened."""
        return self.parameters[FSDP_AXIS]

    @property
    def hsdp(self) -> DeviceMesh | None:
        """dp_replicate x ``fsdp``, where there are replicas."""
        return self.parameters[AxisName.DP_REPLICATE, FSDP_AXIS] if self.places.dp_replicate > 1 else None

    @property
    def tp(self) -> DeviceMesh:
        """The ranks that share the linears."""
        return self.parameters[AxisName.TP]

    def table(self) -> str:
        """Who holds what, for people: ``Places.table``."""
        return self.places.table()

    def __str__(self) -> str:
        return f"{self.world} rank{'s' if self.world > 1 else ''} on {self.device.type}: {self.places}"


def launched_world() -> int | None:
    """Number of ranks a launcher (torchrun, Slurm's srun with torchrun, our own spawner) has set, or None."""
    return int(os.environ["WORLD_SIZE"]) if "RANK" in os.environ and "WORLD_SIZE" in os.environ else None


def resolve_device(name: str) -> torch.device:
    """``run.device`` to a torch device of this rank.

    Raises:
        DeviceError: CUDA was asked for and is not there.
    """
    if name == "cuda" and not torch.cuda.is_available():
        raise DeviceError("run.device=cuda, but torch sees no CUDA device here; use run.device=cpu or auto, or check the driver")
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
        met, rank, world = next(dist.rendezvous("env://", timeout=timeout))  # type: ignore[attr-defined]
        # torchrun keeps its store when it starts ranks again, with the addresses that the last ones left in it.
        name = name_of_start(met, rank=rank, world=world, timeout=timeout)
        fresh = dist.PrefixStore(name, met)  # type: ignore[attr-defined]
        dist.init_process_group(backend, store=fresh, rank=rank, world_size=world, timeout=timeout)
    done = False
    try:
        yield
        done = True
    finally:
        # After an error transfers may be in flight that no rank will answer, and closing NCCL's communicators waits for them, as long
        # as the timeout is, before the error is said. This process ends, and its sockets with it. A group of one waits for nobody.
        if done or dist.get_world_size() == 1:
            dist.destroy_process_group()


def name_of_start(
    store: dist.Store,  # type: ignore[name-defined]  # not in torch's __all__
    *,
    rank: int,
    world: int,
    timeout: timedelta,
) -> str:
    """A name that all ranks of one start share and no other start had. Collective.

    Nothing that torchrun tells its ranks is such a name: TORCHELASTIC_RESTART_COUNT counts the failures on one machine. So every rank
    says hello under a name of its own, and rank 0 answers each it hears with the name of the start, until every rank has said that it
    knows it. What an earlier start left in the store can't be taken for this: its rank 0, which alone answers, is gone before any rank
    of the next is started, and its ranks are before this rank 0 is.

    Raises:
        DistStoreError: A rank did not come in time, or the store can't be reached.
    """
    own = uuid.uuid4().hex
    if rank != 0:
        store.set(f"hello/{rank}", own)
        store.wait([f"start-of/{own}"], timeout)
        name: str = store.get(f"start-of/{own}").decode()
        store.set(f"{name}/knows/{rank}", "")
        return name
    missing, deadline = set(range(1, world)), time.monotonic() + timeout.total_seconds()
    while missing:
        for other in missing:
            if store.check([f"hello/{other}"]):
                store.set(f"start-of/{store.get(f'hello/{other}').decode()}", own)
        missing = {other for other in missing if not store.check([f"{own}/knows/{other}"])}
        if time.monotonic() > deadline:
            store.wait([f"{own}/knows/{other}" for other in sorted(missing)], timedelta(milliseconds=1))
        time.sleep(_POLL_S)
    return own


def places_of(*, world: int, dp_replicate: int, sp: SpConfig, tp: int) -> Places:
    """How ``world`` ranks are laid out; dp_replicate x sp.degree x tp divides them (``config.rules.mesh_problems``)."""
    ulysses = sp_ulysses(sp)
    assert world % (dp_replicate * sp.degree * tp) == 0 and sp.degree % ulysses == 0, (world, dp_replicate, sp, tp)
    dp_shard = world // (dp_replicate * sp.degree * tp)
    return Places(dp_replicate=dp_replicate, dp_shard=dp_shard, ring=sp.degree // ulysses, ulysses=ulysses, tp=tp)


def build_mesh(device: torch.device, *, dp_replicate: int, sp: SpConfig, tp: int = 1, timeout_s: float) -> Mesh:
    """The mesh of the initialised process group. Collective.

    Args:
        dp_replicate: Groups of ranks holding copies.
        sp: Who shares a sample.
        tp: Ranks that share the linears of a block.
    """
    world, rank, timeout = dist.get_world_size(), dist.get_rank(), timedelta(seconds=timeout_s)
    places = places_of(world=world, dp_replicate=dp_replicate, sp=sp, tp=tp)
    ranks = places.ranks
    axes = [_group(_lines(ranks, dim), timeout=timeout, name=str(axis)) for dim, axis in enumerate(AxisName)]
    device_mesh = DeviceMesh.from_group(axes, device.type, mesh=ranks, mesh_dim_names=tuple(str(axis) for axis in AxisName))
    replicate_group, _, ring, ulysses, tp_group = axes
    shards = ranks.flatten(1, 3)
    fsdp_group = _group(_lines(shards, 1), timeout=timeout, name=FSDP_AXIS)
    copy_group = fsdp_group if tp == 1 else _group(shards.flatten(1).tolist(), timeout=timeout, name="copy")
    links = {}
    for degree in (n for n in sp_degrees(sp) if n > 1):
        ring_group, ulysses_group = ring, ulysses
        blocks = torch.arange(world).view(-1, 1, degree, tp)
        if degree < sp.degree:  # a shape that auto spreads over fewer ranks: each such block is one group of ulysses
            ring_group, ulysses_group = (_group(_lines(blocks, dim), timeout=timeout, name="part") for dim in (1, 2))
        sp_group = _group(_lines(blocks, 2), timeout=timeout, name="sp")
        links[degree] = Links(sp=Exchange(sp_group), ring=Exchange(ring_group), ulysses=Exchange(ulysses_group))
    names = (str(AxisName.DP_REPLICATE), FSDP_AXIS, str(AxisName.TP))
    groups = [replicate_group, fsdp_group, tp_group]
    return Mesh(
        places=places,
        device_mesh=device_mesh,
        parameters=DeviceMesh.from_group(groups, device.type, mesh=shards, mesh_dim_names=names),
        copy=DeviceMesh.from_group(copy_group, device.type, mesh_dim_names=("copy",)),
        device=device,
        rank=rank,
        world=world,
        links=links,
        control=_group([list(range(world))], timeout=timeout, name="control", backend=_host_backend()),
        saving=_group([list(range(world))], timeout=timeout, name="saving", backend=_host_backend()),
        sp_control=_group(ranks.view(-1, sp.degree * tp).tolist(), timeout=timeout, name="sp_control", backend=_host_backend()),
    )


def _host_backend() -> str:
    """For CPU messages beside the training traffic; a simulated world has no other ranks that could join a real group."""
    return "fake" if dist.get_backend() == "fake" else "gloo"


def sp_ulysses(sp: SpConfig) -> int:
    """Size of the axis ``ulysses``, where the config may leave it open."""
    return sp.ulysses or (1 if sp.scheme == "ring" else sp.degree)


def sp_degrees(sp: SpConfig) -> list[int]:
    """How many ranks may share a sample: ``degree``, or with ``auto`` its divisors from ``min_degree`` on. Ascending."""
    least = sp.min_degree or sp.degree if sp.scheme == "auto" else sp.degree
    return [n for n in range(least, sp.degree + 1) if sp.degree % n == 0]


def _lines(ranks: Tensor, dim: int) -> list[list[int]]:
    """Ranks that differ in their place along one dim alone."""
    lines: list[list[int]] = ranks.movedim(dim, -1).flatten(0, -2).tolist()
    return lines


def _group(parts: Sequence[Sequence[int]], *, timeout: timedelta, name: str, backend: str | None = None) -> dist.ProcessGroup:
    """The group of this rank, among those that ``parts`` says. Collective for the ranks of each part, not across them."""
    (mine,) = (part for part in parts if dist.get_rank() in part)
    group = dist.new_group(list(mine), timeout=timeout, backend=backend, group_desc=name, use_local_synchronization=True)
    assert isinstance(group, dist.ProcessGroup)
    return group
