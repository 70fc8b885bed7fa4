"""Which samples make which global batch: a pure function of the data set, the seed and the step.

Ranks don't appear here. A run that resumes at step k, on any number of ranks, sees what the run that was never stopped saw;
there is no state to save.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
import xxhash
from numpy.typing import NDArray

from opensora_dist.core.errors import ConfigError, DataError
from opensora_dist.core.types import Thw
from opensora_dist.data.index import Index
from opensora_dist.parallel.keys import Keys

MAX_ATTEMPTS = 8
"""Substitutes that are tried for one sample before the step goes on without it."""


@dataclass(frozen=True, kw_only=True)
class GlobalBatch:
    """The samples of one optimizer step, in units that are dealt out to ranks and micro-batches as they are.

    Args:
        units: Rows of the index, unit by unit: one sample, or those of a pack.
        shapes: How many samples of each latent shape there are.
        text_tokens: Of the longest caption, to which all are padded.
        epoch: How often the data set was gone through before.
        digest: xxh3-64 (hex) of their identities, for comparing runs.
    """

    units: tuple[tuple[int, ...], ...]
    shapes: Mapping[Thw, int]
    text_tokens: int
    epoch: int
    digest: str

    @property
    def rows(self) -> tuple[int, ...]:
        """All rows, unit by unit: a *place* is a position in this."""
        return tuple(row for unit in self.units for row in unit)


class Order:
    """The order of a data set.

    In each epoch, each bucket is shuffled and cut into global batches; the tail that fills none is dropped for that epoch
    (another epoch drops others). The batches of all buckets are shuffled together. ``dropped`` counts, per bucket and reason, the
    samples an epoch leaves out; ``latents`` are the latent shapes of its batches.

    Args:
        index: The data set.
        keys: The run's keys; the order is theirs alone.
        global_batch: Samples per step.
    Raises:
        DataError: No bucket fills one global batch.
    """

    def __init__(self, index: Index, *, keys: Keys, global_batch: int) -> None:
        self._index = index
        self._keys = keys
        self.global_batch = global_batch
        self._buckets = [(bucket, rows) for bucket, rows in index.buckets.items() if len(rows) >= global_batch]
        if not self._buckets:
            counts = ", ".join(f"{bucket}: {len(rows)}" for bucket, rows in index.buckets.items())
            most = max(len(rows) for rows in index.buckets.values())
            raise DataError(
                f"data.global_batch={global_batch} is more than any bucket of {index.where} holds, and a batch has one shape "
                f"(samples per bucket: {counts}); use data.global_batch={most} or less, prepare more clips, or list fewer "
                "clip.buckets when preparing"
            )
        self.dropped = {
            f"{bucket}: " + ("tail of each epoch" if len(rows) >= global_batch else "fewer than a global batch"): int(count)
            for bucket, rows in index.buckets.items()
            if (count := len(rows) % global_batch)
        }
        self.latents = tuple(sorted({index.latent_shape(int(rows[0])) for _, rows in self._buckets}))
        self.batches_per_epoch = sum(len(rows) // global_batch for _, rows in self._buckets)
        self._plan = lru_cache(maxsize=2)(self._make_plan)  # two: readers cross into the next epoch before the consumer does

    def batch(self, step: int) -> GlobalBatch:
        """The global batch of a step, in constant time once its epoch was planned."""
        epoch, number = divmod(step, self.batches_per_epoch)
        rows = self._plan(epoch)[number].tolist()
        digest = xxhash.xxh3_64_hexdigest(self._index.sample_ids[rows].astype("<u8").tobytes())
        return GlobalBatch(
            units=tuple((row,) for row in rows),
            shapes={self._index.latent_shape(rows[0]): len(rows)},
            text_tokens=int(self._index.text_tokens[rows].max()),
            epoch=epoch,
            digest=digest,
        )

    def substitute(self, step: int, place: int, attempt: int) -> int | None:
        """The row that stands in for a sample that can't be read: a pure function, so that all ranks that share it take the same.

        Of the same bucket, so that it costs and weighs the same; with no more text than the batch is padded to; not of this batch.
        Rows are dealt out over places and attempts, so that no two of a step get the same one.

        Args:
            place: Where in the global batch.
            attempt: How many substitutes for this place couldn't be read either.
        Returns:
            None where there is no further one.
        """
        batch, tokens = self.batch(step), self._index.text_tokens
        rows = self._index.buckets[self._index.clip_shape(batch.rows[place])]
        fits = rows[(tokens[rows] <= batch.text_tokens) & ~np.isin(rows, batch.rows)]
        number = attempt * self.global_batch + place
        if attempt >= MAX_ATTEMPTS or number >= len(fits):
            return None
        return int(fits[self._permutation("substitutes", key=step, size=len(fits))[number]])

    def _make_plan(self, epoch: int) -> NDArray[np.int64]:
        """All batches of an epoch, [batches_per_epoch, global_batch] rows."""
        batches = []
        for bucket, rows in self._buckets:
            shuffled = rows[self._permutation(f"order:{bucket}", key=epoch, size=len(rows))]
            whole = len(rows) // self.global_batch * self.global_batch
            batches.append(shuffled[:whole].reshape(-1, self.global_batch))
        return np.concatenate(batches)[self._permutation("order:batches", key=epoch, size=self.batches_per_epoch)]

    def _permutation(self, purpose: str, *, key: int, size: int) -> NDArray[np.int64]:
        draws = torch.empty(size, dtype=torch.int64).random_(generator=self._keys.generator(purpose, step=key))
        return np.argsort(draws.numpy(), kind="stable")


def micro_places(units: Sequence[int], *, data_rank: int, data_size: int, accum: int, micro: int) -> range:
    """The places of one micro-batch of one data rank: contiguous slices, rank by rank, micro-batch by micro-batch.

    Args:
        units: Samples in each unit of a global batch.
        data_rank: Which of the ``data_size`` ranks that see different samples.
        accum: Micro-batches per step.
        micro: Which of them.
    Raises:
        ConfigError: The global batch does not divide.
    """
    if len(units) % (data_size * accum):
        raise ConfigError(
            f"data.global_batch={len(units)} must be a multiple of data ranks x parallel.grad_accum = {data_size} x {accum}; "
            f"use a multiple of {data_size * accum}, or another number of ranks or micro-batches"
        )
    size = len(units) // (data_size * accum)
    start = (data_rank * accum + micro) * size
    return range(sum(units[:start]), sum(units[: start + size]))


def position_weights(rule: str, positions: Sequence[int]) -> list[float]:
    """The weight of each latent position of each sample of a global batch; weight x positions sums to 1 over the batch.

    Args:
        rule: ``sample``: each sample counts alike, whatever its size; ``token``: each position counts alike.
        positions: Latent positions (t h w) of each sample of the *global* batch.
    """
    if rule == "sample":
        return [1 / (len(positions) * p) for p in positions]
    assert rule == "token", rule
    return [1 / sum(positions)] * len(positions)
