"""A pack: samples of several shapes in one sequence, so that a rank's work has the same size whatever the shapes are.

Tokens of all samples follow each other in one residual stream [1, 1, L, D]. What works on each token by itself sees one long sequence;
an attention stays within a sample (within its frames, or its places across frames), and samples of one shape attend in one call.

Source: NaViT (Patch n' Pack), arXiv 2307.06304; segments of spatial and temporal attention are frames and places of each sample.
"""

# P part: samples of one shape; B samples of a part, t s their local frames and places, L tokens of all parts, G sequences of l tokens,
# D width, C heads x head dim

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from math import prod
from typing import Any

import torch
from torch import Tensor

from opensora_dist.core.types import Axis
from opensora_dist.ops.frames import frames_attention, reads_in_place
from opensora_dist.ops.samples import Ends, packed_attention
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


@dataclass(frozen=True, kw_only=True)
class Pack:
    """What ``Shard`` is for samples of one shape, for a residual stream [1, 1, L, D] of several.

    Sequences that are whole here are attended to while tokens of those that cross ranks travel; the work before and after an attention
    is not overlapped with them.
    """

    parts: tuple[Part, ...]
    tape: Tape | None = None
    ends: Ends = field(default_factory=Ends, compare=False)

    def taped(self, tape: Tape | None) -> Pack:
        """As ``Shard.taped``."""
        return replace(self, tape=tape, parts=tuple(replace(part, shard=part.shard.taped(tape)) for part in self.parts))

    def runs(self, _x_11LD: Tensor) -> list[tuple[int, int]]:
        """As ``Shard.runs``, shape by shape."""
        return [part.sequences(Axis.JOINT) for part in self.parts]

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
        if not crossing and (axis is not Axis.TIME or _reads_in_place(attn, self.parts, input_11LD)):
            return then(x, attn.proj(_attended(attn, input_11LD, axis, self.parts, ends=self.ends)))
        inputs = self.split(input_11LD)
        here = sorted({*range(len(self.parts))}.difference(*crossing.values()))
        outputs: dict[int, Tensor] = {}

        def attend_here() -> None:
            if here and not outputs:
                parts = [self.parts[i] for i in here]
                outputs.update(zip(here, _attend_here(attn, [inputs[i] for i in here], axis, parts, ends=self.ends)))

        for numbers in crossing.values():
            shards = [self.parts[i].shard for i in numbers]
            attended = shards[0].scheme.attend_parts(attn, [inputs[i] for i in numbers], axis, shards, meanwhile=attend_here)
            outputs.update(zip(numbers, attended, strict=True))
        attend_here()
        return then(x, self.join([outputs[i] for i in range(len(self.parts))]))


def _attend_here(
    attn: Projections, inputs_BtsD: Sequence[Tensor], axis: Axis, parts: Sequence[Part], *, ends: Ends
) -> list[Tensor]:
    """Parts whose sequences are whole on this rank: one projection for all, one attention per shape or for all."""
    if axis is not Axis.TIME or _reads_in_place(attn, parts, inputs_BtsD[0]):
        x_11RD: Tensor = _Join.apply(*inputs_BtsD)  # type: ignore[no-untyped-call]
        out_11RD = attn.proj(_attended(attn, x_11RD, axis, parts, ends=ends))
        rows = torch.split(out_11RD[0, 0], [prod(part.shape) for part in parts])
        return [out_RD.view(*part.shape, -1) for part, out_RD in zip(parts, rows, strict=True)]
    x_11RD = _Join.apply(*(x.transpose(1, 2) for x in inputs_BtsD))  # type: ignore[no-untyped-call]
    out_11RD = attn.proj(_of_sequences(attn.qkv(x_11RD), attn, runs=[part.sequences(axis) for part in parts], ends=ends))
    rows = torch.split(out_11RD[0, 0], [prod(part.shape) for part in parts])
    return [
        out_RD.view(B, s, t, -1).transpose(1, 2) for (B, t, s), out_RD in zip((part.shape for part in parts), rows, strict=True)
    ]


def _reads_in_place(attn: Projections, parts: Sequence[Part], x: Tensor) -> bool:
    """Whether attention over frames wants no token moved, of none of the parts."""
    return all(reads_in_place(part.shape[1], x, head_dim=attn.head_dim) for part in parts)


def _attended(attn: Projections, x_11RD: Tensor, axis: Axis, parts: Sequence[Part], *, ends: Ends) -> Tensor:
    """The attentions of tokens that lie as the residual stream has them, before the last projection: [1, 1, R, C]."""
    qkv_11RE = attn.qkv(x_11RD)
    if axis is not Axis.TIME:
        return _of_sequences(qkv_11RE, attn, runs=[part.sequences(axis) for part in parts], ends=ends)
    pieces = torch.split(qkv_11RE[0, 0], [prod(part.shape) for part in parts])
    outs = [
        frames_attention(qkv_RE.view(*part.shape, 3, attn.heads, attn.head_dim))
        for part, qkv_RE in zip(parts, pieces, strict=True)
    ]
    out_11RC: Tensor = _Join.apply(*outs)  # type: ignore[no-untyped-call]
    return out_11RC


def _of_sequences(qkv_11RE: Tensor, attn: Projections, *, runs: Sequence[tuple[int, int]], ends: Ends) -> Tensor:
    qkv_R3NK = qkv_11RE[0, 0].view(-1, 3, attn.heads, attn.head_dim)
    return packed_attention(qkv_R3NK, runs=runs, ends=ends).flatten(1)[None, None]


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
