"""``data check``: a data set against its own index, byte by byte, over processes. A damaged shard doesn't keep the others from being seen."""

from __future__ import annotations

import multiprocessing
import os
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from opensora_dist.config.dataset import DatasetSpec
from opensora_dist.config.load import load_config
from opensora_dist.config.train import DataConfig, TrainConfig
from opensora_dist.core.errors import DataError
from opensora_dist.core.index import INDEX_NAME, IndexHeader, SampleRow, ShardRow, read_header, read_rows
from opensora_dist.data.index import DataSet, Index, read_spec, verify_index
from opensora_dist.data.remote import Located, localise
from opensora_dist.data.shards import ShardSource
from opensora_dist.data.verify import Finding, verify_shard
from opensora_dist.observe.progress import Bar
from opensora_dist.prepare.stats import ChannelSums, measured_stats

_MEASURED_TOLERANCE = 0.05
"""Of statistics that were measured over the same data."""
_PUBLISHED_TOLERANCE = 1.0
"""Of statistics that a codec publishes, over whatever it was trained on."""


@dataclass(frozen=True, kw_only=True)
class Check:
    """What was looked at and found."""

    path: str
    samples: int
    shards: int
    num_bytes: int
    problems: tuple[Finding, ...]
    warnings: tuple[Finding, ...]


@dataclass(frozen=True, kw_only=True)
class _Task:
    """One shard."""

    number: int
    shard: ShardRow
    rows: tuple[SampleRow, ...]


@dataclass(frozen=True, kw_only=True)
class _Answer:
    """What a worker says of a shard; no sums where no sample of it is whole."""

    findings: tuple[Finding, ...]
    sums: ChannelSums | None


def check_data(path: str, *, config: Path | None = None, workers: int | None = None) -> Check:
    """Looks at everything, with a progress bar.

    Args:
        path: A prepared folder or a URL, as data.path; tars that others made are indexed first.
        config: A training config whose data.cache, data.layout and data.allow_pipe count; default: theirs.
        workers: Processes; default: as many as there are cores.
    Raises:
        ConfigError: The config, or a pipe that it doesn't allow.
        DataError: There is no index that can be opened: without one nothing can be compared.
    """
    data = DataConfig() if config is None else load_config(TrainConfig, config).data
    located = _locate(path, data)
    header = read_header(located.folder)
    spec = read_spec(located.folder, header)
    found = [Finding(shard=INDEX_NAME, sample="", what=what) for what in verify_index(located.folder)]
    Index.join(
        [DataSet(at=replace(located, remote=True))]
    )  # as training opens it, but for the sizes of shards, which are told below
    if not located.remote:
        found += _unlisted(located.folder, header)
    count = min(workers or len(os.sched_getaffinity(0)), len(header.shards))
    sums: list[ChannelSums] = []
    with Bar("shards", total=len(header.shards)) as bar:
        for answer in _answers(path, data, located, _tasks(located.folder, header), spec=spec, workers=count):
            found += answer.findings
            sums += [answer.sums] if answer.sums else []
            bar.advance(note=f"{sum(not finding.warning for finding in found)} problems")
    found += _statistics(sums, spec)
    return Check(
        path=path,
        samples=header.num_samples,
        shards=len(header.shards),
        num_bytes=sum(shard.num_bytes for shard in header.shards),
        problems=tuple(finding for finding in found if not finding.warning),
        warnings=tuple(finding for finding in found if finding.warning),
    )


def _locate(path: str, data: DataConfig) -> Located:
    return localise(path, cache=data.cache, allow_pipe=data.allow_pipe, layout=data.layout)


def _unlisted(folder: Path, header: IndexHeader) -> list[Finding]:
    listed = {shard.name for shard in header.shards}
    there = sorted(path.name for path in folder.glob("*.tar") if not path.name.startswith("."))
    return [Finding(shard=name, sample="", what="no shard of the index") for name in there if name not in listed]


def _tasks(folder: Path, header: IndexHeader) -> Iterator[_Task]:
    """The shards in the order of their samples, each once, then those that no sample lies in."""
    numbers = {shard.name: number for number, shard in enumerate(header.shards)}
    rows = read_rows(folder)
    for name, group in groupby(rows, key=lambda row: row.shard):
        number = numbers.pop(name, None)
        if number is None:
            raise DataError(
                f"{folder / INDEX_NAME}: the samples of {name} do not follow each other; run `opensora-dist data prepare` again"
            )
        yield _Task(number=number, shard=header.shards[number], rows=tuple(group))
    for number in numbers.values():
        yield _Task(number=number, shard=header.shards[number], rows=())


def _answers(
    path: str, data: DataConfig, located: Located, tasks: Iterator[_Task], *, spec: DatasetSpec, workers: int
) -> Iterator[_Answer]:
    """An answer to each task, in their order; a process that dies is one of them."""
    if workers <= 1:
        source = located.open_shards(read_header(located.folder).shards)
        yield from (_look(source, task, spec) for task in tasks)
        source.close()
        return
    context = multiprocessing.get_context("spawn")  # a fork of a process with threads may hang
    ahead: deque[tuple[_Task, Future[_Answer]]] = deque()
    pool = ProcessPoolExecutor(workers, mp_context=context, initializer=_start_worker, initargs=(path, data, spec))
    try:
        while True:
            while len(ahead) < 2 * workers and (task := next(tasks, None)) is not None:
                ahead.append((task, pool.submit(_work, task)))
            if not ahead:
                return
            yield ahead[0][1].result()
            ahead.popleft()
    except BrokenProcessPool as error:
        names = ", ".join(task.shard.name for task, _ in ahead)
        raise DataError(f"a process died while it read one of {names}: out of memory? Use fewer --workers") from error
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


class _Worker:
    """What a process keeps from task to task."""

    source: ShardSource
    spec: DatasetSpec


def _start_worker(path: str, data: DataConfig, spec: DatasetSpec) -> None:
    located = _locate(path, data)
    _Worker.source, _Worker.spec = located.open_shards(read_header(located.folder).shards), spec


def _work(task: _Task) -> _Answer:
    return _look(_Worker.source, task, _Worker.spec)


def _look(source: ShardSource, task: _Task, spec: DatasetSpec) -> _Answer:
    try:
        fd = source.open(task.number)
    except OSError as error:
        what = f"can't be opened ({error.strerror or error}); {len(task.rows):,} samples are lost with it"
        return _Answer(findings=(Finding(shard=task.shard.name, sample="", what=what),), sums=None)
    sums: list[ChannelSums] = []

    def measure(latents_tChw: NDArray[np.floating]) -> None:
        sums.append(ChannelSums.of(latents_tChw))

    try:
        findings = verify_shard(fd, task.shard, task.rows, spec=spec, on_latents=measure)
    except OSError as error:
        findings = [Finding(shard=task.shard.name, sample="", what=f"can't be read ({error.strerror or error})")]
    finally:
        os.close(fd)
    return _Answer(findings=tuple(findings), sums=ChannelSums.add(sums) if sums else None)


def _statistics(sums: Sequence[ChannelSums], spec: DatasetSpec) -> list[Finding]:
    """A model sees (latents - mean) / std: where these are of other latents, the noise levels it is trained at are off."""
    if not sums:
        return []
    have = measured_stats(ChannelSums.add(sums))
    tolerance = _MEASURED_TOLERANCE if spec.codec.name == "dct" else _PUBLISHED_TOLERANCE
    mean, std = np.array(have.mean), np.array(have.std)
    said_mean, said_std = np.array(spec.latent_mean), np.array(spec.latent_std)
    off = (np.abs(mean - said_mean) > tolerance * said_std) | (np.abs(np.log(std / said_std)) > np.log1p(tolerance))
    return [
        Finding(
            shard=INDEX_NAME,
            sample="",
            what=f"latents of channel {c} have mean {mean[c]:.4g} and deviation {std[c]:.4g}, the index says {said_mean[c]:.4g} and "
            f"{said_std[c]:.4g}; if no shard is damaged, prepare again",
            warning=True,
        )
        for c in np.flatnonzero(off)
    ]
