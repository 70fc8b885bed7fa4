"""Megatron-LM's sequence parallelism around the crossing attention: tokens are gathered whole, and partial sums scattered. Blocking.

The baseline that the other schemes are measured against.
"""

# B batch, T frames, S places, D width, N heads, K head dim; G sequences, L tokens of one; l: those here, n: heads of a rank, P ranks

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from opensora_dist.core.types import Axis, Thw
from opensora_dist.ops.attention import attention
from opensora_dist.parallel.recompute import Tape
from opensora_dist.parallel.sequence.base import Projections, Scheme, Shard, Traffic, cast, from_sequences, ranges, to_sequences
from opensora_dist.parallel.sequence.exchange import Exchange
from opensora_dist.parallel.sequence.heads import heads_problems, rows_of_heads


class AllGather(Scheme):
    """All-gather of x, projections and attention with heads / P heads, reduce-scatter of the output projection's partial sums.

    Backward gathers the gradient, scatters dx, and gathers x again for the gradient of the weight: x gathered would be P times x to keep.

    Under recomputation q, k, v of this rank's heads (3 l G D elements where ranks hold as many tokens) and the output of its tokens
    (l G D) are kept.

    Source: Megatron-LM sequence parallelism, arXiv 2205.05198.
    """

    name = "allgather"

    def problems(self, grid: Thw, *, size: int, heads: int, joint: bool) -> list[str]:
        return heads_problems(self.name, size=size, heads=heads, joint=joint)

    def bytes_sent(self, shard: Shard, axis: Axis, *, batch: int, width: int, element_bytes: int) -> Traffic:
        lengths = shard.lengths(axis)
        mine = lengths[shard.rank]
        row_bytes = shard.num_sequences(axis, batch=batch) * width * element_bytes
        gather = mine * (len(lengths) - 1) * row_bytes
        scatter = (sum(lengths) - mine) * row_bytes
        return Traffic(forward=gather + scatter, backward=gather + scatter + gather)

    def attend(self, attn: Projections, x_BtsD: Tensor, axis: Axis, shard: Shard) -> Tensor:
        assert shard.links is not None
        meeting = _Meeting(exchange=shard.links.sp, lengths=shard.lengths(axis), tape=shard.tape)
        rank, size = shard.rank, len(shard.sizes)
        qkv_weight, qkv_bias, proj_weight = map(cast, (attn.qkv.weight, attn.qkv.bias, attn.proj.weight))
        own_weight, own_bias = (rows_of_heads(parameter, rank=rank, size=size) for parameter in (qkv_weight, qkv_bias))
        x_lGD = cast(to_sequences(x_BtsD, axis))
        qkv: Tensor = _GatherProject.apply(x_lGD, own_weight, own_bias, meeting)  # type: ignore[no-untyped-call]
        q_LGnK, k_LGnK, v_LGnK = qkv.view(len(qkv), -1, 3, attn.heads // size, attn.head_dim).unbind(2)
        out_GnLK = attention(*(part.permute(1, 2, 0, 3) for part in (q_LGnK, k_LGnK, v_LGnK)))
        out = out_GnLK.permute(2, 0, 1, 3).reshape(*qkv.shape[:-1], -1)  # [L, G.., n K]
        own_columns = proj_weight.view(len(proj_weight), size, -1)[:, rank]
        y_lGD: Tensor = _ProjectScatter.apply(out, own_columns, meeting)  # type: ignore[no-untyped-call]
        y_lGD = y_lGD if attn.proj.bias is None else y_lGD + cast(attn.proj.bias)
        return from_sequences(y_lGD, axis, like=x_BtsD)


@dataclass(frozen=True, kw_only=True)
class _Meeting:
    """How the tokens of one attention come together, and part.

    Gathered rows are of the other ranks, in their order, and then this rank's own: what a scatter sends is then one block, and the
    rank's own part needs no transfer. Attention doesn't mind the order, as long as all of one rank is in the same.
    """

    exchange: Exchange
    lengths: tuple[int, ...]
    tape: Tape | None

    @cached_property
    def others(self) -> list[int]:
        """Rows of the other ranks; 0 in place of this one's."""
        return [0 if r == self.exchange.rank else n for r, n in enumerate(self.lengths)]

    def gather(self, x_lGD: Tensor) -> Tensor:
        """[l, G.., D] of every rank to [L, G.., D]."""
        x_LGD = x_lGD.new_empty((sum(self.lengths), *x_lGD.shape[1:]))
        own_lGD = x_LGD[sum(self.others) :]
        own_lGD.copy_(x_lGD)
        parts = [own_lGD if r == self.exchange.rank else x_LGD[p.start : p.stop] for r, p in enumerate(ranges(self.others))]
        self.exchange.gather(own_lGD, parts=parts).wait()
        return x_LGD

    def scatter(self, partial_LGD: Tensor) -> Tensor:
        """[L, G.., D] of every rank to the sums over ranks, [l, G.., D] of the tokens here."""
        send, own_lGD = torch.split(partial_LGD, [sum(self.others), self.lengths[self.exchange.rank]])
        mine = [0 if r == self.exchange.rank else len(own_lGD) for r in range(len(self.lengths))]
        received = self.exchange.all_to_all(send, send_rows=self.others, recv_rows=mine).wait()
        return received.view(-1, *own_lGD.shape).sum(0).add_(own_lGD)

    def once(self, make: Callable[[], Tensor]) -> Tensor:
        """What ``make`` gives, which communicates: kept in a first run for later ones, in which nothing is sent."""
        if self.tape is None:
            return make()
        return self.tape.replay() if self.tape.replaying else self.tape.keep(make())


class _GatherProject(torch.autograd.Function):
    """q, k, v of all tokens, for the heads whose weights are given."""

    @staticmethod
    def forward(ctx: Any, x_lGD: Tensor, weight_ED: Tensor, bias_E: Tensor, meeting: _Meeting) -> Tensor:
        ctx.save_for_backward(x_lGD, weight_ED)
        ctx.meeting = meeting
        return meeting.once(lambda: F.linear(meeting.gather(x_lGD), weight_ED, bias_E))

    @staticmethod
    def backward(ctx: Any, grad_LGE: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        x_lGD, weight_ED = ctx.saved_tensors
        dx_lGD = ctx.meeting.scatter(grad_LGE @ weight_ED)
        grad_RE = grad_LGE.flatten(0, -2)
        x_RD = ctx.meeting.gather(x_lGD).flatten(0, -2)
        return dx_lGD, grad_RE.mT @ x_RD, grad_RE.sum(0), None


class _ProjectScatter(torch.autograd.Function):
    """The output projection of tokens here, from all tokens with the heads whose weights are given; without the bias."""

    @staticmethod
    def forward(ctx: Any, x_LGC: Tensor, weight_DC: Tensor, meeting: _Meeting) -> Tensor:
        ctx.save_for_backward(x_LGC, weight_DC)
        ctx.meeting = meeting
        return meeting.once(lambda: meeting.scatter(F.linear(x_LGC, weight_DC)))

    @staticmethod
    def backward(ctx: Any, grad_lGD: Tensor) -> tuple[Tensor, Tensor, None]:
        x_LGC, weight_DC = ctx.saved_tensors
        grad_LGD = ctx.meeting.gather(grad_lGD)
        return grad_LGD @ weight_DC, grad_LGD.flatten(0, -2).mT @ x_LGC.flatten(0, -2), None
