"""FastSeq: tokens go round a ring while each rank projects them to its own heads; an all-to-all brings the output back to tokens."""

# B batch, T frames, S tokens per frame, D width, N heads, K head dim, P ranks, n = N / P; t, s: the local part; G sequences of a
# piece, L tokens of a sequence, l those of one rank; E = 3 n K, F = n K

from __future__ import annotations

import torch
from torch import Tensor

from opensora_dist.core.types import Axis, Thw
from opensora_dist.ops.attention import attention
from opensora_dist.ops.precision import compute_dtype
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
from opensora_dist.parallel.sequence.gathered_qkv import GatheredQkv, HeadSlice
from opensora_dist.parallel.sequence.heads import heads_problems
from opensora_dist.parallel.sequence.hops import RingGather, RingReduce
from opensora_dist.parallel.sequence.messages import project_home
from opensora_dist.parallel.sequence.transfer import Transfer

_CUT_DIM = {Axis.TIME: 2, Axis.SPACE: 1}
"""Along which dim of the residual stream sequences are cut into pieces; a joint attention has one sequence a sample."""


class FastSeq(Scheme):
    """Ring all-gather of x, hidden under the QKV projection of this rank's heads.

    Under recomputation q, k, v of this rank's heads (3 l G D elements where ranks hold as many tokens) and the output of its tokens
    (l G D) are kept; with ``keep_gathered`` the x of others ((P - 1) l G D), too.

    Args:
        overlap: False is the blocking form: each transfer is waited for at once; the same bytes.
        chunks: Pieces that the sequences of one attention are cut into. The first hops of all start at once; each piece's output is
            on its way while the next is attended to, and back home while the ones before go through what follows.
        keep_gathered: Keeps the gathered x for the weight's gradient, P times the memory of x; else backward gathers it again.

    Source: OpenDiT's FastSeq, which is for two ranks; the ring for any number, the cut into pieces and the backward are ours.
    """

    name = "fastseq"

    def __init__(self, *, overlap: bool, chunks: int, keep_gathered: bool) -> None:
        self._overlap, self._chunks, self._keep_gathered = overlap, chunks if overlap else 1, keep_gathered

    def problems(self, grid: Thw, *, size: int, heads: int, joint: bool) -> list[str]:
        return heads_problems(self.name, size=size, heads=heads, joint=joint)

    def bytes_sent(self, shard: Shard, axis: Axis, *, batch: int, width: int, element_bytes: int) -> Traffic:
        lengths, rank, size = shard.lengths(axis), shard.rank, len(shard.sizes)
        gather = RingGather.rows_sent(lengths, rank=rank, by=1)
        again = 0 if self._keep_gathered else RingGather.rows_sent(lengths, rank=rank, by=-1)
        reduce = RingReduce.rows_sent(lengths, rank=rank)
        row = shard.num_sequences(axis, batch=batch) * width * element_bytes
        output_row = row // size  # the all-to-all carries the heads of one rank
        return Traffic(
            forward=gather * row + (sum(lengths) - lengths[rank]) * output_row,
            backward=(reduce + again) * row + (size - 1) * lengths[rank] * output_row,
        )

    def attend(self, attn: Projections, x_BtsD: Tensor, axis: Axis, shard: Shard) -> Tensor:
        return self.branch(attn, x_BtsD, axis, shard, first=None, before=lambda x, _frames: x, then=lambda _x, out: out)

    def branch(
        self, attn: Projections, x_BtsD: Tensor, axis: Axis, shard: Shard, *, first: First | None, before: Before, then: Then
    ) -> Tensor:
        x = x_BtsD if first is None else first(x_BtsD)
        given = before(x, slice(None))
        heads = HeadSlice(attn, rank=shard.rank, size=len(shard.sizes), dtype=compute_dtype(given))
        weight, bias = heads.parameters(attn)
        pieces = [
            _Piece(part, residual, axis, self._gathered(given, axis, shard, heads))
            for part, residual in zip(self._cut(given, axis), self._cut(x, axis), strict=True)
        ]
        # One kind of work on all pieces before the next: what one piece waits for was sent while the others were worked on.
        for piece in pieces:
            piece.issue()
        for piece in pieces:
            piece.project_own(weight, bias)
        for _ in range(2, len(shard.sizes)):
            for piece in pieces:
                piece.project_arrived(weight, bias)
        for piece in pieces:
            piece.project_arrived(weight, bias)
            piece.attend(heads.num, self._transfer(axis, shard))
        heads.drop_rows()
        outs = [piece.finish(attn, then, ranks=len(shard.sizes)) for piece in pieces]
        return outs[0] if len(outs) == 1 else torch.cat(outs, dim=_CUT_DIM[axis])

    def _cut(self, x_BtsD: Tensor, axis: Axis) -> tuple[Tensor, ...]:
        """Views, whose gradients come back in one cat."""
        if axis is Axis.JOINT:
            return (x_BtsD,)
        length = x_BtsD.shape[_CUT_DIM[axis]]
        return torch.split(x_BtsD, list(split_sizes(length, min(self._chunks, length))), dim=_CUT_DIM[axis])

    def _gathered(self, given: Tensor, axis: Axis, shard: Shard, heads: HeadSlice) -> GatheredQkv:
        assert shard.links is not None
        return GatheredQkv(
            shard.links.sp,
            heads,
            lengths=shard.lengths(axis),
            overlap=self._overlap,
            keep=self._keep_gathered,
            sum_dx=given.requires_grad,
            tape=shard.tape,
        )

    def _transfer(self, axis: Axis, shard: Shard) -> Transfer:
        """From whole sequences of this rank's heads to this rank's tokens with all heads."""
        assert shard.links is not None
        lengths = shard.lengths(axis)
        home = [lengths[shard.rank]] * len(lengths)
        return Transfer(shard.links.sp, send_rows=lengths, recv_rows=home, overlap=self._overlap, tape=shard.tape)


class _Piece:
    """Some sequences on their way through one branch.

    Args:
        given: The attention's input of this rank's tokens of them, in the residual layout.
        residual: The residual stream of the same tokens.
        gathered: Unused yet.
    """

    def __init__(self, given: Tensor, residual: Tensor, axis: Axis, gathered: GatheredQkv) -> None:
        self._x, self._residual, self._axis, self._gathered = to_sequences(given, axis), residual, axis, gathered

    def issue(self) -> None:
        """The first hop starts."""
        self._x_lGD = self._gathered.issue(self._x)

    def project_own(self, weight: Tensor, bias: Tensor) -> None:
        """This rank's tokens to its heads."""
        self._qkv_LGE = self._gathered.project_own(self._x_lGD, weight=weight, bias=bias)

    def project_arrived(self, weight: Tensor, bias: Tensor) -> None:
        """One more rank's tokens to this rank's heads, once they are here."""
        self._qkv_LGE = self._gathered.project_arrived(self._qkv_LGE, weight=weight, bias=bias)

    def attend(self, heads: int, transfer: Transfer) -> None:
        """Whole sequences, this rank's heads; the output starts on its way to the ranks of its tokens."""
        L, G, E = self._qkv_LGE.shape
        qkv_LG3nK = self._qkv_LGE.view(L, G, 3, heads, E // (3 * heads))
        del self._qkv_LGE  # without autograd nothing else holds it
        q_GnLK, k_GnLK, v_GnLK = (part.permute(1, 2, 0, 3) for part in qkv_LG3nK.unbind(2))
        out_LGnK = attention(q_GnLK, k_GnLK, v_GnLK).permute(2, 0, 1, 3)
        self._transfer, self._arriving = transfer, transfer.issue(out_LGnK.flatten(2).contiguous())

    def finish(self, attn: Projections, then: Then, *, ranks: int) -> Tensor:
        """The residual stream of these tokens after the branch, once all heads' output is here."""
        own = self._x.shape  # [l, ..., D]
        rows_RGF = self._transfer.wait(self._arriving)
        out_lGD = project_home(attn.proj, [rows_RGF], ranks=ranks)
        out = then(self._residual, from_sequences(out_lGD.view(own), self._axis, like=self._residual))
        return self._gathered.regather(out, x_lGD=self._x_lGD)
