"""One model, whole and sharded: what tests of a single scheme compare, count and watch. Every function runs on each rank."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from unittest import mock

import torch
import torch.distributed as dist
from sequence_cases import Result, Shape, compute, cut, difference, make_inputs, make_model, summed
from torch import nn

from opensora_dist.config.train import SpConfig
from opensora_dist.core.types import Axis, Region, Thw
from opensora_dist.parallel.mesh import Mesh, build_mesh
from opensora_dist.parallel.recompute import Tape
from opensora_dist.parallel.sequence.base import Shard
from opensora_dist.parallel.sequence.exchange import Exchange, Pending
from opensora_dist.parallel.sequence.layout import SequenceParallel

TOLERANCE = 1e-12
"""Largest difference in float64, over the largest value of a tensor."""


@dataclass(frozen=True)
class Pair:
    """A scheme over all ranks there are, beside one process: two samples with captions of different lengths."""

    scheme: str
    model: str
    grid: Thw
    recompute: bool = False
    overlap: bool = True
    chunks: int = 1

    @property
    def shape(self) -> Shape:
        return Shape(self.grid, batch=2)

    @property
    def axis(self) -> Axis:
        """The one that crosses ranks."""
        if self.model == "dit":
            return Axis.JOINT
        return Axis.SPACE if self.grid.t < dist.get_world_size() else Axis.TIME

    def shard(self, mesh: Mesh) -> Shard:
        sp = SpConfig(degree=mesh.sp_size, scheme=self.scheme, overlap=self.overlap, chunks=self.chunks)
        return SequenceParallel(mesh, sp).shard(self.grid)

    def network(self) -> nn.Module:
        model = make_model(self.model, self.shape)
        for block in model.blocks:
            block.recompute = self.recompute
        return model


def make_mesh() -> Mesh:
    """All ranks share a sample."""
    return build_mesh(torch.device("cpu"), dp_replicate=1, sp=SpConfig(degree=dist.get_world_size()), timeout_s=60)


@cache
def _whole(model: str, shape: Shape) -> Result:
    return compute(make_model(model, shape), make_inputs(shape, group=0), shard=None)


def errors(pairs: Sequence[Pair]) -> dict[str, float]:
    """Of each pair the largest difference of output, dx and every gradient, summed over ranks, from one process."""
    mesh, found = make_mesh(), {}
    for pair in pairs:
        shard, wanted = pair.shard(mesh), _whole(pair.model, pair.shape)
        result = compute(pair.network(), make_inputs(pair.shape, group=0), shard=shard)
        part = _latents(pair, shard)
        grads = summed(result.grads)
        assert grads.keys() == wanted.grads.keys()
        found[str(pair)] = max(
            difference(result.output, cut(wanted.output, part), scale=wanted.output),
            difference(result.dx, cut(wanted.dx, part), scale=wanted.dx),
            *(difference(grads[name], grad, scale=grad) for name, grad in wanted.grads.items()),
        )
    return found


def _latents(pair: Pair, shard: Shard) -> Region:
    inputs = make_inputs(pair.shape, group=0).x_BCTHW
    return shard.region.times(Thw(*(n // g for n, g in zip(inputs.shape[2:], pair.grid))))


@contextmanager
def watched_sends() -> Iterator[list[tuple[int, torch.dtype]]]:
    """(bytes to other ranks, dtype) of every message handed to torch.distributed."""
    seen: list[tuple[int, torch.dtype]] = []
    all_to_all_single, batch_isend_irecv = dist.all_to_all_single, dist.batch_isend_irecv

    def counting_all_to_all(output, send, output_split_sizes, input_split_sizes, group, async_op):
        rows = sum(n for rank, n in enumerate(input_split_sizes) if rank != dist.get_rank(group))
        seen.append((send[:1].nbytes * rows, send.dtype))
        return all_to_all_single(output, send, output_split_sizes, input_split_sizes, group, async_op)

    def counting_batch(ops):
        seen.extend((op.tensor.nbytes, op.tensor.dtype) for op in ops if op.op is dist.isend)
        return batch_isend_irecv(ops)

    with (
        mock.patch.object(dist, "all_to_all_single", counting_all_to_all),
        mock.patch.object(dist, "batch_isend_irecv", counting_batch),
    ):
        yield seen


def sent(pairs: Sequence[Pair]) -> list[tuple[tuple[int, int], tuple[int, int]]]:
    """((forward, backward) bytes of the model, the same by the scheme's formula)."""
    mesh, found = make_mesh(), []
    for pair in pairs:
        shard, model, inputs = pair.shard(mesh), pair.network(), make_inputs(pair.shape, group=0)
        with watched_sends() as seen:
            out = model(
                cut(inputs.x_BCTHW, _latents(pair, shard)), inputs.timestep_B, inputs.text_BYE, inputs.text_mask_BY, shard=shard
            )
            forward = sum(size for size, _ in seen)
            out.sum().backward()
            backward = sum(size for size, _ in seen) - forward
        formula = shard.scheme.bytes_sent(shard, pair.axis, batch=pair.shape.batch, width=pair.shape.width, element_bytes=8)
        blocks = len(model.blocks)
        found.append(((forward, backward), (blocks * formula.forward, blocks * formula.backward)))
    return found


def half_precision(pairs: Sequence[Pair]) -> list[tuple[set[torch.dtype], float, float]]:
    """(dtypes that travel, relative error of the output, and of dx) under autocast, against one process under autocast."""
    mesh, found = make_mesh(), []
    for pair in pairs:
        shard, inputs = pair.shard(mesh), make_inputs(pair.shape, group=0, dtype=torch.float32)
        with torch.autocast("cpu", torch.bfloat16):
            wanted = compute(pair.network().float(), inputs, shard=None)
            with watched_sends() as seen:
                result = compute(pair.network().float(), inputs, shard=shard)
        part = _latents(pair, shard)
        errors = [
            (mine - cut(whole, part)).norm().item() / cut(whole, part).norm().item()
            for mine, whole in ((result.output, wanted.output), (result.dx, wanted.dx))
        ]
        found.append(({dtype for _, dtype in seen}, *errors))
    return found


def living_tapes(pairs: Sequence[Pair]) -> list[int]:
    """Tapes of each pair that outlive its forward and backward, and with them everything that was received."""
    mesh, found = make_mesh(), []
    for pair in pairs:
        tapes: list[weakref.ref[Tape]] = []
        real = Tape.__init__

        def noted(self, tapes=tapes, real=real):
            real(self)
            tapes.append(weakref.ref(self))

        with mock.patch.object(Tape, "__init__", noted):
            compute(pair.network(), make_inputs(pair.shape, group=0), shard=pair.shard(mesh))
        assert tapes
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
