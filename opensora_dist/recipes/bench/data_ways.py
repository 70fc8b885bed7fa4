"""The ways of reading that ``bench data`` compares: plain reads of the same bytes, ours, and those of other packages."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from opensora_dist.config.codec import DctCodecConfig, HashTextConfig
from opensora_dist.config.dataset import DatasetSpec
from opensora_dist.config.train import DataConfig
from opensora_dist.core.errors import DataError
from opensora_dist.core.index import write_index
from opensora_dist.core.types import Region, Share, Thw
from opensora_dist.data.buffers import Slot
from opensora_dist.data.index import Index
from opensora_dist.data.loader import Loader
from opensora_dist.data.order import build_order
from opensora_dist.data.reader import ShardReader
from opensora_dist.parallel.keys import Keys
from opensora_dist.prepare.shards import Sample, ShardWriter
from opensora_dist.recipes.bench import data_others

TEXT_TOKENS, TEXT_WIDTH, CHANNELS = 120, 4096, 4  # T5-XXL's, and those of a common VAE, 8 x smaller in height and width
RAW, RAW_BATCH = "raw, one sample's memory", "raw, a batch's memory"
_SHARD_BYTES = 64 << 20
_NOISE_BYTES, _STRIDE = 1 << 24, 7919


@dataclass(frozen=True, kw_only=True)
class DataCase:
    """Samples that are read.

    Args:
        clip: Pixels of each.
        folder: Where their shards are.
        batch: Samples of a batch.
        threads: That read, where a way has some; or processes, in packages that have those.
    """

    clip: Thw
    folder: Path
    batch: int
    threads: int

    @property
    def latent(self) -> Thw:
        """Of a sample."""
        return Thw(self.clip.t, self.clip.h // 8, self.clip.w // 8)

    @property
    def sample_bytes(self) -> int:
        """Latents and text of one."""
        return 2 * (CHANNELS * self.latent.volume + TEXT_TOKENS * TEXT_WIDTH)


def write_samples(case: DataCase, *, num_bytes: int) -> Index:
    """Makes a data set of random samples of one shape, of about ``num_bytes`` in all, on the disk."""
    case.folder.mkdir(parents=True, exist_ok=True)
    noise = torch.empty(_NOISE_BYTES // 2).normal_(generator=Keys(0).generator("bench data")).half().numpy()

    def array(i: int, *shape: int) -> NDArray[np.float16]:
        """Other numbers for each sample, without drawing them all."""
        size = math.prod(shape)
        start = i * _STRIDE % (len(noise) - size)
        return noise[start : start + size].reshape(shape)

    per_shard = max(1, _SHARD_BYTES // case.sample_bytes)
    count = max(2, round(num_bytes / case.sample_bytes / per_shard)) * per_shard
    rows, shards = [], []
    for first in range(0, count, per_shard):
        writer = ShardWriter(case.folder / f"shard-{first // per_shard:05d}.tar")
        for i in range(first, first + per_shard):
            sample = Sample(
                key=f"sample-{i:06d}",
                latents_tChw=array(i, case.latent.t, CHANNELS, case.latent.h, case.latent.w),
                text_YE=array(i, TEXT_TOKENS, TEXT_WIDTH),
                caption="",
                source=f"{i}.mp4",
                clip=case.clip,
                fps=24.0,
            )
            rows.append(writer.add(sample))
        shards.append(writer.finish())
    spec = DatasetSpec(
        codec=DctCodecConfig(channels=CHANNELS),
        text=HashTextConfig(width=TEXT_WIDTH, max_tokens=TEXT_TOKENS),
        channels=CHANNELS,
        spatial_factor=8,
        temporal_factor=1,
        text_width=TEXT_WIDTH,
        max_tokens=TEXT_TOKENS,
        latent_mean=(0.0,) * CHANNELS,
        latent_std=(1.0,) * CHANNELS,
        fps=24.0,
        buckets=(tuple(case.clip),),
    )
    write_index(case.folder, rows=rows, shards=shards, spec=spec.model_dump(mode="json"))
    return Index.open(case.folder)


@dataclass(frozen=True, kw_only=True)
class Timed:
    """One pass over the samples."""

    samples: int
    seconds: float


Way = Callable[[], Timed]


@contextmanager
def our_ways(index: Index, case: DataCase, *, epochs: int) -> Iterator[dict[str, Way]]:
    """Plain reads, and those of this project; their files are closed after it.

    Args:
        epochs: Of a loader's pass, whose threads and memory are made anew for it.
    """
    rows = list(range(len(index)))
    shuffled = torch.empty(len(index)).uniform_(generator=Keys(0).generator("bench data")).argsort().tolist()
    spans = [_span(index, row) for row in rows]
    stack, fds = ExitStack(), []
    for shard in range(len(index.shards)):
        fds.append(index.shard_source.open(shard))
        stack.callback(os.close, fds[-1])
    room = case.batch * max(size for _, _, size in spans)
    memories = [Slot(pinned=False).arrays([room])[0].numpy().data for _ in range(case.threads)]
    readers = [ShardReader(index) for _ in range(case.threads)]
    for reader in readers:
        stack.callback(reader.close)

    def plain(rows: Sequence[int], *, room: int, threads: int = 1) -> Way:
        """Reads into room for some samples, each thread into its own."""

        def once() -> int:
            coming = iter(range(len(rows)))

            def work(mine: memoryview) -> None:
                for i in coming:
                    shard, offset, size = spans[rows[i]]
                    start = i % room * size
                    if os.preadv(fds[shard], [mine[start : start + size]], offset) != size:
                        raise DataError(f"{index.shards[shard].name}: a read came short")

            _together([partial(work, memory) for memory in memories[:threads]])
            return len(rows)

        return lambda: _timed(once)

    def ours(rows: Sequence[int], *, threads: int) -> Way:
        return lambda: _timed(lambda: _read(readers[:threads], rows, batch=case.batch))

    with stack:
        yield {
            RAW: plain(rows, room=1),
            RAW_BATCH: plain(rows, room=case.batch),
            shuffled_name(case.threads): plain(shuffled, room=1, threads=case.threads),
            reader_name(1): ours(rows, threads=1),
            reader_name(case.threads): ours(rows, threads=case.threads),
            f"{reader_name(case.threads)}, shuffled": ours(shuffled, threads=case.threads),
            loader_name(case.threads): lambda: _loaded(index, case, epochs=epochs, stored=True),
            f"{loader_name(case.threads)}, float32": lambda: _loaded(index, case, epochs=epochs, stored=False),
        }


def shuffled_name(threads: int) -> str:
    """What tables call plain reads of samples in another order than they lie in, as training reads them."""
    return f"raw, {_threads(threads)}, shuffled"


def reader_name(threads: int) -> str:
    """What tables call it."""
    return f"reader, {_threads(threads)}"


def loader_name(threads: int) -> str:
    """What tables call it."""
    return f"loader, {_threads(threads)}"


def _threads(num: int) -> str:
    return f"{num} thread{'s' if num > 1 else ''}"


def _span(index: Index, row: int) -> tuple[int, int, int]:
    """Shard, offset, and bytes from the first of a sample's latents to the last of its text."""
    text = index.text_place(row)
    start = index.latents_place(row).offset
    return int(index.shard[row]), start, text.offset + text.num_bytes - start


def _timed(way: Callable[[], int]) -> Timed:
    began = time.perf_counter()
    samples = way()
    return Timed(samples=samples, seconds=time.perf_counter() - began)


def _read(readers: Sequence[ShardReader], rows: Sequence[int], *, batch: int) -> int:
    """Batches in order, each by whichever reader is free, in a thread of its own."""
    starts, done = iter(range(0, len(rows), batch)), []

    def work(reader: ShardReader) -> None:
        for start in starts:
            done.append(len(reader.read(rows[start : start + batch])))

    _together([partial(work, reader) for reader in readers])
    return sum(done)


def _together(works: Sequence[Callable[[], None]]) -> None:
    """Each in a thread of its own; an error of any is raised."""
    with ThreadPoolExecutor(max_workers=len(works)) as pool:
        for done in [pool.submit(work) for work in works]:
            done.result()


def _loaded(index: Index, case: DataCase, *, epochs: int, stored: bool) -> Timed:
    """Epochs in training's order.

    Args:
        stored: Take batches as they lie in the ring, collated; rather than those that training is given, normalised in float32.
    """
    order = build_order(index, DataConfig(global_batch=case.batch), keys=Keys(0))
    loader = Loader(
        index,
        order,
        share=lambda latent: Share(0, 1, Region.whole(latent)),
        accum=1,
        start_step=0,
        num_steps=epochs * order.batches_per_epoch,
        loss_weight="sample",
        reader_threads=case.threads,
        prefetch_batches=case.threads + 1,
        dtype=torch.float32,
        device=torch.device("cpu"),
    )

    def once() -> int:
        with loader:
            if stored:
                return sum(len(part.keys) for pack in loader.stored() for part in pack)
            return sum(len(part.keys) for step in loader for part in step.micros)

    return _timed(once)


class Others:
    """Packages that read the same samples, in an interpreter of their own.

    Args:
        python: That interpreter; default: this one.
    """

    def __init__(self, python: str | None) -> None:
        # -P: or the modules beside the script would hide others of their names.
        command = [python or sys.executable, "-P", str(Path(data_others.__file__))]
        self._said = tempfile.TemporaryFile("w+")  # noqa: SIM115 - closed with the process
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._said, text=True, bufsize=1
        )

    def __enter__(self) -> Others:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if error is not None:
            self._process.kill()
        self._process.communicate(timeout=30)
        self._said.close()

    def open(self, index: Index, case: DataCase, *, work: Path) -> Iterator[tuple[str, str | None, Way]]:
        """Of each way its name, what keeps it from being measured (None: nothing), and the way itself."""
        shards = [[shard.name, shard.num_samples] for shard in index.shards]
        for name in data_others.WAYS:
            request = {"do": "open", "name": name, "folder": str(case.folder), "work": str(work), "shards": shards}
            found = self._ask({**request, "batch": case.batch, "workers": case.threads})
            yield name, found.get("missing"), partial(self._pass, name)

    def _pass(self, name: str) -> Timed:
        return Timed(**self._ask({"do": "pass", "name": name}))

    def _ask(self, request: dict[str, Any]) -> dict[str, Any]:
        stdin, stdout = self._process.stdin, self._process.stdout
        assert stdin is not None and stdout is not None
        print(json.dumps(request), file=stdin, flush=True)
        line = stdout.readline()
        if not line:
            code = self._process.wait()
            self._said.seek(0)
            last = "; ".join(self._said.read().splitlines()[-3:])
            raise DataError(f"bench data: {request['name']} ended its interpreter with code {code}: {last}")
        answer: dict[str, Any] = json.loads(line)
        return answer
