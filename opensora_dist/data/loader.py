"""Batches of one rank, read ahead by threads, in order.

Threads, not processes: reading, hashing and casting release the GIL, and a worker process would copy every batch twice.
"""

# B micro-batch, C latent channels, t h w latent frames, height, width of the region that this rank holds, Y text tokens, E text width

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from types import TracebackType

import torch
from torch import Tensor

from opensora_dist.core.types import Region, Share, Thw
from opensora_dist.data.index import Index
from opensora_dist.data.order import GlobalBatch, Order, micro_rows, position_weights
from opensora_dist.data.reader import ShardReader


@dataclass(frozen=True, kw_only=True)
class MicroBatch:
    """What one data rank runs at once.

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
    """

    latents_BCthw: Tensor
    latent: Thw
    region: Region
    text_BYE: Tensor
    text_mask_BY: Tensor
    samples: tuple[int, ...]
    keys: tuple[str, ...]
    weight_B: Tensor


@dataclass(frozen=True, kw_only=True)
class StepData:
    """One rank's part of a global batch; ``epoch`` and ``digest`` are those of the whole."""

    step: int
    epoch: int
    digest: str
    micros: list[MicroBatch]


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
    Raises:
        ConfigError: The global batch does not divide into micro-batches, for batches of some shape.
        DataError: From iterating: a sample can't be read as it was written.
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
    ) -> None:
        self._shares = {latent: share(latent) for latent in order.latents}
        for mine in self._shares.values():
            micro_rows(
                range(order.global_batch), data_rank=mine.data_rank, data_size=mine.data_size, accum=accum, micro=0
            )  # divides?
        self.last_wait_s = 0.0
        self._index, self._order = index, order
        self._accum = accum
        self._steps = range(start_step, start_step + num_steps)
        self._loss_weight, self._prefetch_batches = loss_weight, prefetch_batches
        self._dtype, self._device = dtype, device
        self._mean_C111, self._std_C111 = (
            torch.tensor(values, dtype=dtype).view(-1, 1, 1, 1) for values in (index.spec.latent_mean, index.spec.latent_std)
        )
        self._pool = ThreadPoolExecutor(max_workers=reader_threads, thread_name_prefix="shard-reader")
        self._thread = threading.local()
        self._readers: list[ShardReader] = []
        self._pending: deque[Future[MicroBatch]] = deque()

    def __iter__(self) -> Iterator[StepData]:
        todo = ((self._order.batch(step), micro) for step in self._steps for micro in range(self._accum))
        try:
            for _ in range(self._prefetch_batches):
                self._submit_next(todo)
            for step in self._steps:
                batch, wait_s, micros = self._order.batch(step), 0.0, []
                for _ in range(self._accum):
                    began = time.perf_counter()
                    micro = self._pending.popleft().result()
                    wait_s += time.perf_counter() - began
                    self._submit_next(todo)
                    micros.append(self._to_device(micro))
                self.last_wait_s = wait_s
                yield StepData(step=step, epoch=batch.epoch, digest=batch.digest, micros=micros)
        finally:  # also where the consumer breaks off, or a read failed
            self.close()

    def __enter__(self) -> Loader:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Stops the threads, waits for them, and closes the files. May be called again."""
        self._pool.shutdown(wait=True, cancel_futures=True)
        self._pending.clear()
        while self._readers:
            self._readers.pop().close()

    def _submit_next(self, todo: Iterator[tuple[GlobalBatch, int]]) -> None:
        if (work := next(todo, None)) is not None:
            self._pending.append(self._pool.submit(self._load, *work))

    def _load(self, batch: GlobalBatch, micro: int) -> MicroBatch:
        """Runs in a reader thread."""
        if not hasattr(self._thread, "reader"):
            self._thread.reader = ShardReader(self._index)
            self._readers.append(self._thread.reader)
        index, pin = self._index, self._device.type == "cuda"
        data_rank, data_size, region = self._shares[batch.latent]
        rows = micro_rows(batch.rows, data_rank=data_rank, data_size=data_size, accum=self._accum, micro=micro)
        tokens = max(int(index.text_tokens[row]) for row in batch.rows)  # of the global batch: all ranks share a shape
        shape = (len(rows), index.spec.channels, *region.shape(batch.latent))
        latents = torch.empty(shape, dtype=self._dtype, pin_memory=pin)
        text = torch.zeros((len(rows), tokens, index.spec.text_width), dtype=self._dtype, pin_memory=pin)
        mask = torch.zeros((len(rows), tokens), dtype=torch.bool, pin_memory=pin)
        for b, sample in enumerate(self._thread.reader.read(rows, frames=region.frames)):
            latents[b].copy_(torch.from_numpy(sample.latents[:, :, region.h0 : region.h1]).transpose(0, 1))
            text[b, : len(sample.text)].copy_(torch.from_numpy(sample.text))
            mask[b, : len(sample.text)] = True
        latents.sub_(self._mean_C111).div_(self._std_C111)
        positions = [index.latent_shape(row) for row in batch.rows]
        weights = dict(zip(batch.rows, position_weights(self._loss_weight, [p.t * p.h * p.w for p in positions]), strict=True))
        return MicroBatch(
            latents_BCthw=latents,
            latent=batch.latent,
            region=region,
            text_BYE=text,
            text_mask_BY=mask,
            samples=tuple(index.sample_id(row) for row in rows),
            keys=tuple(index.key[row] for row in rows),
            weight_B=torch.tensor([weights[row] for row in rows], dtype=torch.float64, pin_memory=pin),
        )

    def _to_device(self, micro: MicroBatch) -> MicroBatch:
        """From pinned memory without waiting; the allocator keeps it until the copy is done."""
        if self._device.type == "cpu":
            return micro
        names = ("latents_BCthw", "text_BYE", "text_mask_BY", "weight_B")
        return replace(micro, **{n: getattr(micro, n).to(self._device, non_blocking=True) for n in names})
