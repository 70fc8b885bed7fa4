"""Which samples make which step: a batch of one bucket, or packs of all of them. Both in time that doesn't grow with the data set."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from opensora_dist.core.errors import DataError
from opensora_dist.core.types import Thw
from opensora_dist.data.index import Index
from opensora_dist.data.packing import Packing, pack
from opensora_dist.data.permutation import Merge, permute, seed_of
from opensora_dist.data.streams import Streams

_FILLS = (0.99, 0.98, 0.97, 0.96, 0.955, 0.95, 0.94, 0.92, 0.9, 0.87, 0.84, 0.8, 0.75, 0.7, 0.65, 0.6, 0.55, 0.5, 0.4, 0.3)
_TRIAL_STEPS = 32
_MAX_LEFT_OUT = 0.0002
_MAX_LEFT_OUT_OF_ONE = 0.02  # of any bucket: all clips of a rare one may be fewer than the above
_MAX_IMBALANCE = 0.02  # of the worst of these; others may be somewhat worse
_FULL = 0.9
_LEAST_FOR_BALANCE = 0.95  # of the fullest that leaves nothing out: packs are not left emptier only to cost alike


@dataclass(frozen=True, kw_only=True)
class Planned:
    """The samples of a step.

    Args:
        units: Rows of the index, unit by unit.
        left_out: Rows that the step took and had no room for.
    """

    epoch: int
    units: tuple[tuple[int, ...], ...]
    left_out: tuple[int, ...] = ()


@dataclass(frozen=True, kw_only=True)
class BucketYield:
    """What becomes of one bucket in an epoch.

    Args:
        samples: How many there are.
        planned: How many an epoch is to take, by weights and shares; more than there are where these repeat them.
        used_per_epoch: How many places in batches they take; of packs about, since that follows from packing some of the steps.
        steps_per_epoch: Steps that have samples of it.
        reason: Why some are left out; "" where none is.
    """

    bucket: Thw
    samples: int
    planned: int
    used_per_epoch: int
    steps_per_epoch: int
    reason: str

    @property
    def left_out(self) -> int:
        """Samples, or repetitions of some, that an epoch doesn't have."""
        return max(self.samples, self.planned) - self.used_per_epoch


@dataclass(frozen=True, kw_only=True)
class PackingQuality:
    """How well steps are packed, on average over some of them.

    Args:
        fill: Share of the budget of tokens that is used.
        imbalance: How much more than the mean the costliest pack of a step costs.
        most_imbalance: The same, of the worst step rather than on average.
        all_left_out: Share of the samples that have no room in their step.
        left_out: The same, by bucket.
    """

    fill: float
    imbalance: float
    most_imbalance: float
    all_left_out: float
    left_out: Mapping[Thw, float]

    @property
    def warning(self) -> str:
        """What to do where packs stay rather empty; "" where they don't."""
        if self.fill >= _FULL:
            return ""
        return (
            f"packs are only {self.fill:.0%} full on average, since fuller ones would leave samples out; use a larger data.unit_tokens "
            "(room beside the largest samples), or a smaller data.global_batch (an epoch of few steps is cut coarsely)"
        )


class Plan(Protocol):
    """Steps, by number. ``latents`` are all latent shapes that any step can hold."""

    batches_per_epoch: int
    latents: frozenset[Thw]

    def step(self, number: int) -> Planned:
        """The samples of a step."""

    def yields(self) -> list[BucketYield]:
        """What becomes of each bucket."""

    @property
    def quality(self) -> PackingQuality | None:
        """Of packs."""


class _Buckets:
    """The groups of streams, by bucket."""

    def __init__(self, index: Index, streams: Streams, *, image_share: float | None) -> None:
        self.names = list(index.buckets)
        self.samples = np.array([len(rows) for rows in index.buckets.values()])
        self.latents = [index.latent_of(bucket) for bucket in self.names]
        self.of_group = np.array([self.names.index(g.bucket) for g in streams.groups])
        self.use_of_group = np.array([g.use for g in streams.groups])
        self.use = np.bincount(self.of_group, weights=self.use_of_group, minlength=len(self.names)).astype(np.int64)
        given = [] if image_share is None else [f"data.image_share={image_share:g}"]
        self._shares = given + ["weights of data.mixture"] * any(s.weight is not None for s in index.sets)

    def latents_of(self, used: NDArray[np.int64]) -> frozenset[Thw]:
        """Of the buckets that have something used."""
        return frozenset(self.latents[i] for i in np.flatnonzero(used))

    def result(self, i: int, *, used: int, steps: int, why: Sequence[str]) -> BucketYield:
        """What becomes of a bucket.

        Args:
            why: Reasons why an epoch has fewer than planned.
        """
        planned, samples = int(self.use[i]), int(self.samples[i])
        reasons = [*self._shares] * (planned < samples) + [*why] * (planned > used)
        return BucketYield(
            bucket=self.names[i],
            samples=samples,
            planned=planned,
            used_per_epoch=used,
            steps_per_epoch=steps,
            reason=", ".join(reasons),
        )


class BucketPlan:
    """Each step has one bucket: batches of all buckets are spread evenly over the epoch.

    The samples of an epoch that fill no batch of their bucket are left out of it; those of the next epoch are others.

    Args:
        index: The data set.
        streams: Its samples in order.
        seed: Of the order of steps.
        global_batch: Units per step.
        unit_samples: Samples of a unit, by latent shape.
        field: What makes batches too large, for errors.
    Raises:
        DataError: No bucket fills a batch.
    """

    quality = None

    def __init__(
        self,
        index: Index,
        streams: Streams,
        *,
        seed: int,
        global_batch: int,
        unit_samples: Callable[[Thw], int],
        image_share: float | None,
    ) -> None:
        self._streams, self._seed, self._units = streams, seed, global_batch
        self._buckets = _Buckets(index, streams, image_share=image_share)
        self._batch = np.array([global_batch * max(1, unit_samples(latent)) for latent in self._buckets.latents])
        self._steps = self._buckets.use // self._batch
        self.batches_per_epoch = int(self._steps.sum())
        if not self.batches_per_epoch:
            raise DataError(self._nothing(index))
        self.latents = self._buckets.latents_of(self._steps)
        self._order = lru_cache(maxsize=4)(self._make_order)

    def step(self, number: int) -> Planned:
        epoch, k = divmod(number, self.batches_per_epoch)
        order, members = self._order(epoch)
        (bucket,), (batch,) = order.members(k, k + 1)
        size = int(self._batch[bucket])
        groups = np.flatnonzero(self._buckets.of_group == bucket)
        which, numbers = members[bucket].members(int(batch) * size, int(batch + 1) * size)
        rows = self._streams.rows(groups[which], numbers, epoch=epoch).reshape(self._units, -1)
        return Planned(epoch=epoch, units=tuple(map(tuple, rows.tolist())))

    def yields(self) -> list[BucketYield]:
        counts = zip((self._steps * self._batch).tolist(), self._steps.tolist(), strict=True)
        return [self._buckets.result(i, used=n, steps=steps, why=[self._why(i)]) for i, (n, steps) in enumerate(counts)]

    def _make_order(self, epoch: int) -> tuple[Merge, list[Merge]]:
        """Of the buckets' batches, and of each bucket's groups."""
        b, ones = self._buckets, np.ones_like
        seeds = seed_of(self._seed, epoch, np.arange(len(b.names) + 1)).tolist()
        by_bucket = [b.use_of_group[b.of_group == i] for i in range(len(b.names))]
        members = [Merge(use, ones(use), seed=seed) for use, seed in zip(by_bucket, seeds)]
        return Merge(self._steps, ones(self._steps), seed=seeds[-1]), members

    def _why(self, i: int) -> str:
        batch = int(self._batch[i])
        return "tail of each epoch" if self._steps[i] else f"fewer than a global batch of {batch}"

    def _nothing(self, index: Index) -> str:
        b = self._buckets
        counts = ", ".join(f"{name}: {n} of {size}" for name, n, size in zip(b.names, b.use, self._batch))
        most = int((b.use // (self._batch // self._units)).max())
        ways = f"use data.global_batch={most} or less, " if most else "use a smaller data.unit_tokens, "
        return (
            f"data.global_batch={self._units} is more than any bucket of {index.where} holds, and a batch has one shape (samples per "
            f"bucket, of how many that a batch takes: {counts}); {ways}prepare more clips, or list fewer clip.buckets when preparing"
        )


class PackedPlan:
    """Each step has samples of all buckets, in the share the epoch has them, packed so that packs cost alike.

    The samples of all groups are merged evenly, and the merge is cut into steps of equal tokens (of equal numbers of samples, where
    a step has few). How full packs are planned follows from packing some steps: as full as leaves out (almost) nothing and
    keeps costs together.

    Args:
        index: The data set.
        streams: Its samples in order.
        seed: Of the order of samples.
        num_packs: Units per step.
        budget: Tokens of a unit at most.
        tokens_of: Of a sample, by latent shape.
        cost_of: Of a sample, by latent shape and the tokens its text is padded to.
    Raises:
        DataError: Samples that are larger than a unit, or fewer samples than units.
    """

    def __init__(
        self,
        index: Index,
        streams: Streams,
        *,
        seed: int,
        num_packs: int,
        budget: int,
        tokens_of: Callable[[Thw], int],
        cost_of: Callable[[Thw, int], float],
        image_share: float | None,
    ) -> None:
        self._index, self._streams, self._seed, self._packs, self._budget = index, streams, seed, num_packs, budget
        self._buckets = b = _Buckets(index, streams, image_share=image_share)
        self.latents = b.latents_of(b.use)
        self._tokens = np.array([tokens_of(latent) for latent in b.latents])
        self._costs = lru_cache(maxsize=64)(lambda text: np.array([float(cost_of(latent, text)) for latent in b.latents]))
        check_units(index, [n if use else 0 for n, use in zip(self._tokens.tolist(), b.use)], unit_tokens=budget)
        total = int(b.use.sum())
        if total < num_packs:
            raise DataError(
                f"data.global_batch={num_packs} packs are more than the {total} samples of {index.where}; use data.global_batch={total} "
                "or less, or prepare more clips"
            )
        self._merge = lru_cache(maxsize=4)(self._make_merge)
        self._choose_pace()

    @property
    def quality(self) -> PackingQuality:
        return self._quality

    def step(self, number: int) -> Planned:
        epoch, k = divmod(number, self.batches_per_epoch)
        rows, bucket, packing = self._pack(epoch, k)
        # Which samples of a bucket go where, and which rank gets which pack, says the seed: neither follows the order of the index.
        rows = rows[np.lexsort((seed_of(self._seed, number, 0, np.arange(len(rows))), bucket))]
        counts = packing.counts[np.argsort(seed_of(self._seed, number, 1, np.arange(self._packs)))]
        room = np.concatenate([counts.T, packing.left_out[:, None]], axis=1)  # [buckets, packs and none]
        pack_of = np.repeat(np.tile(np.arange(self._packs + 1), len(room)), room.ravel())
        by_pack = rows[np.argsort(pack_of, kind="stable")]
        ends = np.cumsum(room.sum(axis=0))
        parts = [part.tolist() for part in np.split(by_pack, ends[:-1])]
        return Planned(epoch=epoch, units=tuple(map(tuple, parts[:-1])), left_out=tuple(parts[-1]))

    def yields(self) -> list[BucketYield]:
        b, found = self._buckets, []
        after = b.use_of_group - self._merge(0).cut(self._used)  # of any epoch within one
        tails = np.bincount(b.of_group, weights=after, minlength=len(b.names)).astype(int).tolist()
        for i, (name, tail) in enumerate(zip(b.names, tails, strict=True)):
            planned = int(b.use[i])
            lost = round(self._quality.left_out[name] * (planned - tail))
            why = ["tail of each epoch"] * (tail > 0) + ["about: no room in its step"] * (lost > 0)
            used = planned - tail - lost
            found.append(b.result(i, used=used, steps=min(self.batches_per_epoch, used), why=why))
        return found

    def _make_merge(self, epoch: int) -> Merge:
        seed = int(seed_of(self._seed, epoch)[0])
        return Merge(self._buckets.use_of_group, self._weights, seed=seed)

    def _pack(self, epoch: int, k: int) -> tuple[NDArray[np.int64], NDArray[np.int64], Packing]:
        """Rows of a step, bucket by bucket; the bucket of each; how they are packed."""
        merge, b = self._merge(epoch), self._buckets
        start, stop = (merge.cut(i * self._used // self.batches_per_epoch) for i in (k, k + 1))
        counts = stop - start
        groups = np.repeat(np.arange(len(counts)), counts)
        numbers = np.arange(len(groups)) - np.repeat(np.cumsum(counts) - counts, counts) + start[groups]
        rows, bucket = self._streams.rows(groups, numbers, epoch=epoch), b.of_group[groups]
        packing = pack(
            np.bincount(bucket, minlength=len(b.names)),
            tokens=self._tokens,
            costs=self._costs(int(self._index.text_tokens[rows].max())),
            num_packs=self._packs,
            budget=self._budget,
        )
        return rows, bucket, packing

    def _choose_pace(self) -> None:
        """How much a step takes: the fullest packs that leave out next to nothing and are balanced; else that leave out nothing."""
        b, room = self._buckets, self._packs * self._budget
        tokens, total = self._tokens[b.of_group], int(b.use.sum())
        all_tokens = int((tokens * b.use_of_group).sum())
        paces = [(self._pace(fill * room, all_tokens, total), fill) for fill in _FILLS]
        paces.append(((False, self._packs, max(1, total // self._packs)), 0.0))  # as many samples as packs always fit
        full: tuple[tuple[bool, int, int], float] | None = None
        for pace, fill in paces:
            if full is not None and fill < full[1] * _LEAST_FOR_BALANCE:
                break
            self._set_pace(pace, tokens, all_tokens)
            self._quality = quality = self._try()
            if quality.all_left_out > _MAX_LEFT_OUT or max(quality.left_out.values()) > _MAX_LEFT_OUT_OF_ONE:
                continue
            if quality.most_imbalance <= _MAX_IMBALANCE:
                return
            full = full or (pace, fill)
        assert full is not None
        self._set_pace(full[0], tokens, all_tokens)
        self._quality = self._try()

    def _pace(self, step_tokens: float, all_tokens: int, total: int) -> tuple[bool, int, int]:
        """Whether steps are cut by tokens, how many samples or tokens one takes, and how many steps there are."""
        b = self._buckets
        steps = -(-all_tokens // max(1, int(step_tokens)))
        slack = 2 * int(self._tokens[b.of_group].sum())
        sure = (all_tokens / steps - slack) / all_tokens * total - 2 * len(b.of_group)  # samples of any step at least
        if sure >= self._packs:
            return True, all_tokens // steps, steps
        size = max(self._packs, int(step_tokens * total / all_tokens))
        return False, size, max(1, total // size)

    def _set_pace(self, pace: tuple[bool, int, int], tokens: NDArray[np.int64], all_tokens: int) -> None:
        by_tokens, size, self.batches_per_epoch = pace
        self._weights = tokens if by_tokens else np.ones_like(tokens)
        self._used = all_tokens if by_tokens else min(size * self.batches_per_epoch, int(self._buckets.use.sum()))
        self._merge.cache_clear()

    def _try(self) -> PackingQuality:
        """Packs some steps of the first epoch; fewer where these already leave out too much."""
        b, count = self._buckets, min(_TRIAL_STEPS, self.batches_per_epoch)
        allowed = _MAX_LEFT_OUT * count * int(b.use.sum()) / self.batches_per_epoch
        filled, imbalance, left, taken = 0, [], np.zeros(len(b.names)), np.zeros(len(b.names))
        sizes, seeds = np.full(count, self.batches_per_epoch), np.repeat(seed_of(self._seed, self._packs), count)
        for k in permute(np.arange(count), sizes=sizes, seeds=seeds).tolist():
            rows, bucket, packing = self._pack(0, k)
            filled += int((packing.counts @ self._tokens).sum())
            imbalance.append(packing.imbalance(self._costs(int(self._index.text_tokens[rows].max()))))
            left += packing.left_out
            taken += np.bincount(bucket, minlength=len(b.names))
            if left.sum() > allowed:
                break
        share = left / np.maximum(taken, 1)
        return PackingQuality(
            fill=filled / (len(imbalance) * self._packs * self._budget),
            imbalance=sum(imbalance) / len(imbalance),
            most_imbalance=max(imbalance),
            all_left_out=float(left.sum() / taken.sum()),
            left_out={name: float(s) for name, s in zip(b.names, share)},
        )


def check_units(index: Index, tokens: Sequence[int], *, unit_tokens: int) -> None:
    """
    Args:
        tokens: Of a sample of each bucket.
    Raises:
        DataError: A sample has more than a unit takes.
    """
    large = {bucket: n for bucket, n in zip(index.buckets, tokens, strict=True) if n > unit_tokens}
    if large:
        said = ", ".join(f"{bucket}: {n:,}" for bucket, n in large.items())
        raise DataError(
            f"data.unit_tokens={unit_tokens} is less than one sample of some buckets of {index.where} has (tokens: {said}); use "
            f"data.unit_tokens={max(large.values())} or more, or leave these out of clip.buckets when preparing"
        )
