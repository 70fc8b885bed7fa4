"""The order in which samples of one bucket and data set come, for ever: pass after pass, each shuffled anew.

A *group* is what one data set has of one bucket. An epoch takes the next so many of each group's stream: with natural weights a whole
pass, otherwise more or less, so that over epochs samples are repeated or skipped evenly. Nothing is kept and nothing of the length of a
group is made: position i of a stream is computed.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise

import numpy as np
import xxhash
from numpy.typing import NDArray

from opensora_dist.core.errors import DataError
from opensora_dist.core.types import Thw
from opensora_dist.data.index import Index
from opensora_dist.data.permutation import permute, seed_of


@dataclass(frozen=True, kw_only=True)
class Group:
    """What one data set has of one bucket.

    Args:
        bucket: Clip shape.
        rows: Rows of the index, ascending.
        use: How many of its stream an epoch takes.
        identity: Hash of what it is, whatever other groups there are.
    """

    bucket: Thw
    rows: NDArray[np.int32]
    use: int
    identity: int


def make_groups(index: Index, *, image_share: float | None) -> list[Group]:
    """The groups of an index, bucket by bucket, with what an epoch uses of each.

    An epoch has about as many samples as there are. ``DataSet.weight`` says which share of them each data set gives, ``image_share`` what
    share is images (over all; each data set keeps its share of the images and of the videos).

    Raises:
        DataError: ``image_share`` asks for images or for videos, and there are none.
    """
    sizes = np.diff(index.set_starts).astype(np.float64)
    weights = np.array([n if s.weight is None else s.weight for s, n in zip(index.sets, sizes)])
    scale = weights / weights.sum() * sizes.sum() / sizes
    found: list[tuple[Thw, int, NDArray[np.int32]]] = []
    for bucket, rows in index.buckets.items():
        ends = np.searchsorted(rows, index.set_starts)
        found += [(bucket, s, rows[a:b]) for s, (a, b) in enumerate(pairwise(ends.tolist())) if a < b]
    use = np.array([len(rows) * scale[s] for _, s, rows in found])
    images = np.array([bucket.t == 1 for bucket, _, _ in found])
    if image_share is not None:
        total = use.sum()
        kinds = {"images (clips of one frame)": (images, image_share), "videos": (~images, 1 - image_share)}
        for name, (kind, share) in kinds.items():
            if share and not kind.any():
                raise DataError(
                    f"data.image_share={image_share:g} asks for {name}, and {index.where} has none; leave data.image_share out, or add a "
                    "data set that has some to data.mixture"
                )
            use[kind] *= share * total / max(1.0, use[kind].sum())
    return [
        Group(
            bucket=bucket,
            rows=rows,
            use=max(1, round(float(n))) if n else 0,
            identity=xxhash.xxh3_64_intdigest(f"{index.sets[s].name}/{bucket}".encode()),
        )
        for (bucket, s, rows), n in zip(found, use)
    ]


class Streams:
    """Rows of the index by group and position.

    Args:
        index: The data set.
        groups: Its groups.
        seed: Of the run's order, 64 bits.
        window_shards: Samples are shuffled among so many shards of a group at a time; None: among all.
    """

    def __init__(self, index: Index, groups: list[Group], *, seed: int, window_shards: int | None) -> None:
        self.groups = groups
        self._seed = seed
        self._sizes = np.array([len(g.rows) for g in groups])
        self._starts = np.cumsum(self._sizes) - self._sizes
        self._rows = np.concatenate([g.rows for g in groups])
        self._use = np.array([g.use for g in groups])
        self._identities = np.array([g.identity for g in groups], dtype=np.uint64)
        self._window_shards = window_shards
        self._runs = [_runs(index.shard[g.rows]) for g in groups] if window_shards is not None else []
        self._windows = lru_cache(maxsize=2 * len(groups))(self._make_windows)

    def rows(self, groups: NDArray[np.int64], numbers: NDArray[np.int64], *, epoch: int) -> NDArray[np.int64]:
        """The rows that stand at some positions.

        Args:
            groups: Numbers of groups, [N].
            numbers: Which of what the epoch uses of the group, [N].
        """
        positions = epoch * self._use[groups] + numbers
        passes, places = np.divmod(positions, self._sizes[groups])
        if self._window_shards is None:
            seeds = seed_of(self._seed, self._identities[groups], passes)
            inside = permute(places, sizes=self._sizes[groups], seeds=seeds)
        else:
            inside = np.empty(len(groups), dtype=np.int64)
            for g, number in sorted(set(zip(groups.tolist(), passes.tolist(), strict=True))):
                mine = np.flatnonzero((groups == g) & (passes == number))
                inside[mine] = self._in_windows(g, number, places[mine])
        rows: NDArray[np.int64] = self._rows[self._starts[groups] + inside].astype(np.int64)
        return rows

    def _in_windows(self, group: int, number: int, places: NDArray[np.int64]) -> NDArray[np.int64]:
        """Of one pass: shards are shuffled, then the samples of each so many shards that follow each other."""
        order, starts, windows = self._windows(group, number)
        window = np.searchsorted(windows, places, side="right") - 1
        first, sizes = windows[window], np.diff(windows)[window]
        seeds = seed_of(self._seed, self._identities[group], number, window + 1)
        shuffled = first + permute(places - first, sizes=sizes, seeds=seeds)
        run = np.searchsorted(starts, shuffled, side="right") - 1
        inside: NDArray[np.int64] = self._runs[group][order[run]] + shuffled - starts[run]
        return inside

    def _make_windows(self, group: int, number: int) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
        """The shards of a group as a pass takes them, at which of its places each begins, and at which each window does."""
        assert self._window_shards is not None
        runs = self._runs[group]
        count = np.full(len(runs) - 1, len(runs) - 1)
        seeds = np.broadcast_to(seed_of(self._seed, self._identities[group], number), count.shape)
        order = permute(np.arange(len(count)), sizes=count, seeds=seeds)
        starts = np.concatenate([[0], np.cumsum(np.diff(runs)[order])])
        return order, starts, np.append(starts[: -1 : self._window_shards], starts[-1])


def _runs(shard: NDArray[np.int32]) -> NDArray[np.int64]:
    """Where each shard's samples begin among those of a group, and how many there are."""
    return np.concatenate([[0], np.flatnonzero(np.diff(shard)) + 1, [len(shard)]])
