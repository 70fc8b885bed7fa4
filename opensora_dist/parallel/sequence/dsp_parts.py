"""``dsp`` for one attention of samples of several shapes: however many there are, one all-to-all there and one back."""

# B batch, T frames, S places, D width, C heads x head dim, E = 3 C; t: frames held here, G sequences owned here
# R rows: tokens as they travel, [t, sequences] of each part, in each block (one for each rank) part by part

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import torch
from torch import Tensor

from opensora_dist.core.types import Axis
from opensora_dist.ops.frames import frames_attention
from opensora_dist.ops.precision import compute_dtype
from opensora_dist.parallel.sequence.base import Projections, Shard, Traffic, ranges
from opensora_dist.parallel.sequence.dsp_ops import cat, leave, project
from opensora_dist.parallel.sequence.rows import Rectangles, join_all, part_all, rectangles
from opensora_dist.parallel.sequence.transfer import Transfer


class _Part:
    """How the samples of one shape are held, and who owns which sequences."""

    def __init__(self, shard: Shard, axis: Axis, *, batch: int, first: int) -> None:
        self.batch, self.rank = batch, shard.rank
        self.places, self.held = shard.num_sequences(axis, batch=1), shard.lengths(axis)
        size, total = len(self.held), shard.num_sequences(axis, batch=batch)
        self.owned = ranges([total // size + ((r - first) % size < total % size) for r in range(size)])
        self.next = (first + total) % size

    @property
    def shape(self) -> tuple[int, int, int]:
        """[B, t, S] of the tokens here."""
        return self.batch, self.held[self.rank], self.places

    def owned_by(self, rank: int) -> Rectangles:
        """Whose sequences are a rank's."""
        return rectangles(self.owned[rank], places=self.places)

    def rows_to(self, rank: int) -> int:
        """Tokens here of sequences that a rank owns."""
        return self.held[self.rank] * len(self.owned[rank])

    def rows_from(self, rank: int) -> int:
        """A rank's tokens of sequences owned here."""
        return self.held[rank] * len(self.owned[self.rank])

    def span(self, rank: int, order: Sequence[int]) -> slice:
        """Where a rank's frames lie along T, which has those of ``order`` one after the other."""
        ends = list(accumulate((self.held[r] for r in order), initial=0))
        return slice(ends[order.index(rank)], ends[order.index(rank) + 1])


def _parts(shards: Sequence[Shard], axis: Axis, *, batches: Sequence[int]) -> list[_Part]:
    """Sequences are dealt out one by one, over all samples of all parts: a picture has one, and pictures are many."""
    parts: list[_Part] = []
    for shard, batch in zip(shards, batches, strict=True):
        parts.append(_Part(shard, axis, batch=batch, first=parts[-1].next if parts else 0))
    return parts


def bytes_of_parts(shards: Sequence[Shard], axis: Axis, *, batches: Sequence[int], width: int, element_bytes: int) -> Traffic:
    """What this rank sends in one attention of parts that cross: ``Scheme.bytes_sent`` of a pack."""
    parts, rank = _parts(shards, axis, batches=batches), shards[0].rank
    others = [r for r in range(len(parts[0].held)) if r != rank]
    sent = sum(part.rows_to(r) + part.rows_from(r) for part in parts for r in others) * width * element_bytes
    return Traffic(forward=sent, backward=sent)


class Parts:
    """Sends what other ranks own as soon as it is made; ``arrive`` does the attention. What runs between hides the way there.

    Args:
        xs_BtSD: The attention's input of each part, frames first.
        shards: Of each part; all over the same ranks.
        overlap: False waits for each transfer.
    """

    def __init__(
        self, attn: Projections, xs_BtSD: Sequence[Tensor], axis: Axis, shards: Sequence[Shard], *, overlap: bool
    ) -> None:
        links = shards[0].links
        assert links is not None
        self._attn, self._exchange, self._tape, self._overlap = attn, links.sp, shards[0].tape, overlap
        self._parts = _parts(shards, axis, batches=[len(x) for x in xs_BtSD])
        self._others = [r for r in range(links.sp.size) if r != links.sp.rank]
        numbered = list(enumerate(self._parts))
        self._leaving = [(i, part.owned_by(r)) for r in self._others for i, part in numbered]
        self._staying = [(i, part.owned_by(links.sp.rank)) for i, part in numbered]
        rest_RD, self._own_RD = part_all(xs_BtSD, [self._leaving, self._staying])
        self._there = Transfer(links.sp, send_rows=self._rows_to(), recv_rows=self._rows_from(), overlap=overlap, tape=self._tape)
        self._arriving_RD = self._there.issue(rest_RD.to(compute_dtype(rest_RD)))

    def arrive(self) -> list[Tensor]:
        """The attention's output of each part, [B, t, S, D]."""
        mine, parts = self._exchange.rank, self._parts
        qkv_RE = project(self._attn, [self._own_RD], [(self._arriving_RD, self._there)])
        order = [mine, *self._others]
        outs_GTC = [self._attend(part, rows_RE) for part, rows_RE in zip(parts, self._by_part(qkv_RE, order), strict=True)]
        spans = [[(i, part.span(r, order)) for r in ranks for i, part in enumerate(parts)] for ranks in ([mine], self._others)]
        own_RC, rest_RC = leave(outs_GTC, spans)
        back = Transfer(
            self._exchange, send_rows=self._rows_from(), recv_rows=self._rows_to(), overlap=self._overlap, tape=self._tape
        )
        returning_RD = back.issue(self._attn.proj(rest_RC))
        own_RD = self._attn.proj(own_RC)
        rows = [back.wait(returning_RD), own_RD]
        return list(join_all(rows, [self._leaving, self._staying], shapes=[part.shape for part in parts]))

    def _rows_to(self) -> list[int]:
        return [sum(part.rows_to(r) for part in self._parts) if r in self._others else 0 for r in range(self._exchange.size)]

    def _rows_from(self) -> list[int]:
        return [sum(part.rows_from(r) for part in self._parts) if r in self._others else 0 for r in range(self._exchange.size)]

    def _by_part(self, rows_RE: Tensor, order: Sequence[int]) -> list[Tensor]:
        """Rows of each part, rank by rank, of rows that are rank by rank and part by part."""
        parts = self._parts
        if len(parts) == 1:
            return [rows_RE]
        pieces = torch.split(rows_RE, [part.rows_from(r) for r in order for part in parts])
        return [cat(pieces[i :: len(parts)], dim=0) for i in range(len(parts))]

    def _attend(self, part: _Part, rows_RE: Tensor) -> Tensor:
        """[G, T, C]."""
        heads, head_dim = self._attn.heads, self._attn.head_dim
        qkv_TGE = rows_RE.view(sum(part.held), len(part.owned[part.rank]), 3, heads, head_dim)
        return frames_attention(qkv_TGE[None])[0].transpose(0, 1)
