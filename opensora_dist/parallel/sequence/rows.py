"""Tokens as rows that travel: the places of residuals in blocks, each block one contiguous piece of memory."""

# B batch, t frames, S places, D width; R rows: for one rectangle after the other, [t, samples, places] of it

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

Groups = Sequence[Sequence[range]]
"""Ranges of places of one residual, of all its samples, in groups; each place is in exactly one range."""
Rectangles = Sequence[tuple[range, range]]
"""Samples and places; rows of several lie side by side, frame by frame."""
Blocks = Sequence[Sequence[tuple[int, Rectangles]]]
"""Of several residuals: which of them, and rectangles of its samples and places; each place of a sample is in exactly one."""
_Shape = tuple[int, int, int]


def part(x_BtSD: Tensor, groups: Groups) -> tuple[Tensor, ...]:
    """The rows of each group. Forward and backward are one pass each, where slices would be filled with zeros and summed."""
    return part_all([x_BtSD], _blocks(groups, batch=len(x_BtSD)))


def join(rows_RD: Sequence[Tensor], groups: Groups, *, batch: int) -> Tensor:
    """Back from ``part``: [B, t, S, D]."""
    num_places = sum(len(places) for group in groups for places in group)
    shape = (batch, sum(map(len, rows_RD)) // (batch * num_places), num_places)
    return join_all(rows_RD, _blocks(groups, batch=batch), shapes=[shape])[0]


def part_all(xs_BtSD: Sequence[Tensor], blocks: Blocks) -> tuple[Tensor, ...]:
    """The rows of each block, of residuals of several shapes."""
    out: tuple[Tensor, ...] = _Part.apply(blocks, *xs_BtSD)  # type: ignore[no-untyped-call]
    return out


def join_all(rows_RD: Sequence[Tensor], blocks: Blocks, *, shapes: Sequence[tuple[int, int, int]]) -> tuple[Tensor, ...]:
    """Back from ``part_all``: [B, t, S, D] of each of ``shapes``, which are without D."""
    out: tuple[Tensor, ...] = _Join.apply(blocks, shapes, *rows_RD)  # type: ignore[no-untyped-call]
    return out


def rectangles(sequences: range, *, places: int) -> Rectangles:
    """A range of sequences, place by place and sample by sample, of samples with so many places."""
    if not sequences:
        return []
    (first, begin), (last, end) = divmod(sequences.start, places), divmod(sequences.stop, places)
    if first == last:
        return [(range(first, first + 1), range(begin, end))]
    head = [(range(first, first + 1), range(begin, places))] if begin else []
    tail = [(range(last, last + 1), range(end))] if end else []
    return [*head, (range(first + bool(begin), last), range(places)), *tail]


def _blocks(groups: Groups, *, batch: int) -> Blocks:
    return [[(0, [(range(batch), places)]) for places in group] for group in groups]


class _Part(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, blocks: Blocks, *xs_BtSD: Tensor) -> tuple[Tensor, ...]:
        ctx.blocks, ctx.shapes = blocks, [tuple(x.shape[:3]) for x in xs_BtSD]
        return _pack(xs_BtSD, blocks)

    @staticmethod
    def backward(ctx: Any, *grads_RD: Tensor) -> tuple[Tensor | None, ...]:
        return None, *_unpack(grads_RD, ctx.blocks, ctx.shapes)


class _Join(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, blocks: Blocks, shapes: Sequence[_Shape], *rows_RD: Tensor) -> tuple[Tensor, ...]:
        ctx.blocks = blocks
        return _unpack(rows_RD, blocks, shapes)

    @staticmethod
    def backward(ctx: Any, *grads_BtSD: Tensor) -> tuple[Tensor | None, ...]:
        return None, None, *_pack(grads_BtSD, ctx.blocks)


def _pack(xs_BtSD: Sequence[Tensor], blocks: Blocks) -> tuple[Tensor, ...]:
    shapes: list[_Shape] = [(len(x), x.shape[1], x.shape[2]) for x in xs_BtSD]
    sizes = [sum(shapes[i][1] * _area(of) for i, of in block) for block in blocks]
    # Each its own memory: what one block's rows outlive must not keep the others'.
    rows_RD = tuple(xs_BtSD[0].new_empty((size, xs_BtSD[0].shape[3])) for size in sizes)
    for view_tBsD, i, (samples, places) in _views(rows_RD, blocks, shapes):
        view_tBsD.copy_(xs_BtSD[i][samples.start : samples.stop, :, places.start : places.stop].transpose(0, 1))
    return rows_RD


def _unpack(rows_RD: Sequence[Tensor], blocks: Blocks, shapes: Sequence[_Shape]) -> tuple[Tensor, ...]:
    xs_BtSD = tuple(rows_RD[0].new_empty((*shape, rows_RD[0].shape[1])) for shape in shapes)
    for view_tBsD, i, (samples, places) in _views(rows_RD, blocks, shapes):
        xs_BtSD[i][samples.start : samples.stop, :, places.start : places.stop].copy_(view_tBsD.transpose(0, 1))
    return xs_BtSD


def _area(of: Rectangles) -> int:
    return sum(len(samples) * len(places) for samples, places in of)


def _views(
    rows_RD: Sequence[Tensor], blocks: Blocks, shapes: Sequence[_Shape]
) -> Iterator[tuple[Tensor, int, tuple[range, range]]]:
    """[t, samples, places, D] of each rectangle of each block."""
    for rows, block in zip(rows_RD, blocks, strict=True):
        width = rows.shape[1]
        pieces = torch.split(rows, [shapes[i][1] * _area(of) for i, of in block])
        for piece, (i, of) in zip(pieces, block, strict=True):
            t, start = shapes[i][1], 0
            piece_tnD = piece.view(t, _area(of), width)
            for samples, places in of:
                stop = start + len(samples) * len(places)
                yield piece_tnD[:, start:stop].view(t, len(samples), len(places), width), i, (samples, places)
                start = stop
