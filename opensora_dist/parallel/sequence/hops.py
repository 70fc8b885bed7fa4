"""Traffic around a ring of ranks, one hop at a time: every part to every rank, and sums of parts to their owners."""

# l rows of one rank's part, G sequences, D width

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from opensora_dist.parallel.sequence.exchange import Exchange, Pending


class RingGather:
    """The part of every other rank, one after another. Hop i sends on what came in hop i - 1.

    Args:
        exchange: The ring.
        lengths: Rows of each rank's part.
        by: The way around: 1 brings the part of the rank before first, -1 that of the rank after.
        overlap: False waits for a hop as soon as it is started.
        keep: Whether a part stays valid; else its buffer is used again two hops later.
    """

    def __init__(self, exchange: Exchange, *, lengths: Sequence[int], by: int, overlap: bool, keep: bool) -> None:
        self._exchange, self._lengths, self._by, self._overlap, self._keep = exchange, tuple(lengths), by, overlap, keep
        self._hop = 0
        self._flying: Pending | None = None
        self._pair: list[Tensor] = []

    @staticmethod
    def rows_sent(lengths: Sequence[int], *, rank: int, by: int) -> int:
        """Every part but that of the next rank, with which the round would be full."""
        return sum(lengths) - lengths[(rank + by) % len(lengths)]

    def start(self, own_lGD: Tensor) -> None:
        """Sends this rank's part, which must not change before the first part has come."""
        assert self._hop == 0, "a ring goes round once"
        self._post(own_lGD)

    def next(self) -> Tensor:
        """The part that was on its way, once it is here; what follows it is on its way then."""
        assert self._flying is not None
        part = self._flying.wait()
        if self._hop < self._exchange.size - 1:
            self._post(part)
        else:
            self._flying, self._pair = None, []
        return part

    def _post(self, send_lGD: Tensor) -> None:
        self._hop += 1
        source = (self._exchange.rank - self._by * self._hop) % self._exchange.size
        into = self._buffer(send_lGD, rows=self._lengths[source])
        self._flying = self._exchange.shift(send_lGD, into=into, by=self._by)
        if not self._overlap:
            self._flying.wait()

    def _buffer(self, like_lGD: Tensor, *, rows: int) -> Tensor:
        """In turn, so that what arrives in one is read and sent on while the next part arrives in the other."""
        if self._keep:
            return like_lGD.new_empty((rows, *like_lGD.shape[1:]))
        if len(self._pair) < 2:
            self._pair.append(like_lGD.new_empty((max(self._lengths), *like_lGD.shape[1:])))
        else:
            self._pair.reverse()
        return self._pair[-1][:rows]


class RingReduce:
    """Sums over all ranks of what each has for the part of each, delivered to the owner: the transpose of a ``RingGather`` by 1.

    Hop i sends the sum for the rank i places on to the rank before; with the last hop this rank's own arrives. A sum travels in the
    dtype of the products, so in bfloat16 it is rounded once a hop.
    """

    def __init__(self, exchange: Exchange, *, lengths: Sequence[int], overlap: bool) -> None:
        self._exchange, self._lengths, self._overlap = exchange, tuple(lengths), overlap
        self._hop = 0
        self._flying: Pending | None = None
        self._buffer: Tensor | None = None

    @staticmethod
    def rows_sent(lengths: Sequence[int], *, rank: int) -> int:
        """Every part but its own."""
        return sum(lengths) - lengths[rank]

    def add(self, product_lGD: Tensor) -> None:
        """Adds this rank's product for the part whose sum is on its way here, and sends the sum on.

        Args:
            product_lGD: First for the rank after this one, last for the one before; becomes the send buffer.
        """
        if self._flying is not None:
            product_lGD.add_(self._flying.wait())
        self._hop += 1
        rows = self._lengths[(self._exchange.rank + self._hop + 1) % self._exchange.size]
        if self._buffer is None:
            # One is enough: a sum is added to the next product before the next hop brings another.
            self._buffer = product_lGD.new_empty((max(self._lengths), *product_lGD.shape[1:]))
        self._flying = self._exchange.shift(product_lGD, into=self._buffer[:rows], by=-1)
        if not self._overlap:
            self._flying.wait()

    def finish(self) -> Tensor:
        """The other ranks' sum for this rank's part; the caller's to change."""
        assert self._flying is not None and self._hop == self._exchange.size - 1
        total = self._flying.wait()
        self._flying, self._buffer = None, None
        return total
