"""Samples of many shapes into packs of at most so many tokens, all of which cost about the same to compute.

Samples of one class (one shape) are alike, so what is decided is how many of each class a pack takes. The largest go first, each to the
pack that costs least so far and has room: a rare large one before the many small ones that would take its room. Then samples are exchanged
between the pack that costs most and those that cost least. All sums are of integers, so that every machine decides the same.
"""

from __future__ import annotations

import heapq
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

_COST_UNITS = 1 << 24  # of the costliest sample; sums of a million of them are exact
_MANY = 2  # samples of a class for each pack: that many are not dealt one by one
_GOOD = 1.004  # of the mean: no exchange is sought beyond
_MAX_EXCHANGES = 96
_PARTNERS = 6


@dataclass(frozen=True, kw_only=True)
class Packing:
    """How many samples of each class each pack holds.

    Args:
        counts: [packs, classes].
        left_out: Of each class, those that had no room, [classes].
    """

    counts: NDArray[np.int64]
    left_out: NDArray[np.int64]

    def imbalance(self, costs: NDArray[np.float64]) -> float:
        """How much more than the mean the costliest pack costs, as a share of it.

        Args:
            costs: Of a sample of each class.
        """
        loads = self.counts @ _units(costs)
        return int(loads.max()) * len(loads) / int(loads.sum()) - 1


def pack(
    counts: NDArray[np.int64], *, tokens: NDArray[np.int64], costs: NDArray[np.float64], num_packs: int, budget: int
) -> Packing:
    """Packs the samples of one step.

    Args:
        counts: Samples of each class, [C]; at least ``num_packs`` together.
        tokens: Of a sample of each class, none above ``budget``.
        costs: Of a sample of each class, in any unit.
        budget: Tokens of a pack at most.
    """
    units = _units(costs)
    packs = _Packs(num_packs, tokens=tokens, units=units, budget=budget)
    by_size = np.lexsort((units, tokens))[::-1]
    left = counts.copy()
    for c in by_size[left[by_size] > 0].tolist():
        left[c] -= packs.deal(c, int(left[c]))
    packs.fill_empty()
    packs.equalise()
    for c in by_size[left[by_size] > 0].tolist():
        left[c] -= packs.deal(c, int(left[c]))
    return Packing(counts=packs.counts, left_out=left)


def _units(costs: NDArray[np.float64]) -> NDArray[np.int64]:
    """Costs in integers, none of them 0."""
    units: NDArray[np.int64] = np.maximum(np.rint(costs * (_COST_UNITS / costs.max())), 1).astype(np.int64)
    return units


class _Packs:
    """Packs being filled."""

    def __init__(self, num_packs: int, *, tokens: NDArray[np.int64], units: NDArray[np.int64], budget: int) -> None:
        self._tokens, self._units, self._budget = tokens, units, budget
        self.counts = np.zeros((num_packs, len(tokens)), dtype=np.int64)
        self._size = [0] * num_packs  # tokens
        self._load = [0] * num_packs  # cost

    def deal(self, c: int, count: int) -> int:
        """Samples of a class, one by one to the pack that costs least and has room. Returns how many found room."""
        tokens, units, most = int(self._tokens[c]), int(self._units[c]), self._budget - int(self._tokens[c])
        got = [0] * len(self._load)
        if count > _MANY * len(got):
            got = self._deal_many(tokens, units, count)
            self._size = [size + n * tokens for size, n in zip(self._size, got, strict=True)]
            self._load = [load + n * units for load, n in zip(self._load, got, strict=True)]
        left = count - sum(got)
        heap = [(load, p) for p, load in enumerate(self._load) if self._size[p] <= most]
        heapq.heapify(heap)
        while left and heap:
            load, p = heap[0]
            got[p] += 1
            left -= 1
            self._size[p] += tokens
            self._load[p] = load + units
            if self._size[p] <= most:
                heapq.heapreplace(heap, (load + units, p))
            else:
                heapq.heappop(heap)
        self.counts[:, c] += got
        return count - left

    def _deal_many(self, tokens: int, units: int, count: int) -> list[int]:
        """How many each pack gets while one by one they come to about one level of cost; fewer than one a pack stay."""
        loads, room = np.array(self._load), (self._budget - np.array(self._size)) // tokens
        if room.sum() <= count:
            return [int(n) for n in room]
        low, high = int(loads.min()), int((loads + room * units).max())  # up to high all is taken, and that is too many
        while high - low > units:
            level = (low + high) // 2
            if np.clip(-((loads - level) // units), 0, room).sum() <= count:
                low = level
            else:
                high = level
        return [int(n) for n in np.clip(-((loads - low) // units), 0, room)]

    def fill_empty(self) -> None:
        """No pack stays without a sample: a rank must have something to run."""
        for p, row in enumerate(self.counts.sum(axis=1).tolist()):
            if row == 0:
                donor = int(self.counts.sum(axis=1).argmax())
                held = np.flatnonzero(self.counts[donor])
                self._move(donor, p, {int(held[self._units[held].argmin()]): 1})

    def equalise(self) -> None:
        """Exchanges samples between the costliest pack and the cheapest ones, as long as that helps."""
        mean = sum(self._load) / len(self._load)
        for _ in range(_MAX_EXCHANGES):
            high = max(range(len(self._load)), key=self._load.__getitem__)
            if self._load[high] <= _GOOD * mean:
                return
            partners = heapq.nsmallest(_PARTNERS, range(len(self._load)), key=self._load.__getitem__)
            if not any(self._exchange(high, low) for low in partners if low != high):
                return

    def _exchange(self, high: int, low: int) -> bool:
        """The exchange that brings two packs closest together, if there is one that lowers the costlier: some samples of one class for
        some of another (or none)."""
        gap = self._load[high] - self._load[low]
        give, take = np.flatnonzero(self.counts[high]), np.flatnonzero(self.counts[low])
        gives, takes = self._tokens[give][:, None], self._tokens[take][None, :]
        # One for one, one for nothing, and as many of the smaller for one of the larger as make about its tokens.
        many_give, many_take = np.maximum(1, takes // gives), np.maximum(1, gives // takes)
        n_give = np.concatenate([np.ones_like(many_give), many_give, np.ones((len(give), 1), dtype=np.int64)], axis=1)
        n_take = np.concatenate([np.ones_like(many_take), many_take, np.zeros((len(give), 1), dtype=np.int64)], axis=1)
        which = np.concatenate([take, take, take[:1]])
        cost = n_give * self._units[give][:, None] - n_take * self._units[which]
        size = n_give * gives - n_take * self._tokens[which]
        can = (
            (cost > 0)
            & (cost < gap)
            & (n_give <= self.counts[high][give][:, None])
            & (n_take <= self.counts[low][which])
            & (self._size[low] + size <= self._budget)
            & (self._size[high] - size <= self._budget)
        )
        if self.counts[high].sum() == 1:
            can &= n_take > 0
        off = np.where(can, np.abs(2 * cost - gap), gap)
        best = int(off.argmin())
        i, j = divmod(best, off.shape[1])
        if not can[i, j]:
            return False
        self._move(high, low, {int(give[i]): int(n_give[i, j])})
        if n_take[i, j]:
            self._move(low, high, {int(which[j]): int(n_take[i, j])})
        return True

    def _move(self, source: int, target: int, counts: dict[int, int]) -> None:
        for c, count in counts.items():
            self.counts[source, c] -= count
            self.counts[target, c] += count
            for p, sign in ((source, -count), (target, count)):
                self._size[p] += sign * int(self._tokens[c])
                self._load[p] += sign * int(self._units[c])
