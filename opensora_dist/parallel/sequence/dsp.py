"""DSP: the residual stays sharded; tokens change rank for the one attention that crosses the sharded dim, and come back.

Said for frames (``Axis.TIME``): a rank holds all places of t frames, and attends over all T frames of the places that it *owns*. So
its tokens are of two kinds: the *own*, at places it owns, which never travel, and the *rest*. The rest leave first; own tokens are
projected while they are on their way. After the attention, the output for other ranks' frames is projected and leaves first; own
tokens then go through the rest of the block meanwhile. Backward is the mirror image.

With many ranks few tokens are own, and hide little. Then ``chunks`` helps: the local work before the attention is done for one run of
frames after the other, each leaving while the next is worked on, and the attention likewise for one run of places after the other.

For a shard by rows, read rows and frames in place of frames and places.
"""

# B batch, T frames, S places, D width, N heads, K head dim, C = N K, E = 3 C; t: frames held here, s: places owned here, G = B * s
# R rows: tokens as they travel, [t, B, places]

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from opensora_dist.core.types import Axis, Thw
from opensora_dist.ops.frames import frames_attention
from opensora_dist.ops.precision import compute_dtype
from opensora_dist.parallel.sequence.base import (
    Before,
    First,
    Projections,
    Scheme,
    Shard,
    Then,
    Traffic,
    ranges,
    split_sizes,
)
from opensora_dist.parallel.sequence.dsp_ops import cat, leave, project
from opensora_dist.parallel.sequence.dsp_parts import Parts
from opensora_dist.parallel.sequence.rows import join, part
from opensora_dist.parallel.sequence.transfer import Transfer


class Dsp(Scheme):
    """Dynamic sequence parallelism, its transfers hidden under the block's own work.

    Under recomputation what arrived is kept: the others' tokens at the places owned, and the attention's output for tokens that left,
    each (P - 1) / P of the size of the residual stream here.

    Args:
        overlap: False is the published form, which waits for each transfer; with the same bytes.
        chunks: Runs of frames on the way out, and of places on the way back.

    Source: DSP, arXiv 2403.10266; the overlap is ours.
    """

    name = "dsp"

    def __init__(self, *, overlap: bool, chunks: int) -> None:
        self._overlap, self._chunks = overlap, chunks

    def problems(self, grid: Thw, *, size: int, heads: int, joint: bool) -> list[str]:
        if not joint:
            return []
        others = "ring" if heads % size else "ring or ulysses"
        return [
            "parallel.sp.scheme=dsp needs attention in two parts, over space and over time, and model.name=dit attends over both at "
            f"once; use parallel.sp.scheme={others}, or model.name=stdit"
        ]

    def bytes_sent(self, shard: Shard, axis: Axis, *, batch: int, width: int, element_bytes: int) -> Traffic:
        lengths, rank = shard.lengths(axis), shard.rank
        owned = split_sizes(shard.num_sequences(axis, batch=1), len(lengths))
        # To the owners of the sequences, and back the output of the sequences owned here.
        tokens = lengths[rank] * (sum(owned) - owned[rank]) + (sum(lengths) - lengths[rank]) * owned[rank]
        sent = batch * tokens * width * element_bytes
        return Traffic(forward=sent, backward=sent)

    def attend(self, attn: Projections, x_BtsD: Tensor, axis: Axis, shard: Shard) -> Tensor:
        x_BtSD = _frames_first(x_BtsD, axis)
        pipeline = _Pipeline(attn, shard, axis, like=x_BtSD, overlap=self._overlap, chunks=1)
        return _frames_first(pipeline.arrive([pipeline.depart(0, x_BtSD, x_BtSD)], lambda _x, out: out), axis)

    def attend_parts(
        self,
        attn: Projections,
        xs_BtsD: Sequence[Tensor],
        axis: Axis,
        shards: Sequence[Shard],
        *,
        meanwhile: Callable[[], None],
    ) -> list[Tensor]:
        parts = Parts(attn, [_frames_first(x, axis) for x in xs_BtsD], axis, shards, overlap=self._overlap)
        meanwhile()
        return [_frames_first(out, axis) for out in parts.arrive()]

    def branch(
        self, attn: Projections, x_BtsD: Tensor, axis: Axis, shard: Shard, *, first: First | None, before: Before, then: Then
    ) -> Tensor:
        if not self._overlap:
            return super().branch(attn, x_BtsD, axis, shard, first=first, before=before, then=then)
        x_BtSD = _frames_first(x_BtsD, axis)
        pipeline = _Pipeline(attn, shard, axis, like=x_BtSD, overlap=True, chunks=self._chunks)
        departed = []
        # The gradient of a split is a copy, for one piece too.
        pieces = torch.split(x_BtSD, pipeline.held, dim=1) if len(pipeline.held) > 1 else (x_BtSD,)
        for run, (piece, frames) in enumerate(zip(pieces, ranges(pipeline.held))):
            x = _frames_first(piece, axis)
            x = x if first is None else first(x)
            # All frames are in a piece of a shard by rows.
            into = before(x, slice(None) if axis is Axis.SPACE else slice(frames.start, frames.stop))
            x_piece = _frames_first(x, axis)
            departed.append(pipeline.depart(run, x_piece, x_piece if into is x else _frames_first(into, axis)))
        return _frames_first(pipeline.arrive(departed, then), axis)


def _frames_first(x_BtsD: Tensor, axis: Axis) -> Tensor:
    """The sharded dim before the one whose places are owned; a view, and its own inverse."""
    return x_BtsD.transpose(1, 2) if axis is Axis.SPACE else x_BtsD


@dataclass(frozen=True, kw_only=True)
class _Departed:
    """One run of frames: its residual, the rows sent and kept of its input, and what other ranks send of theirs."""

    x_BtSD: Tensor
    rows_RD: tuple[Tensor, Tensor]
    residual_is_input: bool
    arriving_RD: Tensor
    transfer: Transfer


class _Pipeline:
    """One attention of one forward: ``depart`` for each run of frames, then ``arrive``.

    Args:
        like: The residual, frames first.
        chunks: Runs of frames, and of places; fewer where a rank has fewer.
    """

    def __init__(self, attn: Projections, shard: Shard, axis: Axis, *, like: Tensor, overlap: bool, chunks: int) -> None:
        assert shard.links is not None
        self._attn, self._exchange, self._tape, self._overlap = attn, shard.links.sp, shard.tape, overlap
        self._batch, self._t, S, self._width = like.shape
        rank, lengths = self._exchange.rank, shard.lengths(axis)
        self._others = [r for r in range(len(lengths)) if r != rank]
        # Every rank makes as many runs as every other, or they would wait for each other for ever.
        self._held_by = [split_sizes(length, min(chunks, *lengths)) for length in lengths]
        self.held = list(self._held_by[rank])
        owned = ranges(split_sizes(S, len(lengths)))
        self._owned = len(owned[rank])
        num_runs = max(1, min(chunks, *map(len, owned)))
        runs = [[range(o.start + r.start, o.start + r.stop) for r in ranges(split_sizes(len(o), num_runs))] for o in owned]
        self._own_runs = [len(run) for run in runs[rank]]
        self._leaving = ([owned[p] for p in self._others], [owned[rank]])
        self._returning = [[runs[p][j] for p in self._others] for j in range(num_runs)]

    def depart(self, run: int, x_BtSD: Tensor, input_BtSD: Tensor) -> _Departed:
        """Sends the rest of the input of one run of frames."""
        rest_RD, own_RD = part(input_BtSD, self._leaving)
        transfer = self._transfer(
            send=[self.held[run] * self._batch * len(places) for places in self._leaving[0]],
            recv=[self._held_by[r][run] * self._batch * self._owned for r in self._others],
        )
        return _Departed(
            x_BtSD=x_BtSD,
            rows_RD=(rest_RD, own_RD),
            residual_is_input=input_BtSD is x_BtSD,
            arriving_RD=transfer.issue(rest_RD.to(compute_dtype(rest_RD))),
            transfer=transfer,
        )

    def arrive(self, departed: Sequence[_Departed], then: Then) -> Tensor:
        """``then`` on all tokens, given the output of the attention."""
        qkv_RE = project(self._attn, [d.rows_RD[1] for d in departed], [(d.arriving_RD, d.transfer) for d in departed])
        heads, head_dim = self._attn.heads, self._attn.head_dim
        qkv_TBsE = qkv_RE.view(sum(map(sum, self._held_by)), self._batch, self._owned, 3 * heads * head_dim)
        own_tBsC, returning = [], []
        for j, run_TBsE in enumerate(torch.split(qkv_TBsE, self._own_runs, dim=2)):
            T, B, s, _ = run_TBsE.shape
            out_BTsC = frames_attention(run_TBsE.view(T, B, s, 3, heads, head_dim).transpose(0, 1))
            own_RC, rest_RC = leave([out_BTsC.transpose(1, 2).flatten(0, 1)], [[(0, slice(0, self._t))], self._order()])
            own_tBsC.append(own_RC.view(self._t, B, s, heads * head_dim))
            transfer = self._transfer(
                send=[sum(self._held_by[r]) * B * s for r in self._others],
                recv=[self._t * B * len(places) for places in self._returning[j]],
            )
            returning.append((transfer, transfer.issue(self._attn.proj(rest_RC))))
        own_RC = cat(own_tBsC, dim=2).flatten(0, 2)
        *rest_RD, x_own_RD = self._residual(departed)
        done_own = self._apply(then, x_own_RD, self._attn.proj(own_RC), self._leaving[1])
        done_rest = [
            self._apply(then, x_RD, transfer.wait(arriving_RD), group)
            for x_RD, (transfer, arriving_RD), group in zip(rest_RD, returning, self._returning)
        ]
        return join([*done_rest, done_own], [*self._returning, self._leaving[1]], batch=self._batch)

    def _transfer(self, *, send: Sequence[int], recv: Sequence[int]) -> Transfer:
        """Rows for and from every *other* rank; nothing goes through the collective from a rank to itself."""
        send_rows, recv_rows = [0] * self._exchange.size, [0] * self._exchange.size
        for r, sent, received in zip(self._others, send, recv):
            send_rows[r], recv_rows[r] = sent, received
        return Transfer(self._exchange, send_rows=send_rows, recv_rows=recv_rows, overlap=self._overlap, tape=self._tape)

    def _order(self) -> list[tuple[int, slice]]:
        """Where other ranks' frames lie along T, rank by rank: as they leave again."""
        sizes = [self._held_by[r][run] for run in range(len(self.held)) for r in self._others]
        spans = [slice(self._t + span.start, self._t + span.stop) for span in ranges(sizes)]
        return [(0, spans[run * len(self._others) + i]) for i in range(len(self._others)) for run in range(len(self.held))]

    def _residual(self, departed: Sequence[_Departed]) -> tuple[Tensor, ...]:
        """Rows of the residual: of the rest, run of places by run, and own."""
        only = departed[0]
        if len(departed) == len(self._returning) == 1 and only.residual_is_input:
            return only.rows_RD
        return part(cat([d.x_BtSD for d in departed], dim=1), [*self._returning, self._leaving[1]])

    def _apply(self, then: Then, x_RD: Tensor, out_RD: Tensor, group: Sequence[range]) -> Tensor:
        """``then`` on the rows of a group: at once for one sample, range by range where samples alternate in the rows."""
        B, t, D = self._batch, self._t, self._width
        if B == 1:  # rows of several ranges don't make places in order, and needn't: `then` takes each token by itself
            return then(x_RD.view(1, t, len(x_RD) // t, D), out_RD.view(1, t, len(x_RD) // t, D)).reshape(-1, D)
        done, sizes = [], [t * B * len(places) for places in group]
        for places, x, out in zip(group, torch.split(x_RD, sizes), torch.split(out_RD, sizes)):
            x_BtsD, out_BtsD = (rows.view(t, B, len(places), D).transpose(0, 1) for rows in (x, out))
            done.append(then(x_BtsD, out_BtsD).transpose(0, 1).reshape(-1, D))
        return cat(done, dim=0)
