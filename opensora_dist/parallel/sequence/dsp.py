"""DSP: the residual stays sharded; tokens change rank for the one attention that crosses the sharded dim, and come back.

Said for frames (``Axis.TIME``): a rank holds all places of t frames, and attends over all T frames of the places that it *owns*. So
its tokens are of two kinds: the *own*, at places it owns, which never travel, and the *rest*. The rest leave first; own tokens are
projected while they are on their way. After the attention, the output for other ranks' frames is projected and leaves first; own
tokens then go through the rest of the block meanwhile. Backward is the mirror image. For a shard by rows, read rows and frames in
place of frames and places.
"""

# B batch, T frames, S places, D width, N heads, K head dim; t: frames held here, s: places owned here, G = B * s
# R rows: tokens as they travel, [t, B, places] of one owner after the other

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from opensora_dist.core.types import Axis, Thw
from opensora_dist.ops.attention import attention
from opensora_dist.parallel.sequence.base import Before, First, Projections, Scheme, Shard, Then, Traffic, split_sizes
from opensora_dist.parallel.sequence.transfer import Transfer


class Dsp(Scheme):
    """Dynamic sequence parallelism, its transfers hidden under the block's own work.

    Args:
        overlap: False is the published form, which waits for each transfer; with the same bytes.

    Source: DSP, arXiv 2403.10266; the overlap is ours.
    """

    name = "dsp"

    def __init__(self, *, overlap: bool) -> None:
        self._overlap = overlap

    def problems(self, grid: Thw, *, size: int, heads: int, joint: bool) -> list[str]:
        if not joint:
            return []
        return [
            "parallel.sp.scheme=dsp needs attention in two parts, over space and over time, and model.name=dit attends over both at "
            "once; use parallel.sp.scheme=ring or ulysses, or model.name=stdit"
        ]

    def bytes_sent(self, shard: Shard, axis: Axis, *, batch: int, width: int, element_bytes: int) -> Traffic:
        lengths, rank = shard.lengths(axis), shard.rank
        owned = split_sizes(shard.num_sequences(axis, batch=1), len(lengths))
        # To the owners of the sequences, and back the output of the sequences owned here.
        tokens = lengths[rank] * (sum(owned) - owned[rank]) + (sum(lengths) - lengths[rank]) * owned[rank]
        sent = batch * tokens * width * element_bytes
        return Traffic(forward=sent, backward=sent)

    def attend(self, attn: Projections, x_BtsD: Tensor, axis: Axis, shard: Shard) -> Tensor:
        return self._run(attn, x_BtsD, x_BtsD, axis, shard, then=lambda _x, out: out)

    def branch(
        self, attn: Projections, x_BtsD: Tensor, axis: Axis, shard: Shard, *, first: First | None, before: Before, then: Then
    ) -> Tensor:
        if not self._overlap:
            return super().branch(attn, x_BtsD, axis, shard, first=first, before=before, then=then)
        x = x_BtsD if first is None else first(x_BtsD)
        return self._run(attn, x, before(x, slice(None)), axis, shard, then=then)

    def _run(self, attn: Projections, x_BtsD: Tensor, input_BtsD: Tensor, axis: Axis, shard: Shard, *, then: Then) -> Tensor:
        """``then(x, attended(input))``, own tokens and the rest apart."""
        if axis is Axis.SPACE:  # the sharded dim first, the one to own second
            same, x_BtsD = input_BtsD is x_BtsD, x_BtsD.transpose(1, 2)
            input_BtsD = x_BtsD if same else input_BtsD.transpose(1, 2)
        assert shard.links is not None
        B, t, S, D = x_BtsD.shape
        exchange, lengths = shard.links.sp, shard.lengths(axis)
        owners = _Owners(batch=B, held=t, sizes=split_sizes(S, exchange.size), rank=exchange.rank)
        rows_in = [0 if r == exchange.rank else length * B * owners.own for r, length in enumerate(lengths)]
        there = Transfer(exchange, send_rows=owners.rows, recv_rows=rows_in, overlap=self._overlap, tape=shard.tape)
        back = Transfer(exchange, send_rows=rows_in, recv_rows=owners.rows, overlap=self._overlap, tape=shard.tape)

        rest_RD, own_RD = _Part.apply(x_BtsD, owners)  # type: ignore[no-untyped-call]
        sent_RD, kept_RD = (rest_RD, own_RD) if input_BtsD is x_BtsD else _Part.apply(input_BtsD, owners)  # type: ignore[no-untyped-call]
        weight, bias, (sent_RD, kept_RD) = _computed_in(attn.qkv, sent_RD, kept_RD)
        arriving_RD = there.issue(sent_RD)
        qkv = _Qkv()
        own_RE = _ProjectOwn.apply(kept_RD, weight, bias, len(arriving_RD), qkv)  # type: ignore[no-untyped-call]
        qkv_RE = _ProjectRest.apply(own_RE, there.wait(arriving_RD), weight, bias, qkv)  # type: ignore[no-untyped-call]

        q_GNTK, k_GNTK, v_GNTK = (
            qkv_RE.view(sum(lengths), B * owners.own, 3, attn.heads, D // attn.heads).permute(2, 1, 3, 0, 4).unbind(0)
        )
        out_GTD = attention(q_GNTK, k_GNTK, v_GNTK).transpose(1, 2).flatten(2)
        out_own_RD, out_rest_RD = _Leave.apply(out_GTD, t)  # type: ignore[no-untyped-call]
        arriving_RD = back.issue(attn.proj(out_rest_RD))
        done_own_RD = owners.apply_own(then, own_RD, attn.proj(out_own_RD))
        done_rest_RD = owners.apply_rest(then, rest_RD, back.wait(arriving_RD))
        out: Tensor = _Join.apply(done_rest_RD, done_own_RD, owners)  # type: ignore[no-untyped-call]
        return out.transpose(1, 2) if axis is Axis.SPACE else out


class _Owners:
    """How this rank's tokens [B, t, S, D] part into rows by the owner of their place.

    Args:
        batch: B.
        held: t.
        sizes: Places of each owner.
        rank: This one.
    """

    def __init__(self, *, batch: int, held: int, sizes: Sequence[int], rank: int) -> None:
        self.batch, self.held, self.sizes, self.rank = batch, held, list(sizes), rank
        self.own = self.sizes[rank]
        self.rows = [0 if p == rank else held * batch * size for p, size in enumerate(sizes)]

    def part(self, x_BtSD: Tensor) -> tuple[Tensor, Tensor]:
        """The rest and the own tokens, as rows; one pass over ``x``."""
        rows_RD = x_BtSD.new_empty((x_BtSD.numel() // x_BtSD.shape[-1], x_BtSD.shape[-1]))
        rest_RD, own_RD = torch.split(rows_RD, [sum(self.rows), len(rows_RD) - sum(self.rows)])
        for view_tBsD, place_BtsD in zip(self._views(rest_RD, own_RD), torch.split(x_BtSD, self.sizes, dim=2)):
            view_tBsD.copy_(place_BtsD.transpose(0, 1))
        return rest_RD, own_RD

    def join(self, rest_RD: Tensor, own_RD: Tensor) -> Tensor:
        """Back from ``part``; one pass."""
        x_BtSD = rest_RD.new_empty((self.batch, self.held, sum(self.sizes), rest_RD.shape[-1]))
        for view_tBsD, place_BtsD in zip(self._views(rest_RD, own_RD), torch.split(x_BtSD, self.sizes, dim=2)):
            place_BtsD.copy_(view_tBsD.transpose(0, 1))
        return x_BtSD

    def apply_own(self, then: Then, x_RD: Tensor, out_RD: Tensor) -> Tensor:
        """``then`` on own tokens."""
        return self._apply(then, x_RD, out_RD, size=self.own)

    def apply_rest(self, then: Then, x_RD: Tensor, out_RD: Tensor) -> Tensor:
        """``then`` on the rest: at once for one sample, owner by owner where samples alternate in the rows."""
        if self.batch == 1:
            return self._apply(then, x_RD, out_RD, size=sum(self.sizes) - self.own)
        parts = zip(torch.split(x_RD, self.rows), torch.split(out_RD, self.rows), self.sizes)
        return torch.cat([self._apply(then, x, out, size=size) for p, (x, out, size) in enumerate(parts) if p != self.rank])

    def _apply(self, then: Then, x_RD: Tensor, out_RD: Tensor, *, size: int) -> Tensor:
        B, t, D = self.batch, self.held, x_RD.shape[-1]
        if B == 1:  # rows of several owners don't make places in order, and needn't: `then` takes each token by itself
            return then(x_RD.view(1, t, size, D), out_RD.view(1, t, size, D)).reshape(-1, D)
        x_BtsD, out_BtsD = (rows.view(t, B, size, D).transpose(0, 1) for rows in (x_RD, out_RD))
        return then(x_BtsD, out_BtsD).transpose(0, 1).reshape(-1, D)

    def _views(self, rest_RD: Tensor, own_RD: Tensor) -> list[Tensor]:
        """[t, B, places, D] of each owner, in order."""
        blocks = [own_RD if p == self.rank else block for p, block in enumerate(torch.split(rest_RD, self.rows))]
        return [block.view(self.held, self.batch, size, block.shape[-1]) for block, size in zip(blocks, self.sizes)]


def _computed_in(linear: torch.nn.Linear, *inputs: Tensor) -> tuple[Tensor, Tensor | None, tuple[Tensor, ...]]:
    """Weight, bias and inputs in the dtype that autocast would compute them in, so that this is what travels."""
    device = inputs[0].device.type
    if not torch.is_autocast_enabled(device):
        return linear.weight, linear.bias, inputs
    dtype = torch.get_autocast_dtype(device)
    return linear.weight.to(dtype), linear.bias.to(dtype), tuple(x.to(dtype) for x in inputs)


class _Part(torch.autograd.Function):
    """``_Owners.part``, whose gradient is one pass and not a sum of zero-filled slices."""

    @staticmethod
    def forward(ctx: Any, x_BtSD: Tensor, owners: _Owners) -> tuple[Tensor, Tensor]:
        ctx.owners = owners
        return owners.part(x_BtSD)

    @staticmethod
    def backward(ctx: Any, grad_rest_RD: Tensor, grad_own_RD: Tensor) -> tuple[Tensor, None]:
        return ctx.owners.join(grad_rest_RD, grad_own_RD), None


class _Join(torch.autograd.Function):
    """``_Owners.join``."""

    @staticmethod
    def forward(ctx: Any, rest_RD: Tensor, own_RD: Tensor, owners: _Owners) -> Tensor:
        ctx.owners = owners
        return owners.join(rest_RD, own_RD)

    @staticmethod
    def backward(ctx: Any, grad_BtSD: Tensor) -> tuple[Tensor, Tensor, None]:
        return *ctx.owners.part(grad_BtSD), None


class _Qkv:
    """What the two halves of one QKV projection share: in forward their output, in backward the rest's part of the weight gradient."""

    out_RE: Tensor | None = None
    rest: tuple[Tensor, Tensor] | None = None


class _ProjectOwn(torch.autograd.Function):
    """QKV of own tokens, into the head of the buffer of all; in backward also the weight gradient of the rest.

    So the transfer back is started before any weight gradient is computed, and has all of them to hide under.
    """

    @staticmethod
    def forward(ctx: Any, own_RD: Tensor, weight: Tensor, bias: Tensor | None, rest_rows: int, qkv: _Qkv) -> Tensor:
        ctx.save_for_backward(own_RD, weight)
        ctx.qkv, ctx.has_bias = qkv, bias is not None
        qkv.out_RE = own_RD.new_empty((len(own_RD) + rest_rows, len(weight)))
        return _linear_into(qkv.out_RE[: len(own_RD)], own_RD, weight, bias)

    @staticmethod
    def backward(ctx: Any, grad_RE: Tensor) -> tuple[Tensor, Tensor, Tensor | None, None, None]:
        own_RD, weight = ctx.saved_tensors
        (grad_rest_RE, rest_RD), ctx.qkv.rest = ctx.qkv.rest, None
        grad_weight = torch.mm(grad_RE.t(), own_RD).addmm_(grad_rest_RE.t(), rest_RD)
        grad_bias = grad_RE.sum(0) + grad_rest_RE.sum(0) if ctx.has_bias else None
        return torch.mm(grad_RE, weight), grad_weight, grad_bias, None, None


class _ProjectRest(torch.autograd.Function):
    """QKV of the tokens that arrived, into the tail of the buffer; gives the whole buffer."""

    @staticmethod
    def forward(ctx: Any, own_RE: Tensor, rest_RD: Tensor, weight: Tensor, bias: Tensor | None, qkv: _Qkv) -> Tensor:
        ctx.save_for_backward(rest_RD, weight)
        ctx.qkv, ctx.num_own = qkv, len(own_RE)
        out_RE, qkv.out_RE = qkv.out_RE, None
        assert out_RE is not None
        _linear_into(out_RE[ctx.num_own :], rest_RD, weight, bias)
        return out_RE

    @staticmethod
    def backward(ctx: Any, grad_RE: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
        rest_RD, weight = ctx.saved_tensors
        grad_own_RE, grad_rest_RE = grad_RE[: ctx.num_own], grad_RE[ctx.num_own :]
        ctx.qkv.rest = (grad_rest_RE, rest_RD)
        return grad_own_RE, torch.mm(grad_rest_RE, weight), None, None, None


def _linear_into(out_RE: Tensor, x_RD: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    if bias is None:
        return torch.mm(x_RD, weight.t(), out=out_RE)
    return torch.addmm(bias, x_RD, weight.t(), out=out_RE)


class _Leave(torch.autograd.Function):
    """The output of whole sequences as rows: of the first ``held`` positions, which are this rank's, and of the others."""

    @staticmethod
    def forward(ctx: Any, out_GTD: Tensor, held: int) -> tuple[Tensor, Tensor]:
        ctx.held, ctx.rest = held, out_GTD.shape[1] - held
        own_tGD, rest_TGD = out_GTD[:, :held].transpose(0, 1), out_GTD[:, held:].transpose(0, 1)
        return own_tGD.reshape(-1, out_GTD.shape[2]), rest_TGD.reshape(-1, out_GTD.shape[2])

    @staticmethod
    def backward(ctx: Any, grad_own_RD: Tensor, grad_rest_RD: Tensor) -> tuple[Tensor, None]:
        rows, D = grad_own_RD.shape
        own_GtD = grad_own_RD.view(ctx.held, rows // ctx.held, D).transpose(0, 1)
        rest_GTD = grad_rest_RD.view(ctx.rest, rows // ctx.held, D).transpose(0, 1)
        return torch.cat([own_GtD, rest_GTD], dim=1), None
