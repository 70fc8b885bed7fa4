"""What ranks that share the linears of a block send each other: one sum in forward, one in backward, per branch.

A branch of the residual stream begins with ``enter`` and ends with ``leave``. Between them each rank computes with its heads or its
hidden units; before and after, all ranks hold the same values, bit for bit, and so do the gradients.

Source: Megatron-LM, arXiv 1909.08053 (f and g of its figure 3).
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor

from opensora_dist.parallel.recompute import Tape
from opensora_dist.parallel.sequence.base import cast
from opensora_dist.parallel.sequence.exchange import Exchange


class Summed(Protocol):
    """The linear at the end of a branch, whose outputs are summed over ranks."""

    summed_bias: Tensor
    """Added once, after the sum."""


class TensorGroup:
    """The ranks that share this rank's linears.

    Args:
        exchange: Their group; None for linears that are whole on this rank, where both ends of a branch are the identity.
    """

    def __init__(self, exchange: Exchange | None) -> None:
        self._exchange = exchange

    @property
    def alone(self) -> bool:
        """Whether linears are whole here, and nothing is sent."""
        return self._exchange is None

    def enter(self, x: Tensor) -> Tensor:
        """The input of column-wise linears, as they compute with it; in backward, the sum over ranks of what each gives for it."""
        if self._exchange is None:
            return x
        out: Tensor = _Enter.apply(cast(x), self._exchange)  # type: ignore[no-untyped-call]
        return out

    def leave(self, part: Tensor, linear: Any, *, tape: Tape | None) -> Tensor:
        """The sum over ranks of what a row-wise linear gives on each, and its bias.

        Args:
            part: The output of ``linear`` (``Summed``, where there is more than one rank).
            tape: Of the region under recomputation, if one is. It keeps the sum: a replay sends nothing.
        """
        if self._exchange is None:
            return part
        total: Tensor = _Leave.apply(part, self._exchange, tape)  # type: ignore[no-untyped-call]
        bias: Tensor = linear.summed_bias
        return total + bias.to(total.dtype)


ALONE = TensorGroup(None)
"""Every linear is whole on this rank."""


def _sum(part: Tensor, exchange: Exchange) -> Tensor:
    """A new tensor; ``part`` may be held elsewhere, too."""
    total = part.clone(memory_format=torch.contiguous_format)
    # Ranks of the group hold the same tokens, so that none or all of them hold none.
    return exchange.all_reduce(total).wait() if total.numel() else total


class _Enter(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, exchange: Exchange) -> Tensor:
        ctx.exchange = exchange
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _sum(grad, ctx.exchange), None


class _Leave(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, part: Tensor, exchange: Exchange, tape: Tape | None) -> Tensor:
        if tape is not None and tape.replaying:
            kept: Tensor = tape.replay()
            return kept
        total = _sum(part, exchange)
        return total if tape is None else tape.keep(total)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return grad, None, None
