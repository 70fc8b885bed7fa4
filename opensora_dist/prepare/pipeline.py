"""Raw captioned video to a data set of latents: probe, shots, cut, score, filter, caption, clean, encode, shards.

Every stage's results are records that say what they follow from, so that whatever was found once, by whichever process and under whichever
config, is never worked out again while it is still true. What a data set holds follows from the sources and the config alone: a run that
was killed and started again writes the bytes of one that went straight through, with any number of workers.
"""

from __future__ import annotations

import errno
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.csv
import torch

from opensora_dist.config.load import expand
from opensora_dist.config.prepare import PrepareConfig
from opensora_dist.core.errors import ConfigError, DataError
from opensora_dist.core.extras import missing_extra
from opensora_dist.core.io import atomic_path, write_json
from opensora_dist.core.logging import get_logger
from opensora_dist.core.protocols import TextEncoder, VideoCodec
from opensora_dist.core.types import Thw
from opensora_dist.prepare.blobs import Blobs
from opensora_dist.prepare.book import Book, Verdict, Work, saved_name
from opensora_dist.prepare.output import Kept, LostArraysError, ShardPlan, dataset_spec, plan_shards, publish, write_shards
from opensora_dist.prepare.report import (
    REPORT_NAME,
    PrepareReport,
    Tally,
    bucket_counts,
    nothing_left,
    ordered,
    stage_speeds,
    write_clips,
)
from opensora_dist.prepare.resume import STATE_DIR, Finished, exclusive, read_finished, shared
from opensora_dist.prepare.run import OnProgress, PrepareProgress, Run, lots_of
from opensora_dist.prepare.sources import Source, require_captions, scan_sources
from opensora_dist.prepare.stages import STAGES, Clip
from opensora_dist.prepare.store import StageStore

Networks = tuple[VideoCodec, TextEncoder, torch.device]
_log = get_logger(__name__)
_REASONS_SHOWN = 20
_ENCODED_AGAIN = 3  # times, where arrays are lost
_CPU = torch.device("cpu")


@dataclass(frozen=True, kw_only=True)
class PartReport:
    """What one part of a preparation did. ``waits`` says that its clips wait for other parts, to be compared with theirs."""

    part: int
    parts: int
    sources: int
    clips: int
    waits: bool
    seconds: float


def prepare(
    config: PrepareConfig,
    *,
    codec: VideoCodec,
    text: TextEncoder,
    device: torch.device = _CPU,
    build: Callable[[PrepareConfig], Networks] | None = None,
    on_progress: OnProgress = lambda progress: None,
) -> PrepareReport:
    """Turns captioned videos and images into WebDataset shards and an index, which is written last.

    Clips that can't be used are left out, and named with the reason in ``clips.parquet``. Whatever stopped a call, the same call goes on.

    Args:
        config: What to prepare and how.
        codec, text: As the config describes them.
        device: Where other networks run.
        build: Makes all three in a Ray actor; needed for ``executor: ray``.
        on_progress: Called at the start, after every source that was worked on, and after every shard.
    Raises:
        ConfigError: A path is missing, the codec can't take a bucket, or OpenCV isn't installed.
        DataError: The sources can't be used, none gives a sample, the output holds something else, or the disk is full.
    """
    started_s = time.monotonic()
    folder, sources = _open(config, codec)
    with _disk_full_named(folder), exclusive(folder):
        if config.executor == "ray":
            assert build is not None, "actors need to be told how to build their networks"
            _advance_on_ray(config, folder, sources, build, on_progress)
        with StageStore(folder / STATE_DIR / "stages") as store:
            finished = read_finished(folder)
            run = Run(config, folder=folder, finished=finished, store=store, codec=codec, text=text, device=device)
            if config.executor == "local":  # actors did so before their work
                run.book.try_again(sources)
            kept, tally, plans = _make_shards(run, config, folder, sources, finished, on_progress)
            if kept:
                spec = dataset_spec(plans, config=config, finished=finished, codec=codec, text=text)
                publish(plans, folder=folder, finished=finished, spec=spec, blobs=run.blobs, wanted=_wanted(run.book, sources))
            # Behind the index: what tells of a data set isn't to change before it does.
            report = _report(run, config, sources, kept, tally, plans, seconds=time.monotonic() - started_s)
            write_clips(folder, judged=_verdicts(run.book, sources), book=run.book)
            _write_metadata(config, kept)
            write_json(folder / REPORT_NAME, asdict(report))
            if not kept:
                raise DataError(nothing_left(tally, shown=_REASONS_SHOWN, folder=folder))
            store.compact()
    return report


def _make_shards(
    run: Run,
    config: PrepareConfig,
    folder: Path,
    sources: Sequence[Source],
    finished: dict[str, Finished],
    on_progress: OnProgress,
) -> tuple[list[Kept], Tally, list[ShardPlan]]:
    """All stages, and the shards of what they keep."""
    for again in range(_ENCODED_AGAIN, -1, -1):
        _advance(run, sources, lots_of(sources), on_progress)
        kept, tally = _judge(run.book, sources)
        plans = plan_shards(kept, config)

        def tell(done: int, total: int = len(plans), samples: int = len(kept), dropped: int = tally.num_dropped) -> None:
            on_progress(PrepareProgress(what="shards", done=done, total=total, samples=samples, dropped=dropped))

        try:
            write_shards(plans, folder=folder, config=config, finished=finished, store=run.store, blobs=run.blobs, on_shard=tell)
        except LostArraysError as lost:
            if not again:
                raise DataError(f"output.path={str(folder)!r}: {lost}, again and again; check the disk") from lost
            _log.warning("%s, and are encoded again", lost)
            continue
        return kept, tally, plans
    raise AssertionError("unreachable")


def _report(
    run: Run,
    config: PrepareConfig,
    sources: Sequence[Source],
    kept: Sequence[Kept],
    tally: Tally,
    plans: Sequence[ShardPlan],
    *,
    seconds: float,
) -> PrepareReport:
    return PrepareReport(
        input=str(expand(config.input.path or "").resolve()),
        samples=len(kept),
        shards=len(plans),
        buckets=bucket_counts(sorted({Thw(*bucket) for bucket in config.clip.buckets}), Counter(one.shape for one in kept)),
        sources=len(sources),
        clips=tally.clips,
        dropped=tuple(tally.dropped),
        num_dropped=tally.num_dropped,
        reasons=ordered(tally.reasons, STAGES),
        cut_captions=sum(run.store.get("text", one.text).get("cut", False) for one in kept),
        seconds=seconds,
        clips_per_s=run.num_clips / seconds,
        stages=stage_speeds(run.clock),
    )


def _write_metadata(config: PrepareConfig, kept: Sequence[Kept]) -> None:
    """The table of the videos that ``clip.save`` asked for: a folder that can be prepared in its turn."""
    if config.clip.save is None:
        return
    rows = {"path": [one.video for one in kept], "text": [one.caption for one in kept]}
    with atomic_path(expand(config.clip.save) / "metadata.csv") as partial:
        pyarrow.csv.write_csv(pa.table(rows, schema=pa.schema([("path", pa.string()), ("text", pa.string())])), partial)


def _advance_on_ray(
    config: PrepareConfig,
    folder: Path,
    sources: Sequence[Source],
    build: Callable[[PrepareConfig], Networks],
    on_progress: OnProgress,
) -> None:
    """The stages of ``_advance``, by the actors of a cluster. What they leave is done here."""
    from opensora_dist.prepare.ray_lots import advance_on_ray

    with StageStore(folder / STATE_DIR / "stages") as store:
        Book(config, store=store, blobs=Blobs(folder / STATE_DIR / "encoded", in_shards={})).try_again(sources)
    phases: list[tuple[str, tuple[Work, ...]]] = [("clips", ())]
    if config.filter.duplicates is not None:
        phases.insert(0, ("scoring", ("duplicates",)))
    for what, until in phases:
        done = 0

        def on_lot(num_sources: int, what: str = what) -> None:
            nonlocal done
            done += num_sources
            on_progress(PrepareProgress(what=what, done=done, total=len(sources)))

        advance_on_ray(config, folder=folder, sources=sources, build=build, until=until, on_lot=on_lot)


def prepare_part(
    config: PrepareConfig,
    *,
    part: tuple[int, int],
    codec: VideoCodec,
    text: TextEncoder,
    device: torch.device = _CPU,
    on_progress: OnProgress = lambda progress: None,
) -> PartReport:
    """Takes one part of the sources as far as it goes without the others, for arrays of jobs: neither shards nor an index.

    Parts share nothing but the output folder, and may be run at once, again, or not at all: ``prepare`` does what is left. Duplicates can
    be told only when every part is scored: where ``filter.duplicates`` is set, what comes behind is done by a second round of parts.

    Args:
        part: (number from 1, how many parts).
    Raises:
        ConfigError, DataError: As ``prepare``.
    """
    started_s = time.monotonic()
    number, parts = part
    if not 1 <= number <= parts:
        raise ConfigError(f"--part {number}/{parts}: the number must be from 1 to {parts}")
    folder, sources = _open(config, codec)
    with (
        _disk_full_named(folder),
        shared(folder, part),
        StageStore(folder / STATE_DIR / "stages", name=f"part-{number}-of-{parts}") as store,
    ):
        run = Run(config, folder=folder, finished=read_finished(folder), store=store, codec=codec, text=text, device=device)
        lots = lots_of(sources)[number - 1 :: parts]
        mine = [source for lot in lots for source in lot]
        run.book.try_again(mine)
        _advance(run, sources, lots, on_progress)
        return PartReport(
            part=number,
            parts=parts,
            sources=len(mine),
            clips=run.num_clips,
            waits=not all(run.book.is_done(source) or run.book.gave_up(source) for source in mine),
            seconds=time.monotonic() - started_s,
        )


def _advance(run: Run, sources: Sequence[Source], lots: Sequence[Sequence[Source]], on_progress: OnProgress) -> None:
    """Everything up to the encoded clips of these lots; up to the scores, where duplicates of other parts' clips can't be told yet."""
    if not run.book.resolve_duplicates(sources):
        _work(run, lots, on_progress, until=("duplicates",), what="scoring")
    if run.book.resolve_duplicates(sources):
        _work(run, lots, on_progress, until=(), what="clips")
        while run.book.resolve_again(sources):
            _work(run, lots, on_progress, until=(), what="clips")


def _work(run: Run, lots: Sequence[Sequence[Source]], on_progress: OnProgress, *, until: tuple[Work, ...], what: str) -> None:
    sources = [source for lot in lots for source in lot]
    tally = Tally()
    already = [source for source in sources if run.book.is_done(source, until=until)]
    done = len(already)

    def count(some: Sequence[Source]) -> None:
        for source, clip, verdict in _verdicts(run.book, some):
            tally.add(source, clip, verdict)

    def tell() -> None:
        on_progress(PrepareProgress(what=what, done=done, total=len(sources), samples=tally.kept, dropped=tally.num_dropped))

    def after() -> None:
        nonlocal done
        done += 1
        tell()

    count(already)
    tell()
    run.advance(lots, until=until, on_source=after, on_lot=count)


def _verdicts_of(book: Book, source: Source) -> Iterator[tuple[Clip | None, Verdict]]:
    """Where each clip of a source stands; then why there are no (more)."""
    problem = book.source_problem(source)
    if problem is not None:
        yield None, Verdict(stage="caption" if source.problem is None else "probe", reason=problem)
        return
    problem = book.cut_problem(source)
    for clip in book.clips(source):
        verdict = book.verdict(source, clip)
        if verdict.waits_for is not None and problem is not None and book.gave_up(source):
            verdict = Verdict(stage="cut", reason=problem)
        yield clip, verdict
    if problem is not None:  # told even where some clips were cut before
        yield None, Verdict(stage="cut", reason=problem)


def _verdicts(book: Book, sources: Sequence[Source]) -> Iterator[tuple[Source, Clip | None, Verdict]]:
    for source in sources:
        for clip, verdict in _verdicts_of(book, source):
            yield source, clip, verdict


def _judge(book: Book, sources: Sequence[Source]) -> tuple[list[Kept], Tally]:
    """The clips that become samples, in order, and counts of the others."""
    kept, tally = [], Tally()
    for source, clip, verdict in _verdicts(book, sources):
        tally.add(source, clip, verdict)
        if clip is not None and verdict.kept:
            latents, text = book.encoded(source, clip)
            caption = book.caption(source, clip)
            assert caption is not None
            video = saved_name(clip)
            kept.append(
                Kept(key=clip.key, source=source.name, caption=caption, shape=clip.shape, video=video, latents=latents, text=text)
            )
    return kept, tally


def _wanted(book: Book, sources: Sequence[Source]) -> frozenset[str]:
    """Keys of the arrays that some threshold of this config could ask for."""
    keys = set()
    for source in sources:
        if book.source_problem(source) is None:
            for clip in book.clips(source):
                keys.add(book.keys.latents(clip))
                caption = book.caption(source, clip)
                if caption is not None:
                    keys.add(book.keys.text(clip, caption))
    return frozenset(keys)


def _open(config: PrepareConfig, codec: VideoCodec) -> tuple[Path, list[Source]]:
    """The output folder, and what there is to prepare.

    Raises:
        ConfigError: With every problem of the config that can be seen before any video is.
        DataError: The sources can't be used.
    """
    problems = []
    if config.input.path is None:
        problems.append("input.path is not set; give the folder that holds the videos")
    if config.output.path is None:
        problems.append("output.path is not set; give the folder that shall hold the shards")
    elif expand(config.output.path).exists() and not expand(config.output.path).is_dir():
        problems.append(f"output.path={config.output.path!r} is a file; give a folder")
    lacking = missing_extra("cv2", extra="prepare", wanted_by="preparation, which resizes frames with OpenCV,")
    if lacking:
        problems.append(lacking)
    for clip in sorted({Thw(*bucket) for bucket in config.clip.buckets}):
        try:
            codec.latent_shape(clip)
        except ConfigError as error:
            problems += [f"clip.buckets: {problem}" for problem in error.problems]
    if problems:
        raise ConfigError(problems)
    assert config.input.path is not None and config.output.path is not None
    sources = scan_sources(expand(config.input.path))
    if config.caption.model is None:
        require_captions(sources, folder=expand(config.input.path))
    return expand(config.output.path), sources


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
            "it goes on where it was"
        ) from error
