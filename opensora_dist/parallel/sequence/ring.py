"""Ring attention: queries stay, keys and values go around the ranks, hidden behind the attention to those that came before.

Each rank merges what its queries get from each chunk by log-sum-exp. In backward the chunks go around again, and behind each of them
the gradient that its visitors add to. A rank computes its own chunk first, under the first hop, and keeps that gradient back; so the
gradient of a chunk sets out from the first rank it visits and comes home after as many hops as the chunk itself makes: P - 1, not P.
"""

# B batch, T frames, S tokens per frame, D width, N heads, K head dim, G sequences, P ranks of the ring; l: a sequence's positions on
# this rank. A chunk is one rank's keys and values in one contiguous buffer, [l, G, 2, N, K] or [G, l, 2, N, K]

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from opensora_dist.core.types import Axis, Thw
from opensora_dist.ops.attention import attention_backward, attention_with_lse
from opensora_dist.parallel.recompute import Tape
from opensora_dist.parallel.sequence.base import Projections, Scheme, Shard, Traffic
from opensora_dist.parallel.sequence.exchange import Exchange, Pending
from opensora_dist.parallel.sequence.heads import split_q_kv

GRAD_BYTES = 4
"""Fewest bytes of an element of the gradient that goes around; float64 stays float64."""


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """What partial results are added up in."""
    return torch.float64 if dtype == torch.float64 else torch.float32


class Ring(Scheme):
    """Ring attention, for any number of heads and ranks.

    Source: Ring Attention, arXiv 2310.01889; merging and backward as in ring-flash-attention.
    """

    name = "ring"

    def __init__(self, *, overlap: bool) -> None:
        self._overlap = overlap

    def problems(self, grid: Thw, *, size: int, heads: int, joint: bool) -> list[str]:
        return []

    def bytes_sent(self, shard: Shard, axis: Axis, *, batch: int, width: int, element_bytes: int) -> Traffic:
        return ring_traffic(
            shard.lengths(axis),
            rank=shard.rank,
            row_elements=2 * width * shard.num_sequences(axis, batch=batch),
            element_bytes=element_bytes,
        )

    def attend(self, attn: Projections, x_BtsD: Tensor, axis: Axis, shard: Shard) -> Tensor:
        assert shard.links is not None
        B, _, S, D = x_BtsD.shape
        # Keys and values are projected apart, so that what the linear writes is what is sent. Where positions come first or second,
        # a chunk's queries, keys and values are views of it.
        if axis is Axis.TIME:
            x, dim = x_BtsD.transpose(0, 1).flatten(1, 2), 0
        else:
            x, dim = (x_BtsD.flatten(0, 1) if axis is Axis.SPACE else x_BtsD.flatten(1, 2)), 1
        rotation = Rotation(shard.links.sp, lengths=shard.lengths(axis), position_dim=dim, overlap=self._overlap, tape=shard.tape)
        q_linear, kv_linear = split_q_kv(attn.qkv)
        kv = rotation.depart(F.linear(x, *kv_linear).view(*x.shape[:2], 2, attn.heads, -1))
        q_GNlK = F.linear(x, *q_linear).view(*x.shape[:2], attn.heads, -1).movedim(dim, -2)
        out_GNlK = rotation.attend(q_GNlK, kv)
        y: Tensor = attn.proj(out_GNlK.movedim(-2, dim).flatten(2))
        return y.view(-1, B, S, D).transpose(0, 1) if axis is Axis.TIME else y.view(x_BtsD.shape)


def ring_traffic(lengths: Sequence[int], *, rank: int, row_elements: int, element_bytes: int) -> Traffic:
    """Bytes that one rank sends for an attention around a ring.

    Args:
        lengths: Positions of each rank's chunk.
        rank: This rank.
        row_elements: Keys and values of one position, over all sequences.
        element_bytes: Of keys and values.
    """
    # A rank passes on every chunk but that of the rank it passes them to, and in backward the gradient of every chunk but its own.
    chunks = (sum(lengths) - lengths[(rank + 1) % len(lengths)]) * row_elements * element_bytes
    grads = (sum(lengths) - lengths[rank]) * row_elements * max(GRAD_BYTES, element_bytes)
    return Traffic(forward=chunks, backward=chunks + grads)


class Rotation:
    """One attention around a ring, and its way back. ``depart`` once, then ``attend`` once.

    They are two nodes of autograd, so that what stands between them hides the first hop of keys and values in forward, and in
    backward the last hop of their gradient.

    Args:
        exchange: The ring.
        lengths: Positions of each rank's chunk.
        position_dim: Where a chunk has its positions, 0 or 1.
        overlap: False waits as soon as a hop is started: the blocking form, with the same bytes.
        tape: Of the region under recomputation, if one is. It keeps the output and its lse: a replay attends to nothing.
    """

    def __init__(
        self, exchange: Exchange, *, lengths: Sequence[int], position_dim: int, overlap: bool, tape: Tape | None
    ) -> None:
        assert len(lengths) == exchange.size
        self._exchange, self._lengths, self._dim = exchange, tuple(lengths), position_dim
        self._overlap, self._tape = overlap, tape
        self._chunks: _Hops | None = None
        self._home: tuple[Tensor, _Hops] | None = None

    def depart(self, kv: Tensor) -> Tensor:
        """Sends this rank's chunk on its way; gives it back for ``attend``. Contiguous."""
        out: Tensor = _Depart.apply(kv, self)  # type: ignore[no-untyped-call]
        return out

    def attend(self, q_GNlK: Tensor, kv: Tensor) -> Tensor:
        """Attention of this rank's queries to the chunks of all ranks, [G, N, l, K]; ``kv`` is what ``depart`` gave."""
        out: Tensor = _Attend.apply(q_GNlK, kv, self)  # type: ignore[no-untyped-call]
        return out

    def _start(self, kv: Tensor) -> None:
        if self._tape is None or not self._tape.replaying:
            self._chunks = self._hops(kv, dtype=kv.dtype)
            self._chunks.send(kv, owner=self._exchange.rank)

    def _forward(self, q_GNlK: Tensor, kv: Tensor) -> tuple[Tensor, Tensor]:
        if self._tape is not None and self._tape.replaying:
            return self._tape.replay(), self._tape.replay()
        assert self._chunks is not None
        hops, self._chunks = self._chunks, None
        out, lse = attention_with_lse(q_GNlK, *self._split(kv))
        out = out.to(accumulation_dtype(out.dtype))
        for owner in self._visitors():
            chunk = hops.receive()
            if owner != self._last:
                hops.send(chunk, owner=owner)
            merge_(out, lse, *attention_with_lse(q_GNlK, *self._split(chunk)))
        out = out.to(q_GNlK.dtype)
        return (out, lse) if self._tape is None else (self._tape.keep(out), self._tape.keep(lse))

    def _backward(self, grad_GNlK: Tensor, q_GNlK: Tensor, kv: Tensor, out_GNlK: Tensor, lse_GNl: Tensor) -> Tensor:
        """The gradient of q. That of this rank's chunk is still on its way."""
        assert self._home is None, "backward ran twice through one rotation"
        exact = accumulation_dtype(kv.dtype)
        chunks, grads = self._hops(kv, dtype=kv.dtype), self._hops(kv, dtype=exact)
        chunks.send(kv, owner=self._exchange.rank)
        own = torch.empty_like(kv, dtype=exact)
        dq, *own_grads = self._gradients(grad_GNlK, q_GNlK, kv, out_GNlK, lse_GNl)
        self._write(own, own_grads)
        dq = dq.to(exact)
        for owner in self._visitors():
            chunk = chunks.receive()
            if owner != self._last:
                chunks.send(chunk, owner=owner)
            dq_part, *chunk_grads = self._gradients(grad_GNlK, q_GNlK, chunk, out_GNlK, lse_GNl)
            dq += dq_part
            if grads.moving:
                grad = grads.receive()
                for part, more in zip(self._split(grad), chunk_grads):
                    part += more
            else:  # the first rank that this chunk visits
                grad = grads.room(owner)
                self._write(grad, chunk_grads)
            grads.send(grad, owner=owner)
        self._home = own, grads
        return dq.to(q_GNlK.dtype)

    def _gradients(
        self, grad_GNlK: Tensor, q_GNlK: Tensor, chunk: Tensor, out_GNlK: Tensor, lse_GNl: Tensor
    ) -> tuple[Tensor, ...]:
        """Of q, from this chunk alone, and of its keys and values, from this rank's queries alone."""
        k_GNlK, v_GNlK = self._split(chunk)
        return attention_backward(grad_GNlK, q_GNlK, k_GNlK, v_GNlK, out_GNlK, lse_GNl)

    def _finish(self, dtype: torch.dtype) -> Tensor:
        """The gradient of this rank's chunk, come home."""
        assert self._home is not None
        (own, grads), self._home = self._home, None
        if grads.moving:
            own += grads.receive()
        return own.to(dtype)

    def _hops(self, kv: Tensor, *, dtype: torch.dtype) -> _Hops:
        return _Hops(self._exchange, lengths=self._lengths, dim=self._dim, like=kv, dtype=dtype, overlap=self._overlap)

    def _visitors(self) -> list[int]:
        """Owners of the chunks that come by, in that order."""
        return [(self._exchange.rank - hop) % self._exchange.size for hop in range(1, self._exchange.size)]

    @property
    def _last(self) -> int:
        """The owner of the last of them."""
        return (self._exchange.rank + 1) % self._exchange.size

    def _split(self, chunk: Tensor) -> tuple[Tensor, ...]:
        """Its keys and values, [G, N, l, K] each; views."""
        return chunk.movedim(self._dim, -2).unbind(1)

    def _write(self, chunk: Tensor, parts: Sequence[Tensor]) -> None:
        for into, part in zip(self._split(chunk), parts):
            into.copy_(part)


def merge_(out: Tensor, lse: Tensor, more_out: Tensor, more_lse: Tensor) -> None:
    """Adds the attention to more keys to ``out`` [..., l, K] and ``lse`` [..., l], in place; of any magnitude without overflow."""
    out.lerp_(more_out.to(out.dtype), torch.sigmoid(more_lse - lse)[..., None])
    torch.logaddexp(lse, more_lse, out=lse)


class _Hops:
    """What goes around a ring, rank by rank, through two buffers of the largest chunk's size.

    Args:
        exchange: The ring.
        lengths: Positions of each rank's chunk.
        dim: Where a chunk has them.
        like: A chunk.
        dtype: Of what is sent.
        overlap: False waits as soon as a hop is started.
    """

    def __init__(
        self, exchange: Exchange, *, lengths: Sequence[int], dim: int, like: Tensor, dtype: torch.dtype, overlap: bool
    ) -> None:
        self._exchange, self._lengths, self._dim, self._overlap = exchange, lengths, dim, overlap
        self._like, self._dtype = like, dtype
        self._buffers: list[Tensor | None] = [None, None]
        self._turn = 0
        self._pending: Pending | None = None

    @property
    def moving(self) -> bool:
        """Whether something is on its way here."""
        return self._pending is not None

    def room(self, owner: int) -> Tensor:
        """Space for the chunk of ``owner``, in the buffer that is not being sent."""
        flat = self._buffers[self._turn]
        if flat is None:
            flat = self._like.new_empty(prod(self._shape(max(self._lengths))), dtype=self._dtype)
            self._buffers[self._turn] = flat
        shape = self._shape(self._lengths[owner])
        return flat[: prod(shape)].view(shape)

    def send(self, chunk: Tensor, *, owner: int) -> None:
        """One hop: to the next rank, while the chunk of the owner before ``owner`` comes from the rank before."""
        if self._exchange.size == 1:
            return
        self._turn = 1 - self._turn
        self._pending = self._exchange.shift(chunk, into=self.room((owner - 1) % self._exchange.size))
        if not self._overlap:
            self._pending.wait()

    def receive(self) -> Tensor:
        """What the last hop brought. What it sent may be written over from then on."""
        assert self._pending is not None
        received, self._pending = self._pending.wait(), None
        return received

    def _shape(self, length: int) -> list[int]:
        shape = list(self._like.shape)
        shape[self._dim] = length
        return shape


class _Depart(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, kv: Tensor, rotation: Rotation) -> Tensor:
        ctx.rotation, ctx.dtype = rotation, kv.dtype
        rotation._start(kv)
        return kv.view_as(kv)

    @staticmethod
    def backward(ctx: Any, _grad: Tensor) -> tuple[Tensor, None]:
        # The gradient that came here is a stand-in: the true one is what the other ranks added to.
        return ctx.rotation._finish(ctx.dtype), None


class _Attend(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q_GNlK: Tensor, kv: Tensor, rotation: Rotation) -> Tensor:
        ctx.rotation = rotation
        out, lse = rotation._forward(q_GNlK, kv)
        ctx.save_for_backward(q_GNlK, kv, out, lse)
        return out

    @staticmethod
    def backward(ctx: Any, grad_GNlK: Tensor) -> tuple[Tensor, Tensor, None]:
        q_GNlK, kv, out_GNlK, lse_GNl = ctx.saved_tensors
        dq = ctx.rotation._backward(grad_GNlK, q_GNlK, kv, out_GNlK, lse_GNl)
        return dq, kv, None
