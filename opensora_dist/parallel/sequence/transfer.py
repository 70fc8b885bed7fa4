"""An all-to-all as two autograd nodes, so that whatever a scheme runs between them hides it, in forward and in backward.

``issue`` starts a transfer and ``wait`` ends it. In backward ``wait`` starts the way back and ``issue`` ends it: autograd runs nodes in
the reverse order of their making, so the work that hid the transfer on the way there hides it on the way back, without more being
said.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from opensora_dist.parallel.recompute import Tape
from opensora_dist.parallel.sequence.exchange import Exchange, Pending


class Transfer:
    """One all-to-all of one forward, and its way back. ``issue`` once, ``wait`` once.

    Args:
        exchange: The group.
        send_rows: Rows for each rank.
        recv_rows: Rows from each rank.
        overlap: False waits as soon as a transfer is started: the blocking form, with the same bytes.
        tape: Of the region under recomputation, if one is.
    """

    def __init__(
        self, exchange: Exchange, *, send_rows: Sequence[int], recv_rows: Sequence[int], overlap: bool, tape: Tape | None
    ) -> None:
        self._exchange, self._overlap, self._tape = exchange, overlap, tape
        self._send_rows, self._recv_rows = tuple(send_rows), tuple(recv_rows)
        self._there: Pending | None = None
        self._back: Pending | None = None

    def issue(self, send_RD: Tensor) -> Tensor:
        """Starts sending rows; gives the tensor they arrive in, which is not to be read before ``wait``."""
        out: Tensor = _Issue.apply(send_RD, self)  # type: ignore[no-untyped-call]
        return out

    def wait(self, arriving_RD: Tensor) -> Tensor:
        """What has arrived."""
        out: Tensor = _Wait.apply(arriving_RD, self)  # type: ignore[no-untyped-call]
        return out

    def _start(self, send_RD: Tensor) -> Tensor:
        if self._tape is not None and self._tape.replaying:
            replayed: Tensor = self._tape.replay()
            return replayed
        self._there = self._exchange.all_to_all(send_RD, send_rows=self._send_rows, recv_rows=self._recv_rows)
        received = self._there.tensor if self._overlap else self._finish(self._there.tensor)
        return received if self._tape is None else self._tape.keep(received)

    def _finish(self, arriving_RD: Tensor) -> Tensor:
        if self._there is not None:
            self._there.wait()
            self._there = None
        return arriving_RD

    def _start_back(self, grad_RD: Tensor) -> None:
        assert self._back is None, "backward ran twice through one transfer"
        self._back = self._exchange.all_to_all(grad_RD.contiguous(), send_rows=self._recv_rows, recv_rows=self._send_rows)
        if not self._overlap:
            self._back.wait()

    def _finish_back(self) -> Tensor:
        assert self._back is not None
        grad, self._back = self._back.wait(), None
        return grad


class _Issue(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, send_RD: Tensor, transfer: Transfer) -> Tensor:
        ctx.transfer = transfer
        return transfer._start(send_RD)

    @staticmethod
    def backward(ctx: Any, _grad: Tensor) -> tuple[Tensor, None]:
        # The gradient that came here is a stand-in: the true one is what the other ranks sent.
        return ctx.transfer._finish_back(), None


class _Wait(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, arriving_RD: Tensor, transfer: Transfer) -> Tensor:
        ctx.transfer = transfer
        return transfer._finish(arriving_RD).view_as(arriving_RD)

    @staticmethod
    def backward(ctx: Any, grad_RD: Tensor) -> tuple[Tensor, None]:
        ctx.transfer._start_back(grad_RD)
        return grad_RD, None
