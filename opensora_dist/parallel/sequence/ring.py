"""Ring attention: queries stay, keys and values go around the ranks, hidden behind the attention to those that came before.

Each rank merges what its queries get from each chunk by log-sum-exp. In backward the chunks go around again, and behind each of them
the gradient that its visitors add to. A rank computes its own chunk first, under the first hop, and keeps that gradient back; so the
gradient of a chunk sets out from the first rank it visits and comes home after as many hops as the chunk itself makes: P - 1, not P.
"""

# B batch, T frames, S tokens per frame, D width, N heads, K head dim, G sequences, P ranks of the ring; l: a sequence's positions on
# this rank. A chunk is one rank's keys and values in one contiguous buffer, [l, G, 2, N, K] or [G, l, 2, N, K]

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from opensora_dist.core.types import Axis, Thw
from opensora_dist.ops.attention import attention_backward, attention_with_lse
from opensora_dist.ops.precision import accumulation_dtype
from opensora_dist.parallel.recompute import Tape
from opensora_dist.parallel.sequence.base import Projections, Scheme, Shard, Traffic, cast
from opensora_dist.parallel.sequence.exchange import Exchange
from opensora_dist.parallel.sequence.heads import split_q_kv
from opensora_dist.parallel.sequence.hops import RingGather, RingReduce

GRAD_BYTES = accumulation_dtype(torch.bfloat16).itemsize
"""Fewest bytes of an element of the gradient that goes around."""


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
        x_BtsD = cast(x_BtsD)  # once, not by each linear
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
    chunks = RingGather.rows_sent(lengths, rank=rank, by=1) * row_elements * element_bytes
    grads = RingReduce.rows_sent(lengths, rank=rank) * row_elements * max(GRAD_BYTES, element_bytes)
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
        self._num_others, self._dim, self._tape = exchange.size - 1, position_dim, tape
        self._chunks = RingGather(exchange, lengths=lengths, by=1, overlap=overlap, dim=position_dim)
        self._grads = RingReduce(exchange, lengths=lengths, by=1, overlap=overlap, dim=position_dim)
        self._own_grad: Tensor | None = None

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
            self._chunks.start(kv)

    def _forward(self, q_GNlK: Tensor, kv: Tensor) -> tuple[Tensor, Tensor]:
        if self._tape is not None and self._tape.replaying:
            return self._tape.replay(), self._tape.replay()
        out, lse = attention_with_lse(q_GNlK, *self._split(kv))
        out = out.to(accumulation_dtype(out.dtype))
        for _ in range(self._num_others):
            merge_(out, lse, *attention_with_lse(q_GNlK, *self._split(self._chunks.next())))
        out = out.to(q_GNlK.dtype)
        return (out, lse) if self._tape is None else (self._tape.keep(out), self._tape.keep(lse))

    def _backward(self, grad_GNlK: Tensor, q_GNlK: Tensor, kv: Tensor, out_GNlK: Tensor, lse_GNl: Tensor) -> Tensor:
        """The gradient of q. That of this rank's chunk is still on its way."""
        assert self._own_grad is None, "backward ran twice through one rotation"
        exact = accumulation_dtype(kv.dtype)
        self._chunks.start(kv)
        dq, *own_grads = self._gradients(grad_GNlK, q_GNlK, kv, out_GNlK, lse_GNl)
        self._own_grad = self._join(own_grads, like=kv, dtype=exact)
        dq = dq.to(exact)
        for _ in range(self._num_others):
            chunk = self._chunks.next()
            dq_part, *chunk_grads = self._gradients(grad_GNlK, q_GNlK, chunk, out_GNlK, lse_GNl)
            dq += dq_part
            grad = self._grads.arrived()
            if grad is None:  # this is the first rank that this chunk visits
                grad = self._join(chunk_grads, like=chunk, dtype=exact)
            else:
                for part, more in zip(self._split(grad), chunk_grads):
                    part += more
            self._grads.send(grad)
        return dq.to(q_GNlK.dtype)

    def _gradients(
        self, grad_GNlK: Tensor, q_GNlK: Tensor, chunk: Tensor, out_GNlK: Tensor, lse_GNl: Tensor
    ) -> tuple[Tensor, ...]:
        """Of q, from this chunk alone, and of its keys and values, from this rank's queries alone."""
        k_GNlK, v_GNlK = self._split(chunk)
        return attention_backward(grad_GNlK, q_GNlK, k_GNlK, v_GNlK, out_GNlK, lse_GNl)

    def _finish(self, dtype: torch.dtype) -> Tensor:
        """The gradient of this rank's chunk, come home."""
        assert self._own_grad is not None
        own, self._own_grad = self._own_grad, None
        if self._num_others:
            own += self._grads.finish()
        return own.to(dtype)

    def _split(self, chunk: Tensor) -> tuple[Tensor, ...]:
        """Its keys and values, [G, N, l, K] each; views."""
        return chunk.movedim(self._dim, -2).unbind(1)

    def _join(self, parts: Sequence[Tensor], *, like: Tensor, dtype: torch.dtype) -> Tensor:
        """Back from ``_split``, in a new chunk."""
        chunk = like.new_empty(like.shape, dtype=dtype)
        for into, part in zip(self._split(chunk), parts):
            into.copy_(part)
        return chunk


def merge_(out: Tensor, lse: Tensor, more_out: Tensor, more_lse: Tensor) -> None:
    """Adds the attention to more keys to ``out`` [..., l, K] and ``lse`` [..., l], in place; of any magnitude without overflow."""
    out.lerp_(more_out.to(out.dtype), torch.sigmoid(more_lse - lse)[..., None])
    torch.logaddexp(lse, more_lse, out=lse)


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
