"""A pack: samples of several shapes in one sequence, so that a rank's work has the same size whatever the shapes are.

Tokens of all samples follow each other in one residual stream [1, 1, L, D]. What works on each token by itself sees one long sequence;
an attention stays within a sample (within its frames, or its places across frames), and samples of one shape attend in one call.

Source: NaViT (Patch n' Pack), arXiv 2307.06304; segments of spatial and temporal attention are frames and places of each sample.
"""

# P part: samples of one shape; B samples of a part, t s their local frames and places, L tokens of all parts, G sequences of l tokens,
# D width, C heads x head dim

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import Any

import torch
from torch import Tensor

from opensora_dist.core.types import Axis
from opensora_dist.ops.attention import attention
from opensora_dist.parallel.recompute import Tape
from opensora_dist.parallel.sequence.base import Before, First, Projections, Shard, TensorOrTensors, Then


@dataclass(frozen=True, kw_only=True)
class Part:
    """Samples of one shape in a pack.

    Args:
        shard: This rank's part of each.
        batch: How many.
    """

    shard: Shard
    batch: int

    @property
    def shape(self) -> tuple[int, int, int]:
        """[B, t, s] of their tokens that are here."""
        local = self.shard.region.shape(self.shard.grid)
        return self.batch, local.t, local.h * local.w

    def sequences(self, axis: Axis) -> tuple[int, int]:
        """How many sequences an axis that doesn't cross ranks has, and their length: [G, l]."""
        B, t, s = self.shape
        return {Axis.SPACE: (B * t, s), Axis.TIME: (B * s, t), Axis.JOINT: (B, t * s)}[axis]

    def in_order(self, x_BtsD: Tensor, axis: Axis) -> Tensor:
        """Tokens in the order of these sequences: of time [B, s, t, D]; a view."""
        return x_BtsD.transpose(1, 2) if axis is Axis.TIME else x_BtsD

    def residual(self, x_RD: Tensor, axis: Axis) -> Tensor:
        """Back from ``in_order``, whose dims may be one: [B, t, s, D]."""
        B, t, s = self.shape
        return x_RD.view(B, s, t, -1).transpose(1, 2) if axis is Axis.TIME else x_RD.view(B, t, s, -1)


@dataclass(frozen=True, kw_only=True)
class Pack:
    """What ``Shard`` is for samples of one shape, for a residual stream [1, 1, L, D] of several.

    Sequences that are whole here are attended to while tokens of those that cross ranks travel; the work before and after an attention
    is not overlapped with them.
    """

    parts: tuple[Part, ...]
    tape: Tape | None = None

    def taped(self, tape: Tape | None) -> Pack:
        """As ``Shard.taped``."""
        return replace(self, tape=tape, parts=tuple(replace(part, shard=part.shard.taped(tape)) for part in self.parts))

    def join(self, parts_BtsD: Sequence[Tensor]) -> Tensor:
        """The parts' tokens as one sequence."""
        x_11LD: Tensor = _Join.apply(*parts_BtsD)  # type: ignore[no-untyped-call]
        return x_11LD

    def split(self, x_11LD: Tensor) -> tuple[Tensor, ...]:
        """Back from ``join``: [B, t, s, D] of each part, views."""
        pieces: tuple[Tensor, ...] = _Split.apply(x_11LD, [part.shape for part in self.parts])  # type: ignore[no-untyped-call]
        return pieces

    def each(self, op: Callable[..., TensorOrTensors], *tokens_11LD: Tensor, of: Sequence[Tensor]) -> TensorOrTensors:
        """As ``Shard.each``, part by part: what is of a sample is never written out for each of its tokens."""
        outputs: list[TensorOrTensors] = []
        first = 0
        for part, *pieces in zip(self.parts, *map(self.split, tokens_11LD), strict=True):
            samples = slice(first, first + part.batch)
            outputs.append(op(*pieces, *(values[samples] for values in of)))
            first += part.batch
        if isinstance(outputs[0], Tensor):
            return self.join(outputs)
        one, other = (self.join(pieces) for pieces in zip(*outputs, strict=True))
        return one, other

    def branch(
        self, attn: Projections, x_11LD: Tensor, axis: Axis, *, first: First | None = None, before: Before, then: Then
    ) -> Tensor:
        """As ``Shard.branch``."""
        x = x_11LD if first is None else first(x_11LD)
        input_11LD = before(x, slice(None))
        crossing: dict[str, list[int]] = {}
        for i, part in enumerate(self.parts):
            if part.shard.crosses(axis):
                crossing.setdefault(part.shard.scheme.name, []).append(i)
        if not crossing and axis is not Axis.TIME:  # sequences as they lie in memory
            return then(x, self._attend_in_place(attn, input_11LD, axis))
        inputs = self.split(input_11LD)
        here = sorted({*range(len(self.parts))}.difference(*crossing.values()))
        outputs: dict[int, Tensor] = {}

        def attend_here() -> None:
            if here and not outputs:
                outputs.update(zip(here, _attend_here(attn, [inputs[i] for i in here], axis, [self.parts[i] for i in here])))

        for numbers in crossing.values():
            shards = [self.parts[i].shard for i in numbers]
            attended = shards[0].scheme.attend_parts(attn, [inputs[i] for i in numbers], axis, shards, meanwhile=attend_here)
            outputs.update(zip(numbers, attended, strict=True))
        attend_here()
        return then(x, self.join([outputs[i] for i in range(len(self.parts))]))

    def _attend_in_place(self, attn: Projections, x_11LD: Tensor, axis: Axis) -> Tensor:
        """Nothing crosses ranks, and every sequence lies in one piece: no token is moved."""
        return attn.proj(_attended(attn, x_11LD, [part.sequences(axis) for part in self.parts]))


def _attend_here(attn: Projections, inputs_BtsD: Sequence[Tensor], axis: Axis, parts: Sequence[Part]) -> list[Tensor]:
    """Parts whose sequences are whole on this rank: one projection for all, one attention per shape."""
    in_order = [part.in_order(x, axis) for part, x in zip(parts, inputs_BtsD, strict=True)]
    x_11RD: Tensor = _Join.apply(*in_order)  # type: ignore[no-untyped-call]
    out_11RD = attn.proj(_attended(attn, x_11RD, [part.sequences(axis) for part in parts]))
    rows = torch.split(out_11RD[0, 0], [prod(part.shape) for part in parts])
    return [part.residual(out, axis) for part, out in zip(parts, rows, strict=True)]


def _attended(attn: Projections, x_11RD: Tensor, shapes: Sequence[tuple[int, int]]) -> Tensor:
    """The attentions of sequences that lie one after the other, before the last projection: [1, 1, R, C].

    Args:
        shapes: Sequences of a length, [G, l].
    """
    outputs = []
    qkv_RE = attn.qkv(x_11RD)[0, 0]
    for (G, length), rows_RE in zip(shapes, torch.split(qkv_RE, [G * length for G, length in shapes]), strict=True):
        q, k, v = rows_RE.view(G, length, 3, attn.heads, attn.head_dim).permute(2, 0, 3, 1, 4).unbind(0)
        outputs.append(attention(q, k, v).transpose(1, 2).flatten(2))
    out: Tensor = _Join.apply(*outputs)  # type: ignore[no-untyped-call]
    return out


class _Join(torch.autograd.Function):
    """Tensors [..., D] of any strides as one [1, 1, L, D]: one pass, and in backward none."""

    @staticmethod
    def forward(ctx: Any, *pieces: Tensor) -> Tensor:
        ctx.shapes = [piece.shape for piece in pieces]
        assert len({piece.dtype for piece in pieces}) == 1, [piece.dtype for piece in pieces]
        x_11LD = pieces[0].new_empty((1, 1, sum(piece.shape[:-1].numel() for piece in pieces), pieces[0].shape[-1]))
        for view, piece in zip(_views(x_11LD, ctx.shapes), pieces, strict=True):
            view.copy_(piece)
        return x_11LD

    @staticmethod
    def backward(ctx: Any, grad_11LD: Tensor) -> tuple[Tensor, ...]:
        return tuple(_views(grad_11LD.contiguous(), ctx.shapes))


class _Split(torch.autograd.Function):
    """Views of one sequence, [B, t, s, D] each; in backward one pass, whatever the strides of what comes."""

    @staticmethod
    def forward(ctx: Any, x_11LD: Tensor, shapes: Sequence[tuple[int, int, int]]) -> tuple[Tensor, ...]:
        ctx.shape = x_11LD.shape
        return tuple(_views(x_11LD, [torch.Size((*shape, x_11LD.shape[-1])) for shape in shapes]))

    @staticmethod
    def backward(ctx: Any, *grads_BtsD: Tensor) -> tuple[Tensor, None]:
        grad = grads_BtsD[0].new_empty(ctx.shape)
        for view, piece in zip(_views(grad, [g.shape for g in grads_BtsD]), grads_BtsD, strict=True):
            view.copy_(piece)
        return grad, None


def _views(x_11LD: Tensor, shapes: Sequence[torch.Size]) -> list[Tensor]:
    pieces = torch.split(x_11LD[0, 0], [shape[:-1].numel() for shape in shapes])
    return [piece.view(shape) for piece, shape in zip(pieces, shapes, strict=True)]


Tokens = Shard | Pack
"""The tokens that a block works on."""
