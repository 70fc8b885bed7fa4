"""Tokens as rows that travel: the places of a residual in groups, each group one contiguous block of memory."""

# B batch, t frames, S places, D width; R rows: for one range of places after the other, [t, B, places of the range]

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

Groups = Sequence[Sequence[range]]
"""Ranges of places, in groups; each place is in exactly one range."""


def part(x_BtSD: Tensor, groups: Groups) -> tuple[Tensor, ...]:
    """The rows of each group. Forward and backward are one pass each, where slices would be filled with zeros and summed."""
    out: tuple[Tensor, ...] = _Part.apply(x_BtSD, groups)  # type: ignore[no-untyped-call]
    return out


def join(rows_RD: Sequence[Tensor], groups: Groups, *, batch: int) -> Tensor:
    """Back from ``part``: [B, t, S, D]."""
    out: Tensor = _Join.apply(groups, batch, *rows_RD)  # type: ignore[no-untyped-call]
    return out


class _Part(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_BtSD: Tensor, groups: Groups) -> tuple[Tensor, ...]:
        ctx.groups, ctx.batch = groups, len(x_BtSD)
        return _pack(x_BtSD, groups)

    @staticmethod
    def backward(ctx: Any, *grads_RD: Tensor) -> tuple[Tensor, None]:
        return _unpack(grads_RD, ctx.groups, batch=ctx.batch), None


class _Join(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, groups: Groups, batch: int, *rows_RD: Tensor) -> Tensor:
        ctx.groups = groups
        return _unpack(rows_RD, groups, batch=batch)

    @staticmethod
    def backward(ctx: Any, grad_BtSD: Tensor) -> tuple[Tensor | None, ...]:
        return None, None, *_pack(grad_BtSD, ctx.groups)


def _pack(x_BtSD: Tensor, groups: Groups) -> tuple[Tensor, ...]:
    B, t, _, D = x_BtSD.shape
    # Each its own memory: what one group's rows outlive must not keep the others'.
    blocks = [x_BtSD.new_empty((t * B * sum(map(len, group)), D)) for group in groups]
    for rows_RD, group in zip(blocks, groups):
        for view_tBsD, places in zip(_views(rows_RD, group, frames=t, batch=B), group):
            view_tBsD.copy_(x_BtSD[:, :, places.start : places.stop].transpose(0, 1))
    return tuple(blocks)


def _unpack(rows_RD: Sequence[Tensor], groups: Groups, *, batch: int) -> Tensor:
    num_places, D = sum(len(places) for group in groups for places in group), rows_RD[0].shape[1]
    frames = sum(map(len, rows_RD)) // (batch * num_places)
    x_BtSD = rows_RD[0].new_empty((batch, frames, num_places, D))
    for rows, group in zip(rows_RD, groups):
        for view_tBsD, places in zip(_views(rows, group, frames=frames, batch=batch), group):
            x_BtSD[:, :, places.start : places.stop].copy_(view_tBsD.transpose(0, 1))
    return x_BtSD


def _views(rows_RD: Tensor, group: Sequence[range], *, frames: int, batch: int) -> list[Tensor]:
    """[t, B, places, D] of each range of a group."""
    blocks = torch.split(rows_RD, [frames * batch * len(places) for places in group])
    return [block.view(frames, batch, len(places), block.shape[1]) for block, places in zip(blocks, group)]
