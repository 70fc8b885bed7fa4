"""Raw captioned video to a data set of latents: the order of the steps, batching, and what is kept when something goes wrong.

Shards hold one bucket each and take its clips in the order of the sources. So which samples a shard holds, and which clips were
encoded together, follows from the sources and the config alone: a run that was killed and started again writes the bytes of one
that went straight through, with any number of workers.
"""

# B clips, T H W pixels, C latent channels, t h w latents, Y text tokens, E text width

from __future__ import annotations

import errno
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from opensora_dist.config.dataset import DatasetSpec
from opensora_dist.config.load import expand
from opensora_dist.config.prepare import PrepareConfig
from opensora_dist.core.errors import ConfigError, DataError
from opensora_dist.core.extras import missing_extra
from opensora_dist.core.index import SampleRow, write_index
from opensora_dist.core.io import write_json
from opensora_dist.core.protocols import TextEncoder, VideoCodec
from opensora_dist.core.types import Thw
from opensora_dist.core.video import Frames
from opensora_dist.parallel.keys import Keys, sample_id
from opensora_dist.prepare.decode import Drop, decode_in_order
from opensora_dist.prepare.resume import Finished, claim, exclusive, read_finished, write_finished
from opensora_dist.prepare.shards import Sample, ShardWriter, sample_key
from opensora_dist.prepare.sources import Source, scan_sources
from opensora_dist.prepare.stats import ChannelSums, measured_stats

REPORT_NAME = "report.json"
_BATCH_CLIPS = 64
_BATCH_PIXELS = 1 << 24  # 200 MB of float32 RGB on the codec's device
_REASONS_SHOWN = 20


@dataclass(frozen=True, kw_only=True)
class PrepareProgress:
    """How far a preparation is: sources seen of all, and what became of them. Resumed work counts as seen."""

    done: int
    total: int
    samples: int
    dropped: int


@dataclass(frozen=True, kw_only=True)
class PrepareReport:
    """What a preparation made. ``seconds`` and ``clips_per_s`` are of this run, the rest of the whole data set."""

    samples: int
    shards: int
    buckets: dict[str, int]
    dropped: tuple[Drop, ...]
    cut_captions: int
    seconds: float
    clips_per_s: float


def prepare(
    config: PrepareConfig,
    *,
    codec: VideoCodec,
    text: TextEncoder,
    on_progress: Callable[[PrepareProgress], None] | None = None,
) -> PrepareReport:
    """Encodes a folder of captioned videos into WebDataset shards and an index, which is written last.

    Videos that can't be used are left out and named in ``report.json``. If the process is killed, the same call goes on from the
    shards it had finished.

    Args:
        config: What to prepare and how.
        codec: As ``config.codec`` describes it.
        text: As ``config.text`` describes it.
        on_progress: Called at the start, after every source, and as the last clips are encoded.
    Raises:
        ConfigError: A path is missing, the codec can't take a bucket, or OpenCV isn't installed.
        DataError: The sources can't be used, none gives a sample, the output holds something else, or the disk is full.
    """
    started_s = time.monotonic()
    source_folder, folder = _folders(config, codec)
    sources = scan_sources(source_folder)
    with _disk_full_named(folder), exclusive(folder):
        claim(folder, config, sources)
        run = _Run(config, codec=codec, text=text, folder=folder, finished=read_finished(folder))
        before = run.num_seen
        try:
            run.work(sources, on_progress=on_progress)
        finally:
            run.discard()  # of shards under way; a run that ended has none
        seconds = time.monotonic() - started_s
        report = run.report(sources, seconds=seconds, clips_per_s=(run.num_seen - before) / seconds)
        write_json(folder / REPORT_NAME, asdict(report))
        if not report.samples:
            raise DataError(_nothing_left(report.dropped, folder))
        rows = [row for record in run.in_order() for row in record.rows]
        write_index(folder, rows=rows, shards=[r.shard for r in run.in_order()], spec=run.spec().model_dump(mode="json"))
    return report


@dataclass(kw_only=True)
class _OpenShard:
    """A shard under way. Its drops are recorded with it: without them, a resumed run would batch its clips differently."""

    writer: ShardWriter
    rows: list[SampleRow] = field(default_factory=list)
    sums: list[ChannelSums] = field(default_factory=list)
    drops: list[Drop] = field(default_factory=list)
    cut_captions: int = 0


@dataclass(kw_only=True)
class _Bucket:
    """One bucket's clips on their way: decoded ones not yet encoded, and the shard that takes them."""

    clip: Thw
    waiting: list[tuple[Source, Frames]] = field(default_factory=list)
    shard: _OpenShard | None = None
    number: int = 0  # of the next shard; lower ones are taken


class _Run:
    """The state of one call of ``prepare``."""

    def __init__(
        self, config: PrepareConfig, *, codec: VideoCodec, text: TextEncoder, folder: Path, finished: dict[str, Finished]
    ) -> None:
        self._config, self._codec, self._text, self._folder = config, codec, text, folder
        self._dtype = np.dtype(config.output.dtype)
        self._keys = Keys(config.seed)
        self._buckets = {clip: _Bucket(clip=clip) for clip in _clips(config)}
        self._finished = finished
        self._drops = {drop.source: drop for record in finished.values() for drop in record.drops}
        self._undecodable: list[Drop] = []  # since the last record
        self._kept = {row.source for record in finished.values() for row in record.rows}

    @property
    def num_seen(self) -> int:
        """Sources that were kept or dropped so far, those of finished shards included."""
        return len(self._kept) + len(self._drops)

    def work(self, sources: Sequence[Source], *, on_progress: Callable[[PrepareProgress], None] | None) -> None:
        """Takes every source that isn't done yet into a shard or into the list of drops."""
        todo = [s for s in sources if s.name not in self._kept and s.name not in self._drops]
        decoding = decode_in_order(todo, fps=self._config.clip.fps, buckets=list(self._buckets), workers=self._config.workers)

        def tell() -> None:
            if on_progress is not None:
                waiting = sum(len(bucket.waiting) for bucket in self._buckets.values())
                counts = {"samples": len(self._kept), "dropped": len(self._drops)}
                on_progress(PrepareProgress(done=self.num_seen + waiting, total=len(sources), **counts))

        tell()
        with closing(decoding) as clips:
            for source, clip in clips:
                if isinstance(clip, Drop):
                    self._drops[clip.source] = clip
                    self._undecodable.append(clip)
                else:
                    bucket = self._buckets[Thw(*clip.shape[:3])]
                    bucket.waiting.append((source, clip))
                    if len(bucket.waiting) == self._batch_clips(bucket):
                        self._encode(bucket)
                tell()
        for bucket in self._buckets.values():
            if bucket.waiting:
                self._encode(bucket)
                tell()
            if bucket.shard is not None and bucket.shard.rows:
                self._finish(bucket, bucket.shard)

    def discard(self) -> None:
        """Removes shards that were not finished."""
        for bucket in self._buckets.values():
            if bucket.shard is not None:
                bucket.shard.writer.discard()

    def in_order(self) -> list[Finished]:
        """Finished shards, bucket by bucket."""
        return [self._finished[name] for name in sorted(self._finished)]

    def spec(self) -> DatasetSpec:
        """What the data set is made of, latent statistics measured where the codec has none of its own."""
        stats = self._codec.stats or measured_stats(ChannelSums.add(record.sums for record in self.in_order()))
        return DatasetSpec(
            codec=self._config.codec,
            text=self._config.text,
            channels=self._codec.channels,
            spatial_factor=self._codec.spatial_factor,
            temporal_factor=self._codec.temporal_factor,
            text_width=self._text.width,
            max_tokens=self._text.max_tokens,
            latent_mean=stats.mean,
            latent_std=stats.std,
            fps=self._config.clip.fps,
            buckets=tuple(clip for clip, _ in sorted(self._counts().items(), key=lambda item: (-item[1], item[0]))),
        )

    def report(self, sources: Sequence[Source], *, seconds: float, clips_per_s: float) -> PrepareReport:
        """What was made, drops in the order of the sources."""
        records, counts = self.in_order(), self._counts()
        return PrepareReport(
            samples=counts.total(),
            shards=len(records),
            buckets={str(clip): counts[clip] for clip in self._buckets},
            dropped=tuple(self._drops[s.name] for s in sources if s.name in self._drops),
            cut_captions=sum(record.cut_captions for record in records),
            seconds=seconds,
            clips_per_s=clips_per_s,
        )

    def _counts(self) -> Counter[Thw]:
        """Samples per bucket, of buckets that have any."""
        return Counter(Thw(row.clip_t, row.clip_h, row.clip_w) for record in self.in_order() for row in record.rows)

    def _batch_clips(self, bucket: _Bucket) -> int:
        """How many clips are encoded at once; never more than the shard takes, so that no batch straddles two shards."""
        room = self._config.output.shard_samples - (len(bucket.shard.rows) if bucket.shard else 0)
        return max(1, min(_BATCH_CLIPS, _BATCH_PIXELS // bucket.clip.volume, room))

    def _encode(self, bucket: _Bucket) -> None:
        """Encodes the waiting clips, one batch, into the bucket's shard, and finishes the shard where that fills it."""
        sources, clips = zip(*bucket.waiting, strict=True)
        bucket.waiting.clear()
        shard = bucket.shard = bucket.shard or self._open(bucket)
        keys = [sample_key(source.name) for source in sources]
        generators = [self._keys.generator("codec_posterior", sample_id(key)) for key in keys]
        latents_BCthw = self._codec.encode(torch.from_numpy(np.stack(clips)), generators=generators).cpu()
        cut_before = self._text.num_cut()
        texts = self._text.encode([source.caption for source in sources])
        shard.cut_captions += self._text.num_cut() - cut_before
        for source, key, latents_Cthw, text_YE in zip(sources, keys, latents_BCthw, texts, strict=True):
            latents_tChw, text = latents_Cthw.transpose(0, 1), text_YE.cpu()
            problem = _unstorable("latents", latents_tChw, self._dtype) or _unstorable("text vectors", text, self._dtype)
            if problem:
                self._drops[source.name] = Drop(source=source.name, reason=problem)
                shard.drops.append(self._drops[source.name])
                continue
            sample = Sample(
                key=key,
                latents_tChw=_stored(latents_tChw, self._dtype),
                text_YE=_stored(text, self._dtype),
                caption=source.caption,
                source=source.name,
                clip=bucket.clip,
                fps=self._config.clip.fps,
            )
            shard.rows.append(shard.writer.add(sample))
            shard.sums.append(ChannelSums.of(sample.latents_tChw))
            self._kept.add(source.name)
        if len(shard.rows) == self._config.output.shard_samples:
            self._finish(bucket, shard)

    def _open(self, bucket: _Bucket) -> _OpenShard:
        """The bucket's next shard: the first whose number no finished one has."""
        while (name := f"{bucket.clip}-{bucket.number:06d}.tar") in self._finished:
            bucket.number += 1
        return _OpenShard(writer=ShardWriter(self._folder / name))

    def _finish(self, bucket: _Bucket, shard: _OpenShard) -> None:
        """Gives the shard its name, then records it."""
        record = Finished(
            shard=shard.writer.finish(),
            rows=tuple(shard.rows),
            sums=ChannelSums.add(shard.sums),
            drops=(*self._undecodable, *shard.drops),
            cut_captions=shard.cut_captions,
        )
        write_finished(self._folder, record)
        self._finished[record.shard.name] = record
        self._undecodable.clear()
        bucket.shard = None


def _clips(config: PrepareConfig) -> list[Thw]:
    """The buckets, each once, in a fixed order."""
    return sorted({Thw(*bucket) for bucket in config.clip.buckets})


def _folders(config: PrepareConfig, codec: VideoCodec) -> tuple[Path, Path]:
    """Input and output folder.

    Raises:
        ConfigError: With every problem of the config that can be seen before any video is.
    """
    problems = []
    if config.input.path is None:
        problems.append("input.path is not set; give the folder that holds the videos")
    if config.output.path is None:
        problems.append("output.path is not set; give the folder that shall hold the shards")
    lacking = missing_extra("cv2", extra="prepare", wanted_by="preparation, which resizes frames with OpenCV,")
    if lacking:
        problems.append(lacking)
    for clip in _clips(config):
        try:
            codec.latent_shape(clip)
        except ConfigError as error:
            problems += [f"clip.buckets: {problem}" for problem in error.problems]
    if problems:
        raise ConfigError(problems)
    assert config.input.path is not None and config.output.path is not None
    return expand(config.input.path), expand(config.output.path)


def _stored(values: Tensor, dtype: np.dtype[np.floating]) -> NDArray[np.floating]:
    """In the stored precision; what overflows becomes infinite, without numpy's warning."""
    with np.errstate(over="ignore"):
        return values.float().numpy().astype(dtype)


def _unstorable(what: str, values: Tensor, dtype: np.dtype[np.floating]) -> str | None:
    """Why values can't be stored, or None: NaN and infinity would reach every weight of a model."""
    if not torch.isfinite(values).all():
        return f"its {what} hold NaN or infinity as encoded; try codec.dtype or text.dtype=float32"
    if not np.isfinite(_stored(values, dtype)).all():
        largest, limit = float(values.abs().max()), float(np.finfo(dtype).max)
        return f"its {what} reach {largest:.4g}, beyond {dtype.name} (at most {limit:g}); set output.dtype=float32"
    return None


def _nothing_left(dropped: Sequence[Drop], folder: Path) -> str:
    shown = "".join(f"\n  {drop.source}: {drop.reason}" for drop in dropped[:_REASONS_SHOWN])
    rest = f"\n  and {len(dropped) - _REASONS_SHOWN} more, in {folder / REPORT_NAME}" if len(dropped) > _REASONS_SHOWN else ""
    return f"none of {len(dropped)} videos gives a sample, so there is no data set:{shown}{rest}"


@contextmanager
def _disk_full_named(folder: Path) -> Iterator[None]:
    """Turns the system's "no space left" into advice; other errors pass."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise DataError(
            f"output.path={str(folder)!r}: the disk (or quota) is full; free some space and run the same command again, "
            "it goes on from the finished shards"
        ) from error
