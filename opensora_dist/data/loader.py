"""Batches of one rank, read ahead by threads, in order.

Threads, not processes: reading and hashing release the GIL, and a worker process would copy every batch twice. What they fill is a ring of
slots that are used again: in each lie the samples that are run at once, in the precision in which they are stored. Only the consumer, or
its GPU, makes the numbers of it that training computes with.

A sample that can't be read does not fail: it is marked, and ``StepData.substitute`` puts others in place of those that any of the
ranks that share them has marked.
"""

# B micro-batch, C latent channels, t h w latent frames, height, width of the region that this rank holds (H: all rows), Y text tokens,
# E text width

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from itertools import accumulate, islice, pairwise
from types import TracebackType

import torch
from torch import Tensor

from opensora_dist.core.types import Region, Share, Thw
from opensora_dist.data.ahead import Planner, StepPlan
from opensora_dist.data.buffers import Slot
from opensora_dist.data.collate import StoredBatch, collate
from opensora_dist.data.index import Index
from opensora_dist.data.order import Order
from opensora_dist.data.reader import Damage, ShardReader, Target


@dataclass(frozen=True, kw_only=True)
class MicroBatch:
    """Samples of one shape that one data rank runs at once: alone, or as a part of a pack.

    Args:
        latents_BCthw: Normalised, (latent - mean) / std; of ``region`` only.
        latent: Latent shape of the whole samples.
        region: The latents of each sample that this rank holds.
        text_BYE: Token vectors, zero where there is no token; Y is the longest caption of the global batch.
        text_mask_BY: bool, True on tokens.
        samples: What draws of each sample are keyed by: its ``keys.sample_id``, and where a step has it twice, which of these it is.
        keys: Key of each sample, read from the index when looked at.
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
    keys: Sequence[str]
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
        left_out: How many samples of the step no pack had room for, over all ranks.
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
    left_out: int = 0

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


@dataclass(frozen=True, kw_only=True)
class _Pending:
    """What is being read for a batch, and where to."""

    plan: Future[StepPlan]
    slot: Slot
    pack: Future[list[StoredBatch]]


_STEPS_AHEAD = 4  # that are planned ahead, and of which a source of remote shards is told what they read
_STOP_S = 0.05  # a read that goes on for longer waits for its shard


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
        reader_threads: Threads that read, each a micro-batch of its own.
        prefetch_batches: Micro-batches read ahead at most: slots of the ring.
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
        self._planner = Planner(index, order, shares=self._shares, accum=accum, loss_weight=loss_weight)
        self.last_wait_s = 0.0
        self._index, self._accum = index, accum
        self._steps = range(start_step, start_step + num_steps)
        self._dtype, self._device, self._damaged = dtype, device, damaged
        self._known: dict[int, Damage] = {}  # row -> what is wrong with its bytes: it is not read a second time
        self._on_bad = on_bad
        self._mean_C111, self._std_C111 = (
            torch.tensor(values, dtype=dtype, device=device).view(-1, 1, 1, 1)
            for values in (index.spec.latent_mean, index.spec.latent_std)
        )
        # A thread begins on GPU 0, where whatever it does first makes a context: half a GiB for every rank of the machine.
        on_gpu = partial(torch.cuda.set_device, device) if device.type == "cuda" else None
        self._pool = ThreadPoolExecutor(max_workers=reader_threads, thread_name_prefix="shard-reader", initializer=on_gpu)
        self._thread = threading.local()
        self._readers: list[ShardReader] = []
        self._slots = [Slot(pinned=device.type == "cuda") for _ in range(prefetch_batches)]
        # Copies to the GPU run beside what training computes there.
        self._copies = torch.cuda.Stream(device) if device.type == "cuda" else None  # type: ignore[no-untyped-call]
        self._pending: deque[_Pending] = deque()
        self._todo = self._work()

    @property
    def buffer_bytes(self) -> int:
        """What the ring holds by now: at most ``prefetch_batches`` times the largest micro-batch as it is stored, text padded."""
        return sum(slot.num_bytes for slot in self._slots)

    def __iter__(self) -> Iterator[StepData]:
        with self._reading():
            for step in self._steps:
                wait_s, micros, packs = 0.0, [], []
                for _ in range(self._accum):
                    taken, began = self._pending[0], time.perf_counter()
                    pack = taken.pack.result()
                    wait_s += time.perf_counter() - began
                    self._pending.popleft()
                    micros += [self._micro_batch(stored) for stored in pack]
                    self._fill(taken.slot)
                    packs.append(len(pack))
                plan = taken.plan.result()
                batch, self.last_wait_s = plan.batch, wait_s
                yield StepData(
                    step=step,
                    epoch=batch.epoch,
                    digest=batch.digest,
                    micros=micros,
                    substitute=partial(self._substitute, step, plan),
                    shapes=batch.shapes,
                    packs=tuple(packs),
                    left_out=len(batch.left_out),
                )

    def stored(self) -> Iterator[list[StoredBatch]]:
        """What is run at once, in order, as it lies in the ring: valid until the next is asked for. In place of iterating over steps."""
        with self._reading():
            for _ in range(len(self._steps) * self._accum):
                yield self._pending[0].pack.result()
                self._fill(self._pending.popleft().slot)

    def __enter__(self) -> Loader:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        """After an error a thread may be stuck with its disk. This doesn't wait for it; Python's end, which the command line skips, does."""
        if error is None:
            self.close()
        else:
            self._pool.shutdown(wait=False, cancel_futures=True)

    def close(self) -> None:
        """Stops the threads, waits for them, and closes the files. What is being fetched for them is given up. May be called again."""
        self._pool.shutdown(wait=False, cancel_futures=True)
        running = [pending.pack for pending in self._pending if not pending.pack.cancelled()]
        while wait(running, timeout=_STOP_S).not_done:  # after one shard of a batch comes the next
            self._index.shard_source.close()
        self._pool.shutdown(wait=True)
        self._index.shard_source.close()
        self._pending.clear()
        while self._readers:
            self._readers.pop().close()

    @contextmanager
    def _reading(self) -> Iterator[None]:
        try:
            for slot in self._slots:
                self._fill(slot)
            yield
        except BaseException:  # the consumer broke off, or a read failed; whether to wait for the threads, ``__exit__`` knows
            self._pool.shutdown(wait=False, cancel_futures=True)
            raise
        self.close()

    def _fill(self, slot: Slot) -> None:
        """Has the next micro-batch read into a slot that is free, if there is one to come."""
        if (work := next(self._todo, None)) is not None:
            pack = self._pool.submit(self._load, *work, slot)
            self._pending.append(_Pending(plan=work[1][0], slot=slot, pack=pack))

    def _work(self) -> Iterator[tuple[int, Sequence[Future[StepPlan]], int]]:
        """Steps, the plans of each and of those that follow, and micro-batches, in order. Plans are asked for before what needs them."""
        steps, coming = iter(self._steps), deque[tuple[int, Future[StepPlan]]]()
        while True:
            coming.extend(
                (step, self._pool.submit(self._planner.plan, step)) for step in islice(steps, 1 + _STEPS_AHEAD - len(coming))
            )
            if not coming:
                return
            plans = [plan for _, plan in coming]
            step, _ = coming.popleft()
            for micro in range(self._accum):
                yield step, plans, micro

    def _load(self, step: int, plans: Sequence[Future[StepPlan]], micro: int, slot: Slot) -> list[StoredBatch]:
        """The samples that are run at once, one part per shape. Runs in a reader thread.

        The source of the shards is told which come next, so that it can fetch them ahead.
        """
        plan = plans[0].result()
        if micro == 0:
            self._index.shard_source.prefetch(list(dict.fromkeys(shard for p in plans for shard in p.result().shards)))
        rows, places = plan.batch.rows, plan.places[micro]
        if micro == 0 and self._damaged(step):
            row = rows[places[0]]
            self._known[row] = Damage(shard=self._index.shard_path(row).name, reason="damaged by fault.bad_sample")
        parts: dict[Thw, dict[int, int]] = {}
        for place in places:
            parts.setdefault(self._index.latent_shape(rows[place]), {})[place] = rows[place]
        collated = self._collate(plan, parts, slot)
        return self._sent(collated, slot) if self._copies is not None else collated

    def _collate(self, plan: StepPlan, parts: Mapping[Thw, Mapping[int, int]], slot: Slot) -> list[StoredBatch]:
        """Samples, by latent shape and by place in a global batch, read into a slot. Runs in any thread."""
        collated = collate(
            self._index,
            parts,
            regions={latent: self._shares[latent].region for latent in parts},
            text_tokens=plan.batch.text_tokens,
            weights=plan.weights,
            slot=slot,
            read=self._read,
        )
        return [replace(stored, samples=plan.batch.identities(stored.places, stored.samples)) for stored in collated]

    def _read(self, targets: Sequence[Target]) -> dict[int, Damage]:
        """Returns what can't be read, by row. Wrong bytes are known from then on; a read that failed may succeed another time."""
        if not hasattr(self._thread, "reader"):
            self._thread.reader = ShardReader(self._index)
            self._readers.append(self._thread.reader)
        todo = [target for target in targets if target.row not in self._known]
        read = self._thread.reader.read_into(todo)
        found = {target.row: why for target, why in zip(todo, read, strict=True) if why is not None}
        self._known.update((row, why) for row, why in found.items() if why.lasting)
        return {target.row: self._known[target.row] for target in targets if target.row in self._known} | found

    def _sent(self, collated: Sequence[StoredBatch], slot: Slot) -> list[StoredBatch]:
        """On the way to the GPU, beside what runs there; the slot is written again only once the copies are over."""
        sent, ready = [], torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]  # who waits, a reader, leaves the core to others
        with torch.cuda.stream(self._copies):
            for stored in collated:
                tensors = {name: getattr(stored, name) for name in ("latents_BtCHw", "text_BYE")}
                # These are not in the slot; pinned memory is kept by its allocator until the copy is over.
                tensors |= {name: getattr(stored, name).pin_memory() for name in ("text_mask_BY", "weight_B")}
                copies = {name: tensor.to(self._device, non_blocking=True) for name, tensor in tensors.items()}
                sent.append(replace(stored, ready=ready, **copies))
            ready.record()
        slot.copied(ready)
        return sent

    def _micro_batch(self, stored: StoredBatch) -> MicroBatch:
        """In the precision of training, normalised, on its device. Runs in the consumer's thread."""
        latents_BtCHw, text_BYE, mask_BY, weight_B = (
            self._arrived(t, stored.ready) for t in (stored.latents_BtCHw, stored.text_BYE, stored.text_mask_BY, stored.weight_B)
        )
        region = stored.region
        mine_BCthw = latents_BtCHw[:, :, :, region.h0 : region.h1].transpose(1, 2)
        latents = torch.empty(mine_BCthw.shape, dtype=self._dtype, device=self._device).copy_(mine_BCthw)
        return MicroBatch(
            latents_BCthw=latents.sub_(self._mean_C111).div_(self._std_C111),
            latent=stored.latent,
            region=region,
            text_BYE=text_BYE.to(self._dtype, copy=True),
            text_mask_BY=mask_BY,
            samples=stored.samples,
            keys=stored.keys,
            weight_B=weight_B,
            places=stored.places,
            bad=stored.bad,
        )

    def _arrived(self, tensor: Tensor, ready: torch.cuda.Event | None) -> Tensor:
        """On the device, for what the consumer's stream does from here on."""
        if ready is None:
            return tensor.to(self._device)
        stream = torch.cuda.current_stream(self._device)
        stream.wait_event(ready)
        tensor.record_stream(stream)  # its memory is that of the stream it came by
        return tensor

    def _substitute(self, step: int, plan: StepPlan, micro: MicroBatch, bad: Sequence[bool], attempt: int) -> MicroBatch:
        """As ``Substitute`` says. Runs in the consumer's thread: it is rare, and what other ranks found bad is known only there."""
        wanted = {b: self._planner.substitute(step, micro.places[b], attempt) for b in range(len(bad)) if bad[b]}
        found = {b: row for b, row in wanted.items() if row is not None}
        others = self._read_now(plan, {micro.places[b]: row for b, row in found.items()}, micro.latent) if found else micro
        samples, keys, damage = list(micro.samples), list(micro.keys), list(micro.bad)
        for b in wanted:
            substitute = str(self._index.key[found[b]]) if b in found else None
            if (why := micro.bad[b]) is not None:
                self._on_bad(BadSample(step=step, key=micro.keys[b], damage=why, substitute=substitute))
            if b not in found:
                _blank(micro, b)
                damage[b] = None
        for i, b in enumerate(found):
            for name in ("latents_BCthw", "text_BYE", "text_mask_BY"):
                getattr(micro, name)[b].copy_(getattr(others, name)[i])
            samples[b], keys[b], damage[b] = others.samples[i], others.keys[i], others.bad[i]
        return replace(micro, samples=tuple(samples), keys=tuple(keys), bad=tuple(damage))

    def _read_now(self, plan: StepPlan, rows: Mapping[int, int], latent: Thw) -> MicroBatch:
        """Samples of one shape, by place, outside the ring."""
        (stored,) = self._collate(plan, {latent: rows}, Slot(pinned=False))
        return self._micro_batch(stored)


def _blank(micro: MicroBatch, b: int) -> None:
    """A sample that weighs nothing: finite, and with one token, since attention to none is not a number."""
    for tensor in (micro.latents_BCthw, micro.text_BYE, micro.text_mask_BY, micro.weight_B):
        tensor[b] = 0
    micro.text_mask_BY[b, 0] = True
