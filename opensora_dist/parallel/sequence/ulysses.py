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
    cast,
    from_sequences,
    ranges,
    split_sizes,
    to_sequences,
)
from opensora_dist.parallel.sequence.heads import heads_problems, pack_heads, unpack_heads
from opensora_dist.parallel.sequence.transfer import Transfer

Linear = tuple[Tensor, Tensor]
"""A weight and a bias."""


class Ulysses(Scheme):
    """All-to-all on q, k and v, attention of whole sequences with heads / P heads, all-to-all on its output.

    With ``overlap`` each of q, k and v travels while the next is projected, and the attention is cut in ``chunks`` pieces: a piece
    travels while others are projected, attended to or worked on after. Pieces are sequences (places where the attention is along
    time, frames where it is along space); ``Axis.JOINT`` has but one sequence per sample and is cut into heads, so that only
    attention hides the transfers. Backward runs the same pipeline the other way around.

    Under recomputation q, k, v of this rank's heads (3 l G D elements where ranks hold as many tokens) and the output of its tokens
    (l G D) are kept.

    Args:
        overlap: False sends q, k, v packed, and waits for each transfer where it starts.
        chunks: Pieces; without ``overlap`` there is one.

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
        x = cast(x_BtsD)
        crossings = [
            _Crossing(x, linears, attn=attn, axis=axis, shard=shard, overlap=self._overlap)
            for linears in self._linears(attn, ranks=len(shard.sizes), pieces=self._chunks if axis is Axis.JOINT else 1)
        ]
        for crossing in crossings:
            crossing.attend()
        return _project(attn, [crossing.output() for crossing in crossings], axis=axis, like=x_BtsD)

    def branch(
        self, attn: Projections, x_BtsD: Tensor, axis: Axis, shard: Shard, *, first: First | None, before: Before, then: Then
    ) -> Tensor:
        if axis is Axis.JOINT:
            return super().branch(attn, x_BtsD, axis, shard, first=first, before=before, then=then)
        x_BtsD = x_BtsD if first is None else first(x_BtsD)
        dim = 1 if axis is Axis.SPACE else 2
        sizes = [size for size in split_sizes(x_BtsD.shape[dim], self._chunks) if size]
        pieces = torch.split(x_BtsD, sizes, dim=dim)  # its backward is one cat
        (linears,) = self._linears(attn, ranks=len(shard.sizes), pieces=1)
        # Every piece is sent before the first is attended to, so that the link has no pause between them.
        crossings = [
            _Crossing(
                before(piece, slice(part.start, part.stop) if axis is Axis.SPACE else slice(None)),
                linears,
                attn=attn,
                axis=axis,
                shard=shard,
                overlap=self._overlap,
            )
            for piece, part in zip(pieces, ranges(sizes))
        ]
        for crossing in crossings:
            crossing.attend()
        done = [
            then(piece, _project(attn, [crossing.output()], axis=axis, like=piece)) for piece, crossing in zip(pieces, crossings)
        ]
        return done[0] if len(done) == 1 else torch.cat(done, dim=dim)

    def _linears(self, attn: Projections, *, ranks: int, pieces: int) -> list[list[Linear]]:
        """For pieces of every rank's heads: what is projected and sent at a time, which is q, k and v each, or all.

        Weights are cut once for all sequences, so that backward joins their gradients once.
        """
        sizes = [size for size in split_sizes(attn.heads // ranks, pieces) if size]
        width = attn.qkv.weight.shape[1]
        weights = torch.split(cast(attn.qkv.weight).view(3, ranks, attn.heads // ranks, -1, width), sizes, dim=2)
        biases = torch.split(cast(attn.qkv.bias).view(3, ranks, attn.heads // ranks, -1), sizes, dim=2)
        if not self._overlap:
            return [[(weight.reshape(-1, width), bias.flatten())] for weight, bias in zip(weights, biases)]
        return [
            [(w.reshape(-1, width), b.flatten()) for w, b in zip(weight.unbind(0), bias.unbind(0))]
            for weight, bias in zip(weights, biases)
        ]


class _Crossing:
    """Some sequences, or some heads of all, on the way to the ranks of the heads and back. All ranks make the same in the same order.

    Made, it has sent q, k and v. ``attend`` waits for the others' and sends the output, ``output`` waits for that of the tokens here.
    """

    def __init__(
        self, x_BtsD: Tensor, linears: list[Linear], *, attn: Projections, axis: Axis, shard: Shard, overlap: bool
    ) -> None:
        assert shard.links is not None
        lengths = shard.lengths(axis)
        self._ranks, self._head_dim = len(lengths), attn.head_dim
        self._whole, self._mine = lengths, [lengths[shard.rank]] * len(lengths)
        self._transfer = partial(Transfer, shard.links.sp, overlap=overlap, tape=shard.tape)
        x_BtsD = cast(x_BtsD).contiguous()  # a piece is a view: copied once here, not by each linear
        self._arriving = [
            self._send(to_sequences(F.linear(x_BtsD, *linear), axis), parts=3 // len(linears)) for linear in linears
        ]

    def _send(self, y_lGC: Tensor, *, parts: int) -> tuple[Transfer, Tensor]:
        """Starts sending one of q, k, v, or all three ``parts``."""
        transfer = self._transfer(send_rows=self._mine, recv_rows=self._whole)
        return transfer, transfer.issue(pack_heads(y_lGC.view(*y_lGC.shape[:-1], parts, -1), ranks=self._ranks))

    def attend(self) -> None:
        """Attention of whole sequences with the heads of this rank."""
        qkv_GnLK: list[Tensor] = []
        for transfer, arriving in self._arriving:
            got = transfer.wait(arriving)  # [L, G.., parts, n K]
            parts = got.view(len(got), -1, got.shape[-2], got.shape[-1] // self._head_dim, self._head_dim).unbind(2)
            qkv_GnLK += [part_LGnK.permute(1, 2, 0, 3) for part_LGnK in parts]
        rows = attention(*qkv_GnLK).permute(2, 0, 1, 3).contiguous().view(*got.shape[:-2], -1)  # [L, G.., n K]
        self._back = self._transfer(send_rows=self._whole, recv_rows=self._mine)
        self._returning = self._back.issue(rows)

    def output(self) -> Tensor:
        """Of the tokens here, [l, G.., P, n K], a view."""
        return unpack_heads(self._back.wait(self._returning), ranks=self._ranks)


def _project(attn: Projections, outputs: list[Tensor], *, axis: Axis, like: Tensor) -> Tensor:
    """The output projection of one piece of the sequences whose heads came in these pieces, in the residual layout."""
    out = outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=-1)
    out_lGD: Tensor = attn.proj(out.flatten(-2))
    return from_sequences(out_lGD, axis, like=like)
