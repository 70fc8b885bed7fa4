"""Traffic around a ring of ranks, one hop at a time: every part to every rank, and sums of parts to their owners."""

# l positions of one rank's part, G sequences, D width; parts are [l, G, ..] or, where positions come second, [G, l, ..]

from __future__ import annotations

from collections.abc import Sequence
from math import prod

from torch import Tensor

from opensora_dist.parallel.sequence.exchange import Exchange, Pending


class _Ring:
    """Parts that travel one way around, through two buffers: what came in one is sent on while the next part comes in the other.

    At its end a round lets go of its buffers, and another may begin.

    Args:
        exchange: The ring.
        lengths: Positions of each rank's part.
        by: The way around: 1 sends to the rank after, -1 to the rank before.
        overlap: False waits for a hop as soon as it is started.
        dim: Where a part has its positions.
    """

    def __init__(self, exchange: Exchange, *, lengths: Sequence[int], by: int, overlap: bool, dim: int = 0) -> None:
        assert len(lengths) == exchange.size
        self._exchange, self._lengths, self._by, self._overlap, self._dim = exchange, tuple(lengths), by, overlap, dim
        self._hop = 0
        self._flying: Pending | None = None
        self._buffers: list[Tensor] = []

    def _send(self, part: Tensor, *, back: int) -> None:
        """One hop, which brings the part of the owner ``back`` places back along the way."""
        owner = (self._exchange.rank - self._by * back) % self._exchange.size
        self._hop += 1
        self._flying = self._exchange.shift(part, into=self._room(part, owner), by=self._by)
        if not self._overlap:
            self._flying.wait()

    def _room(self, like: Tensor, owner: int) -> Tensor:
        """For that owner's part, in the buffer that isn't being sent."""
        if len(self._buffers) < 2:
            self._buffers.append(like.new_empty(prod(self._shape(like, max(self._lengths)))))
        else:
            self._buffers.reverse()
        shape = self._shape(like, self._lengths[owner])
        return self._buffers[-1][: prod(shape)].view(shape)

    def _shape(self, like: Tensor, length: int) -> tuple[int, ...]:
        return (*like.shape[: self._dim], length, *like.shape[self._dim + 1 :])

    def _end(self) -> None:
        self._hop, self._flying, self._buffers = 0, None, []


class RingGather(_Ring):
    """The part of every other rank, one after another: by 1 that of the rank before first. Hop i sends on what came in hop i - 1.

    Args:
        keep: Whether a part stays valid; else its buffer is used again two hops later.
    """

    def __init__(
        self, exchange: Exchange, *, lengths: Sequence[int], by: int, overlap: bool, dim: int = 0, keep: bool = False
    ) -> None:
        super().__init__(exchange, lengths=lengths, by=by, overlap=overlap, dim=dim)
        self._keep = keep

    @staticmethod
    def rows_sent(lengths: Sequence[int], *, rank: int, by: int) -> int:
        """Every part but that of the next rank, with which the round would be full."""
        return sum(lengths) - lengths[(rank + by) % len(lengths)]

    def start(self, own: Tensor) -> None:
        """Sends this rank's part, which must not change before the first part has come."""
        assert self._hop == 0, "a round began before the last one ended"
        if self._exchange.size > 1:
            self._send(own, back=1)

    def next(self) -> Tensor:
        """The part that was on its way, once it is here; what follows it is on its way then."""
        assert self._flying is not None
        part = self._flying.wait()
        if self._hop < self._exchange.size - 1:
            self._send(part, back=self._hop + 1)
        else:
            self._end()
        return part

    def _room(self, like: Tensor, owner: int) -> Tensor:
        return like.new_empty(self._shape(like, self._lengths[owner])) if self._keep else super()._room(like, owner)


class RingReduce(_Ring):
    """Sums over all ranks of what each has for the part of each, delivered to the owner: the way there of a ``RingGather`` by as much.

    Hop i sends the sum for the rank i places back; with the last hop this rank's own arrives. A sum travels in the dtype of what is
    sent first, so in bfloat16 it is rounded once a hop.
    """

    @staticmethod
    def rows_sent(lengths: Sequence[int], *, rank: int) -> int:
        """Every part but its own."""
        return sum(lengths) - lengths[rank]

    def arrived(self) -> Tensor | None:
        """The sum that was on its way, to be added to and sent on; None before the first hop."""
        return None if self._flying is None else self._flying.wait()

    def send(self, total: Tensor) -> None:
        """Sends on the sum that ``arrived``, or starts one."""
        self._send(total, back=self._hop + 2)

    def finish(self) -> Tensor:
        """The other ranks' sum for this rank's part; the caller's to change."""
        assert self._flying is not None and self._hop == self._exchange.size - 1
        total = self._flying.wait()
        self._end()
        return total
