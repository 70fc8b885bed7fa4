"""One model, whole and sharded: what tests of a single scheme compare, count and watch. Every function runs on each rank."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Literal
from unittest import mock

import torch
import torch.distributed as dist
from sequence_cases import Result, Shape, compute, cut, difference, latent, make_inputs, make_model, summed
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from opensora_dist.config.train import ParallelConfig, SpConfig
from opensora_dist.core.types import Axis, Region, Thw
from opensora_dist.models.levers import set_levers
from opensora_dist.parallel.mesh import Mesh, build_mesh
from opensora_dist.parallel.recompute import Recompute, Tape
from opensora_dist.parallel.sequence.base import Shard
from opensora_dist.parallel.sequence.exchange import Exchange, Pending
from opensora_dist.parallel.sequence.layout import SequenceParallel
from opensora_dist.parallel.sequence.traffic import SentBytes

TOLERANCE = 1e-12
"""Largest difference in float64, over the largest value of a tensor."""


@dataclass(frozen=True)
class Pair:
    """A scheme over all ranks there are, beside one process: two samples with captions of different lengths."""

    scheme: str
    model: str
    grid: Thw
    recompute: Recompute = "none"
    offload: bool = False
    tile_tokens: int | None = None
    overlap: bool = True
    chunks: int = 1
    ulysses: int | None = None
    dw: Literal["gather", "keep"] = "gather"
    heads: int = 12
    width: int = 24

    @property
    def shape(self) -> Shape:
        return Shape(self.grid, batch=2, heads=self.heads, width=self.width)

    @property
    def sp(self) -> SpConfig:
        return SpConfig(
            degree=dist.get_world_size(),
            scheme=self.scheme,
            ulysses=self.ulysses,
            overlap=self.overlap,
            chunks=self.chunks,
            fastseq_dw=self.dw,
        )

    @property
    def axis(self) -> Axis:
        """The one that crosses ranks."""
        if self.model == "dit":
            return Axis.JOINT
        return Axis.SPACE if self.grid.t < dist.get_world_size() else Axis.TIME

    def shard(self, mesh: Mesh) -> Shard:
        return SequenceParallel(mesh, self.sp).shard(self.grid)

    def network(self) -> nn.Module:
        model = make_model(self.model, self.shape)
        levers = ParallelConfig(recompute=self.recompute, offload_activations=self.offload, tile_tokens=self.tile_tokens)
        set_levers(model, levers, device=torch.device("cpu"), min_offload_bytes=0)
        return model


def make_mesh(pair: Pair | None = None) -> Mesh:
    """All ranks share a sample; in the groups that a pair wants, if one is given."""
    sp = pair.sp if pair else SpConfig(degree=dist.get_world_size())
    return build_mesh(torch.device("cpu"), dp_replicate=1, sp=sp, timeout_s=60)


def _mesh_of(pairs: Sequence[Pair]) -> Mesh:
    assert len({(pair.scheme, pair.ulysses) for pair in pairs}) == 1, "pairs of one call share their groups"
    return make_mesh(pairs[0])


@cache
def whole(model: str, shape: Shape) -> Result:
    return compute(make_model(model, shape), make_inputs(shape, group=0), shard=None)


def errors(pairs: Sequence[Pair]) -> dict[str, float]:
    """Of each pair the largest difference of output, dx and every gradient, summed over ranks, from one process."""
    mesh, found = _mesh_of(pairs), {}
    for pair in pairs:
        shard, wanted = pair.shard(mesh), whole(pair.model, pair.shape)
        result = compute(pair.network(), make_inputs(pair.shape, group=0), shard=shard)
        part = latents(pair, shard)
        grads = summed(result.grads)
        assert grads.keys() == wanted.grads.keys()
        found[str(pair)] = max(
            difference(result.output, cut(wanted.output, part), scale=wanted.output),
            difference(result.dx, cut(wanted.dx, part), scale=wanted.dx),
            *(difference(grads[name], grad, scale=grad) for name, grad in wanted.grads.items()),
        )
    return found


def latents(pair: Pair, shard: Shard) -> Region:
    """Those of a shard."""
    return shard.region.times(Thw(*(n // g for n, g in zip(latent(pair.shape), pair.grid))))


@contextmanager
def sent_dtypes() -> Iterator[set[torch.dtype]]:
    """Of what is handed to torch.distributed."""
    seen: set[torch.dtype] = set()
    all_to_all_single, batch_isend_irecv = dist.all_to_all_single, dist.batch_isend_irecv

    def noted_all_to_all(output, send, *args, **kwargs):
        seen.add(send.dtype)
        return all_to_all_single(output, send, *args, **kwargs)

    def noted_batch(ops):
        seen.update(op.tensor.dtype for op in ops)
        return batch_isend_irecv(ops)

    with (
        mock.patch.object(dist, "all_to_all_single", noted_all_to_all),
        mock.patch.object(dist, "batch_isend_irecv", noted_batch),
    ):
        yield seen


def sent(pairs: Sequence[Pair], *, autocast: bool = False) -> list[tuple[tuple[int, int], tuple[int, int]]]:
    """((forward, backward) bytes of the model, the same by the scheme's formula); under autocast of bfloat16, or in float64."""
    mesh, found = _mesh_of(pairs), []
    dtype, element_bytes = (torch.float32, 2) if autocast else (torch.float64, 8)
    for pair in pairs:
        shard, model, marks = pair.shard(mesh), pair.network().to(dtype), []
        with SentBytes() as count, torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            inputs = make_inputs(pair.shape, group=0, dtype=dtype)
            compute(model, inputs, shard=shard, between=lambda marks=marks, count=count: marks.append(count.total))
        shape, blocks = pair.shape, len(model.blocks)
        formula = shard.scheme.bytes_sent(shard, pair.axis, batch=shape.batch, width=shape.width, element_bytes=element_bytes)
        found.append(((marks[0], count.total - marks[0]), (blocks * formula.forward, blocks * formula.backward)))
    return found


def half_precision(pairs: Sequence[Pair]) -> list[tuple[set[torch.dtype], float, float]]:
    """(dtypes that travel, relative error of the output, and of dx) under autocast, against one process under autocast."""
    mesh, found = _mesh_of(pairs), []
    for pair in pairs:
        shard, inputs = pair.shard(mesh), make_inputs(pair.shape, group=0, dtype=torch.float32)
        with torch.autocast("cpu", torch.bfloat16):
            wanted = compute(pair.network().float(), inputs, shard=None)
            with sent_dtypes() as seen:
                result = compute(pair.network().float(), inputs, shard=shard)
        part = latents(pair, shard)
        errors = [
            (mine - cut(whole, part)).norm().item() / cut(whole, part).norm().item()
            for mine, whole in ((result.output, wanted.output), (result.dx, wanted.dx))
        ]
        found.append((seen, *errors))
    return found


def living_tapes(pairs: Sequence[Pair]) -> list[int]:
    """Tapes of each pair that outlive its forward and backward, and with them everything that was received."""
    mesh, found = _mesh_of(pairs), []
    for pair in pairs:
        tapes: list[weakref.ref[Tape]] = []
        real = Tape.__init__

        def noted(self, store=None, *, tapes=tapes, real=real):
            real(self, store)
            tapes.append(weakref.ref(self))

        with mock.patch.object(Tape, "__init__", noted):
            model = pair.network()
            compute(model, make_inputs(pair.shape, group=0), shard=pair.shard(mesh))
        assert len(tapes) == len(model.blocks)
        gc.collect()
        found.append(sum(tape() is not None for tape in tapes))
    return found


@contextmanager
def watched_transfers(log: list[str]) -> Iterator[None]:
    """Notes "send n" and "wait n" for the n-th all-to-all."""
    numbers: dict[Pending, int] = {}
    real_start, real_wait = Exchange.all_to_all, Pending.wait

    def start(self, *args, **kwargs):
        pending = real_start(self, *args, **kwargs)
        numbers[pending] = len(numbers)
        log.append(f"send {numbers[pending]}")
        return pending

    def wait(self):
        if self._works:
            log.append(f"wait {numbers[self]}")
        return real_wait(self)

    with mock.patch.object(Exchange, "all_to_all", start), mock.patch.object(Pending, "wait", wait):
        yield


def transfers(pair: Pair) -> list[str]:
    """The order in which a forward and backward sends and waits."""
    log: list[str] = []
    shard = pair.shard(make_mesh())
    with watched_transfers(log):
        compute(pair.network(), make_inputs(pair.shape, group=0), shard=shard)
    return log


class Products(TorchDispatchMode):
    """Notes every matrix product."""

    def __init__(self, log: list[str]) -> None:
        super().__init__()
        self._log = log

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.addmm_):
            self._log.append("product")
        return func(*args, **(kwargs or {}))


class Marked(torch.autograd.Function):
    """The identity, which notes when it runs, forward and backward."""

    @staticmethod
    def forward(ctx, x, name, log):
        ctx.name, ctx.log = name, log
        log.append(name)
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad):
        ctx.log.append(f"{ctx.name} back")
        return grad, None, None
