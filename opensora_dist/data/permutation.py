"""Permutations and merges that are computed where they are asked: nothing of the length of a data set is ever made.

A keyed permutation of n numbers is a Feistel network over the residues modulo a and b, where a b is the least such product that holds n
numbers; a result beyond n is sent through again until it is below (cycle walking). Each round adds a keyed hash of one half to the
other, which can be undone whatever the hash is, so that the whole is one to one.

Source: Black and Rogaway, "Ciphers with Arbitrary Finite Domains", 2002 (generalised Feistel, cycle walking).
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

_ROUNDS = 12  # of 8, five numbers show which of their permutations are rarer
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_JITTER_BITS = 20  # j + jitter is exact in a float64 up to j of 2^33


def permute(places: NDArray[np.int64], *, sizes: NDArray[np.int64], seeds: NDArray[np.uint64]) -> NDArray[np.int64]:
    """What stands at places of keyed permutations, each of ``range(size)``; of another permutation per element, if need be.

    Args:
        places: Below ``sizes``, [N].
        sizes: Of the permutation asked, [N].
        seeds: Which permutation it is, [N]: others are unrelated.
    """
    a = np.ceil(np.sqrt(sizes)).astype(np.uint64)  # exact below 2^50
    b = (sizes.astype(np.uint64) + a - np.uint64(1)) // a
    most = sizes.astype(np.uint64)
    values = _network(places.astype(np.uint64), a, b, seeds)
    while (beyond := np.flatnonzero(values >= most)).size:
        values[beyond] = _network(values[beyond], a[beyond], b[beyond], seeds[beyond])
    return values.astype(np.int64)


def seed_of(seed: int, *parts: NDArray[np.integer] | int) -> NDArray[np.uint64]:
    """The seed of a permutation among many, from what tells it apart."""
    values = np.asarray([seed], dtype=np.uint64)
    for part in parts:
        values = mix(values ^ mix(np.atleast_1d(part).astype(np.uint64) + _GOLDEN))
    return values


def mix(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """A hash of 64 bits to 64 bits, one to one (the finaliser of splitmix64)."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def _network(
    values: NDArray[np.uint64], a: NDArray[np.uint64], b: NDArray[np.uint64], seeds: NDArray[np.uint64]
) -> NDArray[np.uint64]:
    left, right = values // b, values % b
    for _ in range(_ROUNDS // 2):
        seeds = seeds + _GOLDEN
        left = (left + mix(right ^ seeds) % a) % a
        seeds = seeds + _GOLDEN
        right = (right + mix(left ^ seeds) % b) % b
    return left * b + right


class Merge:
    """Several queues merged into one, each spread evenly over the whole: any stretch has of each about its share.

    Member j of a queue of n stands at (j + u) / n of the way, u in [0, 1) a keyed hash of queue and j; the merge is in the order of these
    places. So how many of each queue come before some point is known to within one without looking, and the rest is a look at a few.

    Args:
        sizes: Members of each queue.
        weights: What a member of each queue weighs, above 0: the merge is cut by weight.
        seed: Key of the hash, 64 bits.
    """

    def __init__(self, sizes: NDArray[np.int64], weights: NDArray[np.int64], *, seed: int) -> None:
        self.sizes, self.weights = sizes, weights
        self.total = int((sizes * weights).sum())
        self._seeds = seed_of(seed, np.arange(len(sizes)))
        self._slack = int(weights[sizes > 0].sum())

    def cut(self, weight: int) -> NDArray[np.int64]:
        """How many of each queue stand before a cut of the merge: as many as together weigh no more than ``weight``."""
        taken, queues, _ = self._near(weight, weight)
        room = weight - int((taken * self.weights).sum())
        fit = int(np.searchsorted(np.cumsum(self.weights[queues]), room, side="right"))
        return taken + np.bincount(queues[:fit], minlength=len(taken))

    def members(self, start: int, stop: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Of the merge's places ``start`` to ``stop``, where every member weighs 1: the queue of each, and its number in that."""
        taken, queues, numbers = self._near(start, stop)
        first = start - int(taken.sum())
        return queues[first : first + stop - start], numbers[first : first + stop - start]

    def _near(self, start: int, stop: int) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
        """How many of each queue stand before all that can be at weights ``start`` to ``stop``, and what follows these, in order, at
        least until ``stop``: queues and numbers in them."""
        low = max(0.0, (start - self._slack) / self.total)
        high = min(1.0, (stop + self._slack + 1) / self.total)
        taken = np.minimum(np.floor(low * self.sizes).astype(np.int64), self.sizes)
        until = np.minimum(np.ceil(high * self.sizes).astype(np.int64), self.sizes)
        counts = until - taken
        queues = np.repeat(np.arange(len(counts)), counts)
        numbers = np.arange(len(queues)) - np.repeat(np.cumsum(counts) - counts, counts) + taken[queues]
        jitter = mix(self._seeds[queues] + numbers.astype(np.uint64)) >> np.uint64(64 - _JITTER_BITS)
        places = (numbers + jitter / float(1 << _JITTER_BITS)) / self.sizes[queues]
        order = np.argsort(places, kind="stable")
        return taken, queues[order], numbers[order]
