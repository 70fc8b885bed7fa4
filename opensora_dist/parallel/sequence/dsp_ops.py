"""The nodes of autograd that ``dsp`` is made of: one projection of what is here and what arrives, and outputs as rows that leave."""

# R rows, D width, C heads x head dim, E = 3 C, G sequences of T tokens

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from opensora_dist.ops.precision import compute_dtype
from opensora_dist.parallel.sequence.base import Projections
from opensora_dist.parallel.sequence.transfer import Transfer

Spans = Sequence[Sequence[tuple[int, slice]]]
"""Blocks of rows: which output, and tokens of each of its sequences."""


def cat(tensors: Sequence[Tensor], *, dim: int) -> Tensor:
    """Without a copy of one tensor."""
    return tensors[0] if len(tensors) == 1 else torch.cat(list(tensors), dim=dim)


def project(attn: Projections, own_RD: Sequence[Tensor], arriving: Sequence[tuple[Tensor, Transfer]]) -> Tensor:
    """QKV of own rows, computed while others are on their way, and of those after them: [R, E]."""
    dtype = compute_dtype(arriving[0][0])
    weight, bias = attn.qkv.weight.to(dtype), attn.qkv.bias.to(dtype)
    shared = _Shared()
    num_arriving = sum(len(arriving_RD) for arriving_RD, _ in arriving)
    qkv_RE: Tensor = _ProjectOwn.apply(cat(own_RD, dim=0).to(dtype), weight, bias, num_arriving, shared)  # type: ignore[no-untyped-call]
    for arriving_RD, transfer in arriving:
        qkv_RE = _ProjectRest.apply(qkv_RE, transfer.wait(arriving_RD), weight, bias, shared)  # type: ignore[no-untyped-call]
    shared.out_RE = None  # the nodes hold ``shared`` until backward, and under recomputation nothing is to be kept
    return qkv_RE


def leave(outs_GTC: Sequence[Tensor], blocks: Spans) -> tuple[Tensor, ...]:
    """The outputs of whole sequences as rows, tokens outermost, block by block; one pass, and one in backward."""
    out: tuple[Tensor, ...] = _Leave.apply(blocks, *outs_GTC)  # type: ignore[no-untyped-call]
    return out


class _Shared:
    """What the nodes of one QKV projection share: in forward their output, in backward the rest's part of the weight gradient."""

    def __init__(self) -> None:
        self.out_RE: Tensor | None = None
        self.rest: list[tuple[Tensor, Tensor]] = []


class _ProjectOwn(torch.autograd.Function):
    """QKV of own tokens, into the head of the buffer of all; in backward also the weight gradient of the rest.

    So the transfer back is started before any weight gradient is computed, and has all of them to hide under.
    """

    @staticmethod
    def forward(ctx: Any, own_RD: Tensor, weight: Tensor, bias: Tensor, num_arriving: int, shared: _Shared) -> Tensor:
        ctx.save_for_backward(own_RD, weight)
        ctx.shared = shared
        shared.out_RE = own_RD.new_empty((len(own_RD) + num_arriving, len(weight)))
        return torch.addmm(bias, own_RD, weight.t(), out=shared.out_RE[: len(own_RD)])

    @staticmethod
    def backward(ctx: Any, grad_RE: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
        own_RD, weight = ctx.saved_tensors
        rest, ctx.shared.rest = ctx.shared.rest, []
        grad_weight, grad_bias = torch.mm(grad_RE.t(), own_RD), grad_RE.sum(0)
        for grad_rest_RE, rest_RD in rest:
            grad_weight.addmm_(grad_rest_RE.t(), rest_RD)
            grad_bias += grad_rest_RE.sum(0)
        return torch.mm(grad_RE, weight), grad_weight, grad_bias, None, None


class _ProjectRest(torch.autograd.Function):
    """QKV of tokens that arrived, into the buffer after what is there; gives the buffer up to their end."""

    @staticmethod
    def forward(ctx: Any, before_RE: Tensor, rest_RD: Tensor, weight: Tensor, bias: Tensor, shared: _Shared) -> Tensor:
        ctx.save_for_backward(rest_RD, weight)
        ctx.shared, ctx.start = shared, len(before_RE)
        assert shared.out_RE is not None
        end = ctx.start + len(rest_RD)
        torch.addmm(bias, rest_RD, weight.t(), out=shared.out_RE[ctx.start : end])
        return shared.out_RE[:end]

    @staticmethod
    def backward(ctx: Any, grad_RE: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
        rest_RD, weight = ctx.saved_tensors
        grad_rest_RE = grad_RE[ctx.start :]
        ctx.shared.rest.append((grad_rest_RE, rest_RD))
        return grad_RE[: ctx.start], torch.mm(grad_rest_RE, weight), None, None, None


class _Leave(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, blocks: Spans, *outs_GTC: Tensor) -> tuple[Tensor, ...]:
        ctx.blocks, ctx.shapes = blocks, [out.shape for out in outs_GTC]
        sizes = [sum(len(outs_GTC[i]) * (span.stop - span.start) for i, span in block) for block in blocks]
        rows_RC = tuple(outs_GTC[0].new_empty((size, outs_GTC[0].shape[2])) for size in sizes)
        for view_tGC, i, span in _views(rows_RC, blocks, ctx.shapes):
            view_tGC.copy_(outs_GTC[i][:, span].transpose(0, 1))
        return rows_RC

    @staticmethod
    def backward(ctx: Any, *grads_RC: Tensor) -> tuple[Tensor | None, ...]:
        grads_GTC = [grads_RC[0].new_empty(shape) for shape in ctx.shapes]
        for view_tGC, i, span in _views(grads_RC, ctx.blocks, ctx.shapes):
            grads_GTC[i][:, span] = view_tGC.transpose(0, 1)
        return None, *grads_GTC


def _views(rows_RC: Sequence[Tensor], blocks: Spans, shapes: Sequence[torch.Size]) -> Iterator[tuple[Tensor, int, slice]]:
    """[tokens, G, C] of each span of each block."""
    for rows, block in zip(rows_RC, blocks, strict=True):
        pieces = torch.split(rows, [shapes[i][0] * (span.stop - span.start) for i, span in block])
        for piece, (i, span) in zip(pieces, block, strict=True):
            yield piece.view(span.stop - span.start, shapes[i][0], rows.shape[1]), i, span
