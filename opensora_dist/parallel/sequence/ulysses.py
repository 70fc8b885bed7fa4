"""Ulysses: around an attention that crosses ranks, tokens of all heads become all tokens of some heads, and back."""

# B batch, T frames, S places, D width, N heads, K head dim; G sequences, L tokens of one; l: those here, n: heads of a rank, P ranks
#
# Copies, counted per element that one rank projects or attends to: one before each all-to-all, which puts the rows of a rank side by
# side, and one after the second, to [.., N, K]. Nothing is unpacked after the first: attention reads strided views of what arrived.
# This rank's own rows go through the collective, a copy of 1/P. Leaving them out would save that, and cost more: after the first
# transfer the others' rows would have to be joined with them (a copy of all), and after the second the backward of the split
# that set them aside would be a copy of all.

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from opensora_dist.core.types import Axis, Thw
from opensora_dist.ops.attention import attention
from opensora_dist.parallel.sequence.base import (
    Before,
    First,
    Projections,
    Scheme,
    Shard,
    Then,
    Traffic,
    from_sequences,
    split_sizes,
    to_sequences,
)
from opensora_dist.parallel.sequence.transfer import Transfer

Linear = tuple[Tensor, Tensor]
"""A weight and a bias."""


def heads_problems(name: str, *, size: int, heads: int, joint: bool) -> list[str]:
    """The rule of schemes that give each of ``size`` ranks some of the heads."""
    if heads % size == 0:
        return []
    fits = ", ".join(str(d) for d in range(1, heads + 1) if heads % d == 0)
    other = "ring" if joint else "dsp or ring"
    return [
        f"parallel.sp.degree={size} must divide model.heads={heads} for parallel.sp.scheme={name}, which deals them out; "
        f"use one of {fits}, or parallel.sp.scheme={other}, which has no such rule"
    ]


def cast(tensor: Tensor) -> Tensor:
    """What a linear would make of an operand under autocast; slices of a weight are cast once here, not once per slice."""
    device = tensor.device.type
    return tensor.to(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else tensor


class Ulysses(Scheme):
    """All-to-all on q, k and v, attention of whole sequences with heads / P heads, all-to-all on its output.

    With ``overlap`` each of q, k and v travels while the next is projected. Where there are sequences to cut, in ``chunks`` pieces,
    a piece travels while others are projected, attended to or worked on after; ``Axis.JOINT`` has one sequence per sample and is not
    cut. Backward runs the same pipeline the other way around.

    Under recomputation q, k, v of this rank's heads (3 l G D elements where ranks hold as many tokens) and the output of its tokens
    (l G D) are kept.

    Args:
        overlap: False sends q, k, v packed, and waits for each transfer where it starts.
        chunks: Pieces of the sequences; without ``overlap`` there are none.

    Source: DeepSpeed-Ulysses, arXiv 2309.14509; the asynchronous form is VeOmni's, arXiv 2508.02317.
    """

    name = "ulysses"

    def __init__(self, *, overlap: bool, chunks: int = 1) -> None:
        self._overlap, self._chunks = overlap, chunks if overlap else 1

    def problems(self, grid: Thw, *, size: int, heads: int, joint: bool) -> list[str]:
        return heads_problems(self.name, size=size, heads=heads, joint=joint)

    def bytes_sent(self, shard: Shard, axis: Axis, *, batch: int, width: int, element_bytes: int) -> Traffic:
        lengths = shard.lengths(axis)
        mine = lengths[shard.rank]
        row_bytes = shard.num_sequences(axis, batch=batch) * (width // len(lengths)) * element_bytes
        to_heads = mine * (len(lengths) - 1)  # tokens here, with the heads of each other rank
        to_tokens = sum(lengths) - mine  # tokens of each other rank, with the heads here
        return Traffic(forward=(3 * to_heads + to_tokens) * row_bytes, backward=(3 * to_tokens + to_heads) * row_bytes)

    def attend(self, attn: Projections, x_BtsD: Tensor, axis: Axis, shard: Shard) -> Tensor:
        crossing = _Crossing(x_BtsD, attn, self._linears(attn), axis=axis, shard=shard, overlap=self._overlap)
        crossing.attend()
        return crossing.output()

    def branch(
        self, attn: Projections, x_BtsD: Tensor, axis: Axis, shard: Shard, *, first: First | None, before: Before, then: Then
    ) -> Tensor:
        """Pieces are places where the attention is along time, and frames where it is along space.

        Every piece is sent before the first is attended to, so that the link has no pause between them.
        """
        x_BtsD = x_BtsD if first is None else first(x_BtsD)
        dim = 1 if axis is Axis.SPACE else 2
        sizes = split_sizes(x_BtsD.shape[dim], 1 if axis is Axis.JOINT else self._chunks)
        pieces = torch.split(x_BtsD, [size for size in sizes if size], dim=dim)  # its backward is one cat
        linears = self._linears(attn)
        crossings, frame = [], 0
        for piece in pieces:
            frames = slice(frame, frame := frame + piece.shape[1]) if axis is Axis.SPACE else slice(None)
            x = before(piece, frames)
            crossings.append(_Crossing(x, attn, linears, axis=axis, shard=shard, overlap=self._overlap))
        for crossing in crossings:
            crossing.attend()
        done = [then(piece, crossing.output()) for piece, crossing in zip(pieces, crossings)]
        return done[0] if len(done) == 1 else torch.cat(done, dim=dim)

    def _linears(self, attn: Projections) -> list[Linear]:
        """What is projected and sent at a time: q, k and v each, or all. Cut once for all pieces, as backward joins them."""
        weight, bias = cast(attn.qkv.weight), cast(attn.qkv.bias)
        return list(zip(weight.chunk(3), bias.chunk(3))) if self._overlap else [(weight, bias)]


class _Crossing:
    """Some sequences, from here to the ranks of the heads and back. All ranks make the same calls in the same order.

    Made, it has sent q, k and v. ``attend`` waits for the others' and sends the output, ``output`` waits for that of the tokens here.
    """

    def __init__(
        self, x_BtsD: Tensor, attn: Projections, linears: list[Linear], *, axis: Axis, shard: Shard, overlap: bool
    ) -> None:
        assert shard.links is not None
        self._attn, self._axis, self._like = attn, axis, x_BtsD
        lengths = shard.lengths(axis)
        self._ranks = len(lengths)
        self._to_heads = [lengths[shard.rank]] * self._ranks
        self._transfer = partial(Transfer, shard.links.sp, overlap=overlap, tape=shard.tape)
        self._lengths = lengths
        x_BtsD = cast(x_BtsD).contiguous()  # a piece is a view: copied once here, not by each linear
        self._arriving = [self._send(F.linear(x_BtsD, *linear)) for linear in linears]

    def _send(self, y_BtsC: Tensor) -> tuple[Transfer, Tensor]:
        """Starts sending one of q, k, v or all of them; C is D or 3 D."""
        D = self._like.shape[-1]
        y = to_sequences(y_BtsC, self._axis)
        y = y.view(*y.shape[:-1], -1, self._ranks, D // self._ranks)  # [l, G.., 1 or 3, P, n K]
        rows = y.movedim(-2, 0).contiguous().flatten(0, 1)
        transfer = self._transfer(send_rows=self._to_heads, recv_rows=self._lengths)
        return transfer, transfer.issue(rows)

    def attend(self) -> None:
        """Attention of whole sequences with the heads of this rank."""
        heads = self._attn.heads // self._ranks
        qkv_GnLK: list[Tensor] = []
        for transfer, arriving in self._arriving:
            got = transfer.wait(arriving)  # [L, G.., 1 or 3, n K]
            parts = got.view(len(got), -1, got.shape[-2], heads, got.shape[-1] // heads).unbind(2)
            qkv_GnLK += [part_LGnK.permute(1, 2, 0, 3) for part_LGnK in parts]
        rows = attention(*qkv_GnLK).permute(2, 0, 1, 3).contiguous().view(*got.shape[:-2], -1)  # [L, G.., n K]
        self._back = self._transfer(send_rows=self._lengths, recv_rows=self._to_heads)
        self._returning = self._back.issue(rows)

    def output(self) -> Tensor:
        """Of the tokens here, in the residual layout."""
        got = self._back.wait(self._returning)
        got = got.view(self._ranks, -1, *got.shape[1:])  # [P, l, G.., n K]
        out_lGD: Tensor = self._attn.proj(got.movedim(0, -2).flatten(-2))
        return from_sequences(out_lGD, self._axis, like=self._like)
