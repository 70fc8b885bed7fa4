"""Clips that show the same: a perceptual hash of each, and the pairs of a whole set whose hashes are near."""

# T H W frames, height, width; F frames looked at; N hashes; P pairs

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np
from numpy.typing import NDArray

from opensora_dist.core.video import Frames

_SIDE = 32  # pixels a frame is shrunk to
_WAVES = 8  # 8 x 8 of its cosine waves give 64 bits
_FLAT = 1.0  # coefficients of a picture of one tone are noise below it
_BITS = 64
_LEAST_PARTS = 3  # of 22 bits: the table of their 2^22 starts is 32 MB
_FIRST_BLOCK = 1 << 14
_PAIRS_AT_ONCE = 1 << 16  # as many as a core's cache holds


def phash(frames_THW3: Frames) -> int:
    """64 bits that stay nearly the same when a clip is scaled, compressed again or made brighter.

    Bit k says whether the k-th of the 64 slowest cosine waves of the picture is stronger than their median, the frames voting by how clearly
    they say so. Of a clip without structure it is 0.

    Args:
        frames_THW3: uint8 RGB, those of the clip that are to be looked at.
    Source: pHash (Zauner, Implementation and benchmarking of perceptual image hash functions, 2010), over several frames.
    """
    import cv2

    votes = np.zeros(_WAVES * _WAVES)
    for frame in frames_THW3:
        grey = cv2.resize(cv2.cvtColor(frame, cv2.COLOR_RGB2GRAY), (_SIDE, _SIDE), interpolation=cv2.INTER_AREA)
        waves = cv2.dct(grey.astype(np.float32))[1 : _WAVES + 1, 1 : _WAVES + 1].reshape(-1).astype(np.float64)
        above = waves - np.median(waves)
        scale = float(np.sqrt(np.mean(above**2)))
        if scale > _FLAT:
            votes += above / scale
    # Rounded, so that the last bits of another machine's cosine don't turn a vote that is even.
    return sum(1 << k for k, vote in enumerate(np.round(votes, 6).tolist()) if vote > 0)


def near_duplicates(hashes: Sequence[int], max_bits: int) -> list[int | None]:
    """For each hash, the index of the one that is kept in its stead, or None where it is kept itself.

    In the order given, a hash is kept unless one kept before it differs in at most ``max_bits`` bits; of several, the first stands in for it.
    Exact, and the same on every machine.

    Args:
        hashes: Of 64 bits.
        max_bits: Largest distance; 0 finds equal hashes alone.
    Source: Norouzi et al., Fast search in Hamming space with multi-index hashing, 2012.
    """
    values = np.array(hashes, dtype=np.uint64)
    unique, first, inverse = np.unique(values, return_index=True, return_inverse=True)
    order = np.argsort(first, kind="stable")  # unique hashes as they come
    stand_in = _stand_ins(unique[order], max_bits)  # by place in `order`
    place = np.empty(len(order), dtype=np.int64)
    place[order] = np.arange(len(order))
    places = place[inverse]
    kept = np.where(stand_in[places] >= 0, stand_in[places], places)
    kept_index = first[order][kept] if len(kept) else kept
    return [None if index == i else index for i, index in enumerate(kept_index.tolist())]


def _stand_ins(values_N: NDArray[np.uint64], max_bits: int) -> NDArray[np.int64]:
    """For each of different hashes, the place of the first kept one near it, or -1.

    Block by block, each as large as an eighth of what came before: a block is held against what is kept so far, and only what is left of it
    against itself, so that a crowd of near hashes costs its size and not its square.
    """
    stand_in = np.full(len(values_N), -1, dtype=np.int64)
    if max_bits == 0:
        return stand_in
    kept = np.zeros(0, dtype=np.int64)
    begin = 0
    while begin < len(values_N):
        block = np.arange(begin, min(len(values_N), begin + max(_FIRST_BLOCK, begin // 8)))
        begin = int(block[-1]) + 1
        if len(kept):
            nearest = np.full(len(block), len(values_N), dtype=np.int64)
            for query, found in _near(values_N[block], values_N[kept], max_bits):
                np.minimum.at(nearest, query, kept[found])
            near = nearest < len(values_N)
            stand_in[block[near]] = nearest[near]
            block = block[~near]
        _keep_first(values_N, block, stand_in, max_bits)
        kept = np.concatenate([kept, block[stand_in[block] < 0]])
    return stand_in


def _keep_first(values_N: NDArray[np.uint64], block: NDArray[np.int64], stand_in: NDArray[np.int64], max_bits: int) -> None:
    """Decides within a block of places, in order."""
    edges = [np.stack([query, found], axis=1) for query, found in _near(values_N[block], values_N[block], max_bits)]
    pairs_P2 = np.concatenate(edges) if edges else np.zeros((0, 2), dtype=np.int64)
    pairs_P2 = np.unique(pairs_P2[pairs_P2[:, 1] < pairs_P2[:, 0]], axis=0)  # by the later, then by the earlier
    for later, earlier in block[pairs_P2].tolist():
        if stand_in[later] < 0 and stand_in[earlier] < 0:
            stand_in[later] = earlier


@dataclass(frozen=True, kw_only=True)
class _Part:
    """``bits`` bits of a hash from ``first`` on, in which ``flips`` may differ; of -1 flips, none is looked at."""

    first: int
    bits: int
    flips: int

    @property
    def lookups(self) -> int:
        """Keys that are looked up for each hash."""
        return sum(math.comb(self.bits, k) for k in range(min(self.flips, self.bits) + 1))


def _plan(num_table: int, max_bits: int) -> list[_Part]:
    """How to cut hashes into parts: those for which the fewest pairs are looked at, a look-up counting as four.

    Two hashes that differ in more bits than ``flips`` in every part differ in at least the sum of ``flips + 1``, which is ``max_bits + 1``.
    """

    def cost(parts: list[_Part]) -> float:
        return sum(part.lookups * (4.0 + num_table / (1 << part.bits)) for part in parts)

    plans = []
    for count in range(_LEAST_PARTS, _BITS + 1):
        edges = [_BITS * k // count for k in range(count + 1)]
        flips = [(max_bits + 1 + k) // count - 1 for k in range(count)]
        plans.append([_Part(first=edges[k], bits=edges[k + 1] - edges[k], flips=flips[k]) for k in range(count)])
    return min(plans, key=cost)


def _near(
    queries: NDArray[np.uint64], table: NDArray[np.uint64], max_bits: int
) -> Iterator[tuple[NDArray[np.int64], NDArray[np.int64]]]:
    """Every (place in queries, place in table) of hashes at most ``max_bits`` apart, some of them more than once."""
    for part in _plan(len(table), max_bits):
        if part.flips < 0:
            continue
        keys, asked = _keys(table, part), _keys(queries, part)
        # Both in the order of their keys: what is compared then lies together in memory.
        by_key, by_asked = np.argsort(keys, kind="stable"), np.argsort(asked, kind="stable")
        sorted_table, sorted_queries, asked = table[by_key], queries[by_asked], asked[by_asked]
        starts = np.zeros((1 << part.bits) + 1, dtype=np.int64)
        np.cumsum(np.bincount(keys, minlength=1 << part.bits), out=starts[1:])
        for flip in _flips(part.bits, part.flips):
            wanted = asked ^ flip
            low = starts[wanted]
            count = starts[wanted + 1] - low
            shift = low - (np.cumsum(count) - count)
            for run, before in _runs(count):
                found = np.repeat(shift[run] + before, count[run]) + np.arange(count[run].sum())
                apart = np.repeat(sorted_queries[run], count[run]) ^ sorted_table[found]
                near = np.flatnonzero(_ones(apart) <= max_bits)
                query = run.start + np.searchsorted(np.cumsum(count[run]), near, side="right")
                yield by_asked[query], by_key[found[near]]


def _keys(values: NDArray[np.uint64], part: _Part) -> NDArray[np.int64]:
    return ((values >> np.uint64(part.first)) & np.uint64((1 << part.bits) - 1)).astype(np.int64)


def _flips(bits: int, most: int) -> Iterator[int]:
    """Every number of ``bits`` bits of which at most ``most`` are set."""
    for count in range(min(most, bits) + 1):
        for places in combinations(range(bits), count):
            yield sum(1 << place for place in places)


def _runs(count_N: NDArray[np.int64]) -> Iterator[tuple[slice, int]]:
    """Runs of queries that have about ``_PAIRS_AT_ONCE`` pairs together, each with the number of pairs before it."""
    total = np.cumsum(count_N)
    begin, before = 0, 0
    while begin < len(count_N):
        end = max(begin + 1, int(np.searchsorted(total, before + _PAIRS_AT_ONCE, side="right")))
        yield slice(begin, end), before
        begin, before = end, int(total[end - 1])


def _ones(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """How many bits are set."""
    x = values - ((values >> np.uint64(1)) & np.uint64(0x5555555555555555))
    x = (x & np.uint64(0x3333333333333333)) + ((x >> np.uint64(2)) & np.uint64(0x3333333333333333))
    x = (x + (x >> np.uint64(4))) & np.uint64(0x0F0F0F0F0F0F0F0F)
    ones: NDArray[np.uint64] = (x * np.uint64(0x0101010101010101)) >> np.uint64(56)
    return ones
