"""Ulysses: around an attention that crosses ranks, tokens of all heads become all tokens of some heads, and back."""

# B batch, T frames, S places, D width, N heads, K head dim; G sequences, L tokens of one; l: those here, n: heads of a rank, P ranks
#
# Nothing is packed: matrix products write messages (``messages``), and attention reads strided views of what arrived. Its output is put
# in order of tokens, which is no copy where the kernel gives it in the layout of its queries.
# This rank's own rows go through the collective, a copy of 1/P. Leaving them out would save that, and cost more: after the first
# transfer the others' rows would have to be joined with them (a copy of all), and after the second the backward of the split
# that set them aside would be a copy of all.

from __future__ import annotations

from collections.abc import Iterable
from functools import partial

import torch
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
    ranges,
    split_sizes,
)
from opensora_dist.parallel.sequence.heads import heads_problems
from opensora_dist.parallel.sequence.messages import QkvMessages, Source, project_home, rows_of
from opensora_dist.parallel.sequence.transfer import Transfer


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
        size = len(shard.sizes)
        source = QkvMessages(attn, ranks=size, tape=shard.tape).source(rows_of(x_BtsD, axis))
        pieces = split_sizes(attn.heads // size, self._chunks if axis is Axis.JOINT else 1)
        crossings = [
            self._crossing(source, attn=attn, axis=axis, shard=shard, heads=slice(heads.start, heads.stop))
            for heads in ranges(pieces)
            if heads
        ]
        for crossing in crossings:
            crossing.attend()
        return _project(attn, [crossing.output() for crossing in crossings], axis=axis, ranks=size, like=x_BtsD)

    def branch(
        self, attn: Projections, x_BtsD: Tensor, axis: Axis, shard: Shard, *, first: First | None, before: Before, then: Then
    ) -> Tensor:
        if axis is Axis.JOINT:
            return super().branch(attn, x_BtsD, axis, shard, first=first, before=before, then=then)
        x_BtsD = x_BtsD if first is None else first(x_BtsD)
        dim = 1 if axis is Axis.SPACE else 2
        sizes = [size for size in split_sizes(x_BtsD.shape[dim], self._chunks) if size]
        pieces = torch.split(x_BtsD, sizes, dim=dim)  # its backward is one cat
        qkv = QkvMessages(attn, ranks=len(shard.sizes), tape=shard.tape)
        # Every piece is sent before the first is attended to, so that the link has no pause between them.
        crossings = []
        for piece, part in zip(pieces, ranges(sizes)):
            given = before(piece, slice(part.start, part.stop) if axis is Axis.SPACE else slice(None))
            crossings.append(self._crossing(qkv.source(rows_of(given, axis)), attn=attn, axis=axis, shard=shard))
        for crossing in crossings:
            crossing.attend()
        done = [
            then(piece, _project(attn, [crossing.output()], axis=axis, ranks=len(shard.sizes), like=piece))
            for piece, crossing in zip(pieces, crossings)
        ]
        return done[0] if len(done) == 1 else torch.cat(done, dim=dim)

    def _crossing(self, source: Source, *, attn: Projections, axis: Axis, shard: Shard, heads: slice = slice(None)) -> _Crossing:
        """Sends q, k and v of these heads of each rank, one after the other, or at once."""
        parts = [slice(i, i + 1) for i in range(3)] if self._overlap else [slice(3)]
        messages = (source.write(parts=part, heads=heads) for part in parts)  # each is sent before the next is projected
        return _Crossing(messages, attn=attn, axis=axis, shard=shard, overlap=self._overlap)


class _Crossing:
    """Some sequences, or some heads of all, on the way to the ranks of the heads and back. All ranks make the same in the same order.

    Made, it has sent q, k and v. ``attend`` waits for the others' and sends the output, ``output`` waits for that of the tokens here.
    """

    def __init__(self, messages: Iterable[Tensor], *, attn: Projections, axis: Axis, shard: Shard, overlap: bool) -> None:
        assert shard.links is not None
        lengths = shard.lengths(axis)
        self._head_dim = attn.head_dim
        self._whole, self._mine = lengths, [lengths[shard.rank]] * len(lengths)
        self._transfer = partial(Transfer, shard.links.sp, overlap=overlap, tape=shard.tape)
        self._arriving = []
        for message in messages:
            transfer = self._transfer(send_rows=self._mine, recv_rows=self._whole)
            self._arriving.append((transfer, transfer.issue(message)))

    def attend(self) -> None:
        """Attention of whole sequences with the heads of this rank."""
        qkv_GnLK: list[Tensor] = []
        for transfer, arriving in self._arriving:
            got = transfer.wait(arriving)  # [L, G.., m, n K]
            parts = got.view(len(got), -1, got.shape[-2], got.shape[-1] // self._head_dim, self._head_dim)
            # One alone is not unbound: in backward that would be a copy.
            parts_LGnK = (parts.squeeze(2),) if parts.shape[2] == 1 else parts.unbind(2)
            qkv_GnLK += [part_LGnK.permute(1, 2, 0, 3) for part_LGnK in parts_LGnK]
        rows = attention(*qkv_GnLK).permute(2, 0, 1, 3).contiguous().view(*got.shape[:-2], -1)  # [L, G.., n K]
        self._back = self._transfer(send_rows=self._whole, recv_rows=self._mine)
        self._returning = self._back.issue(rows)

    def output(self) -> Tensor:
        """What each rank gives for the tokens here, [P l, G.., n K]."""
        return self._back.wait(self._returning)


def _project(attn: Projections, outputs: list[Tensor], *, axis: Axis, ranks: int, like: Tensor) -> Tensor:
    """The output projection of one piece of the sequences whose heads came in these pieces, in the residual layout."""
    return from_sequences(project_home(attn.proj, outputs, ranks=ranks), axis, like=like)
