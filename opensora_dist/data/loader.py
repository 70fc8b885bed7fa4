"""Batches of one rank, read ahead by threads, in order.

Threads, not processes: reading, hashing and casting release the GIL, and a worker process would copy every batch twice.

A sample that can't be read does not fail: it is marked, and ``StepData.substitute`` puts others in place of those that any of the
ranks that share them has marked.
"""

# B micro-batch, C latent channels, t h w latent frames, height, width of the region that this rank holds, Y text tokens, E text width

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from itertools import accumulate, pairwise
from types import TracebackType

import torch
from torch import Tensor

from opensora_dist.core.types import Region, Share, Thw
from opensora_dist.data.index import Index
from opensora_dist.data.order import GlobalBatch, Order, micro_places, position_weights
from opensora_dist.data.reader import Damage, RawSample, ShardReader


@dataclass(frozen=True, kw_only=True)
class MicroBatch:
    """Samples of one shape that one data rank runs at once: alone, or as a part of a pack.

    Args:
        latents_BCthw: Normalised, (latent - mean) / std; of ``region`` only.
        latent: Latent shape of the whole samples.
        region: The latents of each sample that this rank holds.
        text_BYE: Token vectors, zero where there is no token; Y is the longest caption of the global batch.
        text_mask_BY: bool, True on tokens.
        samples: ``keys.sample_id`` of each sample.
        keys: Key of each sample.
        weight_B: float64, the loss weight of *each* latent position of the sample: weight x positions of whole samples sums to 1
            over the global batch.
        places: Where in the global batch its samples are.
        bad: What kept this rank from reading each sample, None where it is read; what stands for a bad one is finite. Empty: all read.
        replaced: How many samples are not those of the plan; counted by one of the ranks that share them.
    """

    latents_BCthw: Tensor
    latent: Thw
    region: Region
    text_BYE: Tensor
    text_mask_BY: Tensor
    samples: tuple[int, ...]
    keys: tuple[str, ...]
    weight_B: Tensor
    places: tuple[int, ...] = ()
    bad: tuple[Damage | None, ...] = ()
    replaced: int = 0


Substitute = Callable[[MicroBatch, Sequence[bool], int], MicroBatch]
"""Puts substitutes in place of the samples marked; which ones depends on the attempt. Writes into the tensors it is given."""


@dataclass(frozen=True, kw_only=True)
class StepData:
    """One rank's part of a global batch; ``epoch`` and ``digest`` are those of the whole, as it was planned.

    Args:
        micros: What the rank runs, in order.
        packs: How many of ``micros`` are run at once, as one sequence, one pack after the other. Empty: each by itself.
        shapes: How many samples of each latent shape the global batch has.
        substitute: For samples that can't be read, before the step that was got last from the loader is over.
    """

    step: int
    epoch: int
    digest: str
    micros: list[MicroBatch]
    substitute: Substitute
    shapes: Mapping[Thw, int]
    packs: tuple[int, ...] = ()

    @property
    def runs(self) -> list[range]:
        """Which of ``micros`` are run at once."""
        ends = accumulate(self.packs or [1] * len(self.micros), initial=0)
        return [range(first, last) for first, last in pairwise(ends)]


@dataclass(frozen=True, kw_only=True)
class BadSample:
    """A sample that this rank could not read, and what took its place.

    Args:
        step: The step it was planned for.
        key: Of the sample.
        damage: What is wrong with it.
        substitute: Key of the sample that took its place (which may turn out bad in turn); None: its weight became zero.
    """

    step: int
    key: str
    damage: Damage
    substitute: str | None


class Loader:
    """Iterates over the steps of a run, once.

    Args:
        index: The data set.
        order: Its order.
        share: What of the batches of a latent shape is this rank's; asked once for every shape of the order.
        accum: Micro-batches per step.
        start_step: First step (0, or where a resumed run goes on).
        num_steps: How many steps from there.
        loss_weight: As in ``position_weights``.
        reader_threads: Threads that read.
        prefetch_batches: Micro-batches read ahead at most.
        dtype: float32 or float64, of latents and text.
        device: Where the tensors go.
        damaged: Whether the first sample of this rank in a step is to read as damaged, for drills; asked once a step, ahead of it.
        on_bad: Told of each sample that was replaced because this rank could not read it.
    Raises:
        ConfigError: The global batch does not divide into micro-batches, for batches of some shape.
    """

    def __init__(
        self,
        index: Index,
        order: Order,
        *,
        share: Callable[[Thw], Share],
        accum: int,
        start_step: int,
        num_steps: int,
        loss_weight: str,
        reader_threads: int,
        prefetch_batches: int,
        dtype: torch.dtype,
        device: torch.device,
        damaged: Callable[[int], bool] = lambda _step: False,
        on_bad: Callable[[BadSample], None] = lambda _bad: None,
    ) -> None:
        self._shares = {latent: share(latent) for latent in order.latents}
        for mine in self._shares.values():
            micro_places(
                [1] * order.global_batch, data_rank=mine.data_rank, data_size=mine.data_size, accum=accum, micro=0
            )  # divides?
        self.last_wait_s = 0.0
        self._index, self._order = index, order
        self._accum = accum
        self._steps = range(start_step, start_step + num_steps)
        self._loss_weight, self._prefetch_batches = loss_weight, prefetch_batches
        self._dtype, self._device, self._damaged = dtype, device, damaged
        self._known: dict[int, Damage] = {}  # row -> what is wrong with it: it is not read a second time
        self._on_bad = on_bad
        self._mean_C111, self._std_C111 = (
            torch.tensor(values, dtype=dtype).view(-1, 1, 1, 1) for values in (index.spec.latent_mean, index.spec.latent_std)
        )
        self._pool = ThreadPoolExecutor(max_workers=reader_threads, thread_name_prefix="shard-reader")
        self._thread = threading.local()
        self._readers: list[ShardReader] = []
        self._pending: deque[Future[list[MicroBatch]]] = deque()

    def __iter__(self) -> Iterator[StepData]:
        todo = ((step, self._order.batch(step), micro) for step in self._steps for micro in range(self._accum))
        try:
            for _ in range(self._prefetch_batches):
                self._submit_next(todo)
            for step in self._steps:
                batch, wait_s, micros, packs = self._order.batch(step), 0.0, [], []
                for _ in range(self._accum):
                    began = time.perf_counter()
                    pack = self._pending.popleft().result()
                    wait_s += time.perf_counter() - began
                    self._submit_next(todo)
                    micros += [self._to_device(micro) for micro in pack]
                    packs.append(len(pack))
                self.last_wait_s = wait_s
                yield StepData(
                    step=step,
                    epoch=batch.epoch,
                    digest=batch.digest,
                    micros=micros,
                    substitute=partial(self._substitute, step, batch),
                    shapes=batch.shapes,
                    packs=tuple(packs),
                )
        except BaseException:  # the consumer broke off, or a read failed; whether to wait for the threads, ``__exit__`` knows
            self._pool.shutdown(wait=False, cancel_futures=True)
            raise
        self.close()

    def __enter__(self) -> Loader:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        """After an error a thread may be stuck in a read for as long as its disk is: nothing waits for it."""
        if error is None:
            self.close()
        else:
            self._pool.shutdown(wait=False, cancel_futures=True)

    def close(self) -> None:
        """Stops the threads, waits for them, and closes the files. May be called again."""
        self._pool.shutdown(wait=True, cancel_futures=True)
        self._pending.clear()
        while self._readers:
            self._readers.pop().close()

    def _submit_next(self, todo: Iterator[tuple[int, GlobalBatch, int]]) -> None:
        if (work := next(todo, None)) is not None:
            self._pending.append(self._pool.submit(self._load, *work))

    def _load(self, step: int, batch: GlobalBatch, micro: int) -> list[MicroBatch]:
        """The samples that are run at once, one part per shape. Runs in a reader thread."""
        mine = self._shares[next(iter(batch.shapes))]  # which samples are whose is the same for all shapes of a batch
        units, rows = [len(unit) for unit in batch.units], batch.rows
        places = micro_places(units, data_rank=mine.data_rank, data_size=mine.data_size, accum=self._accum, micro=micro)
        if micro == 0 and self._damaged(step):
            row = rows[places[0]]
            self._known[row] = Damage(shard=self._index.shard_path(row).name, reason="damaged by fault.bad_sample")
        parts: dict[Thw, list[int]] = {}
        for place in places:
            parts.setdefault(self._index.latent_shape(rows[place]), []).append(place)
        return [self._assemble(batch, [rows[place] for place in part], part) for part in parts.values()]

    def _assemble(self, batch: GlobalBatch, rows: Sequence[int], places: Sequence[int]) -> MicroBatch:
        """Samples of one shape in places of a global batch, in CPU memory. Runs in any thread."""
        index, pin, latent = self._index, self._device.type == "cuda", self._index.latent_shape(batch.rows[places[0]])
        region, tokens = self._shares[latent].region, batch.text_tokens
        shape = (len(rows), index.spec.channels, *region.shape(latent))
        latents = torch.empty(shape, dtype=self._dtype, pin_memory=pin)
        text = torch.zeros((len(rows), tokens, index.spec.text_width), dtype=self._dtype, pin_memory=pin)
        mask = torch.zeros((len(rows), tokens), dtype=torch.bool, pin_memory=pin)
        samples = self._read(rows, region)
        for b, sample in enumerate(samples):
            if isinstance(sample, Damage):
                _blank(latents[b], text[b], mask[b])
                continue
            latents[b].copy_(torch.from_numpy(sample.latents[:, :, region.h0 : region.h1]).transpose(0, 1))
            text[b, : len(sample.text)].copy_(torch.from_numpy(sample.text))
            mask[b, : len(sample.text)] = True
        latents.sub_(self._mean_C111).div_(self._std_C111)
        positions = [index.latent_shape(row) for row in batch.rows]
        weights = position_weights(self._loss_weight, [p.t * p.h * p.w for p in positions])
        return MicroBatch(
            latents_BCthw=latents,
            latent=latent,
            region=region,
            text_BYE=text,
            text_mask_BY=mask,
            samples=tuple(index.sample_id(row) for row in rows),
            keys=tuple(index.key[row] for row in rows),
            weight_B=torch.tensor([weights[place] for place in places], dtype=torch.float64, pin_memory=pin),
            places=tuple(places),
            bad=tuple(sample if isinstance(sample, Damage) else None for sample in samples),
        )

    def _read(self, rows: Sequence[int], region: Region) -> list[RawSample | Damage]:
        """Valid until this thread's next call."""
        if not hasattr(self._thread, "reader"):
            self._thread.reader = ShardReader(self._index)
            self._readers.append(self._thread.reader)
        wanted = [row for row in rows if row not in self._known]
        found = dict(zip(wanted, self._thread.reader.try_read(wanted, frames=region.frames), strict=True))
        self._known.update((row, sample) for row, sample in found.items() if isinstance(sample, Damage))
        return [self._known[row] if row in self._known else found[row] for row in rows]

    def _substitute(self, step: int, batch: GlobalBatch, micro: MicroBatch, bad: Sequence[bool], attempt: int) -> MicroBatch:
        """As ``Substitute`` says. Runs in the consumer's thread: it is rare, and what other ranks found bad is known only there."""
        wanted = {b: self._order.substitute(step, micro.places[b], attempt) for b in range(len(bad)) if bad[b]}
        found = {b: row for b, row in wanted.items() if row is not None}
        others = self._assemble(batch, list(found.values()), [micro.places[b] for b in found]) if found else micro
        samples, keys, damage = list(micro.samples), list(micro.keys), list(micro.bad)
        for b in wanted:
            substitute = self._index.key[found[b]] if b in found else None
            if (why := micro.bad[b]) is not None:
                self._on_bad(BadSample(step=step, key=micro.keys[b], damage=why, substitute=substitute))
            if b not in found:
                _blank(micro.latents_BCthw[b], micro.text_BYE[b], micro.text_mask_BY[b])
                micro.weight_B[b] = 0
                damage[b] = None
        for i, b in enumerate(found):
            for name in ("latents_BCthw", "text_BYE", "text_mask_BY"):
                getattr(micro, name)[b].copy_(getattr(others, name)[i])
            samples[b], keys[b], damage[b] = others.samples[i], others.keys[i], others.bad[i]
        return replace(micro, samples=tuple(samples), keys=tuple(keys), bad=tuple(damage))

    def _to_device(self, micro: MicroBatch) -> MicroBatch:
        """From pinned memory without waiting; the allocator keeps it until the copy is done."""
        if self._device.type == "cpu":
            return micro
        names = ("latents_BCthw", "text_BYE", "text_mask_BY", "weight_B")
        return replace(micro, **{n: getattr(micro, n).to(self._device, non_blocking=True) for n in names})


def _blank(latents_Cthw: Tensor, text_YE: Tensor, text_mask_Y: Tensor) -> None:
    """What stands where no sample is: finite, and with one token, since attention to none is not a number."""
    latents_Cthw.zero_()
    text_YE.zero_()
    text_mask_Y.zero_()
    text_mask_Y[0] = True
