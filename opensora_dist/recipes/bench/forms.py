"""What is timed beside each other: every scheme, the same without communication, and two packages that others use."""

# t: frames here; G sequences, l tokens of one here, L of all, N heads, n of a rank, K head dim, D width

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import logging
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from opensora_dist.core.types import Axis, Thw
from opensora_dist.ops.attention import attention
from opensora_dist.parallel.keys import Keys
from opensora_dist.parallel.sequence.base import Links, Projections, Scheme, Shard, Traffic, from_sequences, to_sequences
from opensora_dist.parallel.sequence.exchange import Exchange, Pending

Inner = Callable[[Tensor, Tensor, Tensor], Tensor]


class SilentExchange(Exchange):
    """Transfers that send nothing and are over at once: what a scheme computes, without what it communicates.

    What they bring are numbers like an activation's, drawn once per shape: fresh memory may hold some that are slow to compute with, and
    a GPU multiplies zeros faster. An all-to-all brings the drawn tensor itself, at no cost. A shift and a gather arrive in memory of the
    caller, who may add to it, so they are copied there, once each byte, which is the least that any receiving costs.
    """

    def __init__(self, group: dist.ProcessGroup) -> None:
        super().__init__(group)
        self._drawn: dict[tuple[tuple[int, ...], torch.dtype], Tensor] = {}

    def all_to_all(self, send: Tensor, *, send_rows: Sequence[int], recv_rows: Sequence[int]) -> Pending:
        return Pending(self._numbers((sum(recv_rows), *send.shape[1:]), like=send), [], exchange=self, what="nothing")

    def shift(self, send: Tensor, *, into: Tensor, by: int = 1) -> Pending:
        into.copy_(self._numbers(tuple(into.shape), like=into))
        return Pending(into, [], exchange=self, what="nothing")

    def gather(self, send: Tensor, *, parts: Sequence[Tensor]) -> Pending:
        for rank, part in enumerate(parts):
            if rank != self.rank:
                part.copy_(self._numbers(tuple(part.shape), like=part))
        return Pending(send, [], exchange=self, what="nothing")

    def _numbers(self, shape: tuple[int, ...], *, like: Tensor) -> Tensor:
        if (shape, like.dtype) not in self._drawn:
            drawn = torch.empty(shape).normal_(generator=Keys(0).generator("silent"))
            self._drawn[shape, like.dtype] = drawn.to(like.device, like.dtype)
        return self._drawn[shape, like.dtype]


def silent(links: Links) -> Links:
    """The same places in groups that send nothing."""
    return Links(
        sp=SilentExchange(links.sp.group), ring=SilentExchange(links.ring.group), ulysses=SilentExchange(links.ulysses.group)
    )


class Package(Scheme):
    """Ulysses as a package does it, around the same projections and attention as ours.

    Args:
        name: As in the table.
        inner: q, k, v of the local tokens and all heads to the attention's output of the same.
        batch_first: Whether ``inner`` takes [G, l, N, K]; else [l, G, N, K].
    """

    def __init__(self, name: str, inner: Inner, *, batch_first: bool) -> None:
        self.name = name  # type: ignore[misc]  # a class has one name, but this is many packages
        self._inner, self._batch_first = inner, batch_first

    def problems(self, grid: Thw, *, size: int, heads: int, joint: bool) -> list[str]:
        found = [f"heads {heads} % ranks {size} != 0"] if heads % size else []
        parts = grid.h if grid.t < size else grid.t
        return [*found, *([f"parts must be equal: {parts} frames (rows) % ranks {size} != 0"] if parts % size else [])]

    def bytes_sent(self, shard: Shard, axis: Axis, *, batch: int, width: int, element_bytes: int) -> Traffic:
        lengths = shard.lengths(axis)
        tokens = lengths[shard.rank] * shard.num_sequences(axis, batch=batch)
        sent = 4 * tokens * width * element_bytes * (len(lengths) - 1) // len(lengths)
        return Traffic(forward=sent, backward=sent)

    def attend(self, attn: Projections, x_BtsD: Tensor, axis: Axis, shard: Shard) -> Tensor:
        x = to_sequences(x_BtsD, axis)
        x_lGD = x.flatten(1, -2)
        given = x_lGD.transpose(0, 1) if self._batch_first else x_lGD
        qkv = attn.qkv(given)
        q, k, v = qkv.view(*qkv.shape[:2], 3, attn.heads, -1).unbind(2)
        out: Tensor = attn.proj(self._inner(q, k, v).flatten(2))
        return from_sequences((out.transpose(0, 1) if self._batch_first else out).view(x.shape), axis, like=x_BtsD)


def deepspeed_scheme(group: dist.ProcessGroup) -> Package:
    """DeepSpeed's DistributedAttention, in its default layout, sequence first."""
    os.environ.setdefault("DS_ACCELERATOR", "cuda" if dist.get_backend(group) == "nccl" else "cpu")
    with _hushed("deepspeed", "DeepSpeed"):
        # Its all-reduce through shared memory would be compiled here, and no benchmark calls it.
        importlib.import_module("deepspeed.ops").__compatible_ops__["deepspeed_shm_comm"] = False
        importlib.import_module("deepspeed.comm").init_distributed(verbose=False)
        layer = importlib.import_module("deepspeed.sequence.layer")

    class Attention(nn.Module):
        def forward(self, q_LGnK: Tensor, k_LGnK: Tensor, v_LGnK: Tensor) -> Tensor:
            return attention(*(x.permute(1, 2, 0, 3) for x in (q_LGnK, k_LGnK, v_LGnK))).permute(2, 0, 1, 3)

    distributed: Any = layer.DistributedAttention(Attention(), group)
    return Package("deepspeed", lambda q, k, v: distributed(q, k, v, 1), batch_first=False)


def yunchang_scheme(group: dist.ProcessGroup) -> Package:
    """yunchang's SeqAllToAll4D, one for each of q, k, v and the output, as its UlyssesAttention has them."""
    with _hushed("yunchang"):
        module = importlib.import_module("yunchang.comm.all_to_all")
    to_heads: Any = module.SeqAllToAll4D

    def inner(q_GlNK: Tensor, k_GlNK: Tensor, v_GlNK: Tensor) -> Tensor:
        there = (to_heads.apply(group, x, 2, 1).transpose(1, 2) for x in (q_GlNK, k_GlNK, v_GlNK))
        out: Tensor = to_heads.apply(group, attention(*there).transpose(1, 2), 1, 2)
        return out

    return Package("yunchang", inner, batch_first=True)


PACKAGES: dict[str, Callable[[dist.ProcessGroup], Package]] = {"deepspeed": deepspeed_scheme, "yunchang": yunchang_scheme}


def package_missing(name: str) -> str | None:
    """What to say where a package isn't installed."""
    if importlib.util.find_spec(name) is not None:
        return None
    return "not installed; pip install 'opensora-dist[bench]'"


@contextlib.contextmanager
def _hushed(*loggers: str) -> Iterator[None]:
    """Packages that print as they are imported, or log to the standard output, write to the standard error and say only warnings."""
    with contextlib.redirect_stdout(sys.stderr):
        for name in loggers:
            logging.getLogger(name).setLevel(logging.WARNING)
        yield
    for name in loggers:
        logger = logging.getLogger(name)
        logger.setLevel(logging.WARNING)
        for handler in logger.handlers:
            if isinstance(handler, logging.StreamHandler):
                handler.setStream(sys.stderr)
