"""What of a step is known before anything is read: planned once a step, in the threads that read."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from opensora_dist.core.types import Share, Thw
from opensora_dist.data.index import Index
from opensora_dist.data.order import GlobalBatch, Order, micro_places, position_weights


@dataclass(frozen=True, kw_only=True)
class StepPlan:
    """What all micro-batches of a step share.

    Args:
        batch: The global batch.
        places: Of this rank's samples in it, for each micro-batch.
        weights: Of each place of the global batch.
        shards: In which this rank's samples lie, in the order in which they come.
    """

    batch: GlobalBatch
    places: Sequence[range]
    weights: Sequence[float]
    shards: Sequence[int]


class Planner:
    """Plans the steps of one rank. Any thread may use it.

    Args:
        index: The data set.
        order: Its order.
        shares: What of the batches of each latent shape is this rank's.
        accum: Micro-batches per step.
        loss_weight: As in ``position_weights``.
    Raises:
        ConfigError: The global batch does not divide into micro-batches, for batches of some shape.
    """

    def __init__(self, index: Index, order: Order, *, shares: Mapping[Thw, Share], accum: int, loss_weight: str) -> None:
        self._index, self._order, self._shares = index, order, shares
        self._accum, self._loss_weight = accum, loss_weight
        self._volumes = np.array([shape.latent.volume for shape in index.shapes])
        self._one_asks = threading.Lock()
        for mine in shares.values():
            self._places([1] * order.global_batch, mine)  # divides?

    def plan(self, step: int) -> StepPlan:
        """Of a large batch it takes milliseconds, which a step has no time for."""
        with self._one_asks:
            batch = self._order.batch(step)
        mine = self._shares[next(iter(batch.shapes))]  # which samples are whose is the same for all shapes of a batch
        places = self._places([len(unit) for unit in batch.units], mine)
        rows = np.array(batch.rows)
        return StepPlan(
            batch=batch,
            places=places,
            weights=position_weights(self._loss_weight, self._volumes[self._index.numbers.shape[rows]].tolist()),
            shards=self._index.shard[rows[places[0].start : places[-1].stop]].tolist(),
        )

    def substitute(self, step: int, place: int, attempt: int) -> int | None:
        """``Order.substitute``."""
        with self._one_asks:
            return self._order.substitute(step, place, attempt)

    def _places(self, units: Sequence[int], mine: Share) -> list[range]:
        """Of this rank's samples, for each micro-batch."""
        return [
            micro_places(units, data_rank=mine.data_rank, data_size=mine.data_size, accum=self._accum, micro=micro)
            for micro in range(self._accum)
        ]
