"""Which samples make which global batch: a pure function of the data set, the seed and the step.

Ranks don't appear here. A run that resumes at step k, on any number of ranks, sees what the run that was never stopped saw;
there is no state to save.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache

import numpy as np
import torch
import xxhash

from opensora_dist.config.train import DataConfig
from opensora_dist.core.errors import ConfigError
from opensora_dist.core.types import Thw
from opensora_dist.data.index import Index
from opensora_dist.data.permutation import permute, seed_of
from opensora_dist.data.plans import BucketPlan, BucketYield, PackedPlan, PackingQuality, Plan, check_units
from opensora_dist.data.streams import Streams, make_groups
from opensora_dist.parallel.keys import Keys, sample_id

MAX_ATTEMPTS = 8
"""Substitutes that are tried for one sample before the step goes on without it."""
_BATCHES_KEPT = 8


@dataclass(frozen=True, kw_only=True)
class GlobalBatch:
    """The samples of one optimizer step, in units that are dealt out to ranks and micro-batches as they are.

    Args:
        units: Rows of the index, unit by unit: one sample, or those of a pack.
        shapes: How many samples of each latent shape there are.
        text_tokens: Of the longest caption, to which all are padded.
        epoch: How often the data set was gone through before.
        digest: xxh3-64 (hex) of their identities, for comparing runs.
        left_out: Rows that no pack of the step had room for.
    """

    units: tuple[tuple[int, ...], ...]
    shapes: Mapping[Thw, int]
    text_tokens: int
    epoch: int
    digest: str
    left_out: tuple[int, ...] = ()

    @cached_property
    def rows(self) -> tuple[int, ...]:
        """All rows, unit by unit: a *place* is a position in this."""
        return tuple(row for unit in self.units for row in unit)

    @cached_property
    def occurrences(self) -> tuple[int, ...]:
        """How many places before each place have the same row: not 0 where weights or shares repeat a sample within the batch."""
        counts = Counter[int]()
        ranks = []
        for row in self.rows:
            ranks.append(counts[row])
            counts[row] += 1
        return tuple(ranks)

    def identities(self, places: Sequence[int], samples: Sequence[int]) -> tuple[int, ...]:
        """What draws are keyed by: of a sample that a step has twice, each occurrence draws its own noise.

        Args:
            places: Of the samples, in the batch.
            samples: ``keys.sample_id`` of each; what it is keyed by where it comes first.
        """
        return tuple(
            sample_id(f"{self.occurrences[place]}/{sample}") if self.occurrences[place] else sample
            for place, sample in zip(places, samples, strict=True)
        )


class Order:
    """The order of a data set: what each step has, and what stands in for a sample that can't be read.

    ``latents`` are the latent shapes that its batches can have; ``batches_per_epoch`` how many steps an epoch has.

    Args:
        index: The data set.
        seed: Of the order, 64 bits.
        global_batch: Units per step.
        plan: Which samples make which step.
    """

    def __init__(self, index: Index, *, seed: int, global_batch: int, plan: Plan) -> None:
        self._index, self._seed, self._plan = index, seed, plan
        self.global_batch = global_batch
        self.batches_per_epoch = plan.batches_per_epoch
        self.latents = tuple(sorted(plan.latents))
        self._batches = lru_cache(maxsize=_BATCHES_KEPT)(self._make_batch)

    @property
    def dropped(self) -> dict[str, int]:
        """Bucket and reason to the samples that an epoch leaves out."""
        return {f"{y.bucket}: {y.reason}": y.left_out for y in self.yields() if y.left_out}

    @property
    def packing(self) -> PackingQuality | None:
        """How well steps are packed; None where they aren't."""
        return self._plan.quality

    def yields(self) -> list[BucketYield]:
        """What becomes of each bucket in an epoch."""
        return self._plan.yields()

    def batch(self, step: int) -> GlobalBatch:
        """The global batch of a step, in time that doesn't grow with the data set."""
        return self._batches(step)

    def _make_batch(self, step: int) -> GlobalBatch:
        planned = self._plan.step(step)
        rows = np.array([row for unit in planned.units for row in unit])
        shapes = np.bincount(self._index.numbers.shape[rows], minlength=len(self._index.shapes))
        counts: dict[Thw, int] = {}
        for number in np.flatnonzero(shapes).tolist():
            latent = self._index.shapes[number].latent
            counts[latent] = counts.get(latent, 0) + int(shapes[number])
        return GlobalBatch(
            units=planned.units,
            shapes=counts,
            text_tokens=int(self._index.text_tokens[rows].max()),
            epoch=planned.epoch,
            digest=xxhash.xxh3_64_hexdigest(self._index.sample_ids[rows].astype("<u8").tobytes()),
            left_out=planned.left_out,
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
        if attempt >= MAX_ATTEMPTS:
            return None
        batch, index = self.batch(step), self._index
        bucket = index.clip_shape(batch.rows[place])
        alike = [p for p, row in enumerate(batch.rows) if index.clip_shape(row) == bucket]
        skip = attempt * len(alike) + alike.index(place)
        rows, taken = index.buckets[bucket], np.array(batch.rows)
        seed, done, size = seed_of(self._seed, *bucket, step), 0, 1024
        while done < len(rows):  # few looks: most samples of a bucket fit
            places = np.arange(done, min(done + size, len(rows)))
            seeds, sizes = np.broadcast_to(seed, places.shape), np.full(len(places), len(rows))
            some = rows[permute(places, sizes=sizes, seeds=seeds)]
            fits = some[(index.text_tokens[some] <= batch.text_tokens) & ~np.isin(some, taken)]
            if skip < len(fits):
                return int(fits[skip])
            skip, done, size = skip - len(fits), done + len(places), 2 * size
        return None


def build_order(
    index: Index,
    data: DataConfig,
    *,
    keys: Keys,
    tokens_of: Callable[[Thw], int] = lambda latent: latent.volume,
    cost_of: Callable[[Thw, int], float] = lambda latent, _text_tokens: float(latent.volume),
) -> Order:
    """The order that a config asks for.

    Args:
        index: The data set.
        data: Section ``data``.
        keys: The run's keys; the order is theirs alone.
        tokens_of: Model tokens of a sample, by its latent shape; default: latent positions.
        cost_of: What a sample costs to compute, by its latent shape and the tokens its text is padded to; default: its positions.
    Raises:
        DataError: Nothing can be trained on: each bucket with the reason; or ``data.image_share`` asks for what there is none of.
    """
    seed = int(torch.empty(1, dtype=torch.int64).random_(generator=keys.generator("order")).item())
    groups = make_groups(index, image_share=data.image_share)
    streams = Streams(index, groups, seed=seed, window_shards=data.shuffle_shards)
    unit_tokens = data.unit_tokens or 0
    plan: Plan
    if data.batching == "packed":
        plan = PackedPlan(
            index,
            streams,
            seed=seed,
            num_packs=data.global_batch,
            budget=unit_tokens,
            tokens_of=tokens_of,
            cost_of=cost_of,
            image_share=data.image_share,
        )
        return Order(index, seed=seed, global_batch=data.global_batch, plan=plan)

    def unit_samples(latent: Thw) -> int:
        return unit_tokens // tokens_of(latent) if data.batching == "tokens" else 1

    if data.batching == "tokens":
        used = {g.bucket for g in groups if g.use}
        check_units(index, [tokens_of(index.latent_of(b)) if b in used else 0 for b in index.buckets], unit_tokens=unit_tokens)
    plan = BucketPlan(
        index, streams, seed=seed, global_batch=data.global_batch, unit_samples=unit_samples, image_share=data.image_share
    )
    return Order(index, seed=seed, global_batch=data.global_batch, plan=plan)


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
