"""What a preparation made of what it was given: counts for people, and every clip in ``clips.parquet``."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from opensora_dist.core.index import INDEX_NAME
from opensora_dist.core.io import atomic_path
from opensora_dist.core.types import Thw
from opensora_dist.prepare.batches import batched
from opensora_dist.prepare.book import Book, Verdict
from opensora_dist.prepare.sources import Source
from opensora_dist.prepare.stages import Clip, Clock

REPORT_NAME = "report.json"
CLIPS_NAME = "clips.parquet"
DROPS_LISTED = 1000
_GROUP_ROWS = 1 << 15
_COLUMNS = pa.schema(
    [
        ("key", pa.string()),
        ("path", pa.string()),
        ("start_s", pa.float64()),
        ("end_s", pa.float64()),
        ("text", pa.string()),
        ("num_frames", pa.int32()),
        ("height", pa.int32()),
        ("width", pa.int32()),
        ("aspect_ratio", pa.float64()),
        ("resolution", pa.int64()),
        ("fps", pa.float64()),
        ("bucket", pa.string()),
        ("aes", pa.float64()),
        ("flow", pa.float64()),
        ("match", pa.float64()),
        ("cmotion", pa.string()),
        ("brightness", pa.float64()),
        ("static", pa.float64()),
        ("sharpness", pa.float64()),
        ("text_area", pa.float64()),
        ("compression", pa.float64()),
        ("phash", pa.uint64()),
        ("kept", pa.bool_()),
        ("stage", pa.string()),
        ("reason", pa.string()),
    ]
)
_SCORE_COLUMNS = {
    "aesthetic": "aes",
    "motion": "flow",
    "camera": "cmotion",
    "duplicates": "phash",
    **{name: name for name in ("brightness", "static", "sharpness", "text_area", "compression")},
}


@dataclass(frozen=True, kw_only=True)
class Drop:
    """A clip that gives no sample, or a source that gives no clip, and why.

    Args:
        stage: The stage that dropped it.
        start_s: Of a clip, where it begins.
    """

    source: str
    reason: str
    stage: str
    start_s: float | None = None


@dataclass(frozen=True, kw_only=True)
class PrepareReport:
    """What a preparation made. ``seconds``, ``clips_per_s`` and ``stages`` are of this run, the rest of the whole data set.

    Args:
        input: Folder of the sources.
        sources, clips: Looked at.
        dropped: The first of them; all are in ``clips.parquet``.
        num_dropped: All of them.
        reasons: Stage to reason to count, numbers left out of the reasons.
        stages: Per stage its ``calls``, ``seconds`` of all processes together, and ``per_core_s``: calls per second of one core or device.
    """

    input: str
    samples: int
    shards: int
    buckets: dict[str, int]
    sources: int
    clips: int
    dropped: tuple[Drop, ...]
    num_dropped: int
    reasons: dict[str, dict[str, int]]
    cut_captions: int
    seconds: float
    clips_per_s: float
    stages: dict[str, dict[str, float]]


@dataclass(kw_only=True)
class Tally:
    """Counts of verdicts, as they are read."""

    clips: int = 0
    kept: int = 0
    dropped: list[Drop] = field(default_factory=list)
    num_dropped: int = 0
    reasons: dict[str, Counter[str]] = field(default_factory=lambda: defaultdict(Counter))

    def add(self, source: Source, clip: Clip | None, verdict: Verdict) -> None:
        """Counts a clip, or a source without one."""
        self.clips += clip is not None
        self.kept += verdict.kept
        if not verdict.stage:
            return
        self.num_dropped += 1
        self.reasons[verdict.stage][group_reason(verdict.reason)] += 1
        if len(self.dropped) < DROPS_LISTED:
            start_s = None if clip is None else clip.start_s
            self.dropped.append(Drop(source=source.name, reason=verdict.reason, stage=verdict.stage, start_s=start_s))


def stage_speeds(clock: Clock) -> dict[str, dict[str, float]]:
    """Of a clock, what a report says."""
    return {
        stage: {"calls": calls, "seconds": clock.seconds[stage], "per_core_s": calls / max(clock.seconds[stage], 1e-9)}
        for stage, calls in sorted(clock.calls.items())
    }


def bucket_counts(shapes: Iterable[Thw], counts: Mapping[Thw, int]) -> dict[str, int]:
    """Samples of every bucket of a config."""
    return {str(shape): counts.get(shape, 0) for shape in shapes}


def write_clips(folder: Path, *, judged: Iterable[tuple[Source, Clip | None, Verdict]], book: Book) -> None:
    """Writes ``clips.parquet``, atomically: a row per clip that was looked at, and one per source that gave none."""
    path = folder / CLIPS_NAME
    with atomic_path(path) as partial, pq.ParquetWriter(partial, _COLUMNS, compression="zstd") as writer:
        for batch in batched(_rows(judged, book), _GROUP_ROWS):
            writer.write_table(pa.Table.from_pylist(list(batch), schema=_COLUMNS))


def _rows(judged: Iterable[tuple[Source, Clip | None, Verdict]], book: Book) -> Iterator[dict[str, Any]]:
    for source, clip, verdict in judged:
        row: dict[str, Any] = {"path": source.name, "text": source.caption, "num_frames": 0, "kept": verdict.kept}
        row |= {"stage": verdict.stage or None, "reason": verdict.reason or None}
        if clip is not None:
            scores = book.scores(clip)
            row |= {
                "key": clip.key,
                "start_s": clip.start_s,
                "end_s": clip.end_s,
                "text": book.caption(source, clip),
                "num_frames": clip.shape.t,
                "height": clip.height,
                "width": clip.width,
                "aspect_ratio": clip.height / clip.width,
                "resolution": clip.height * clip.width,
                "fps": book.config.clip.fps,
                "bucket": str(clip.shape),
                "match": book.match(source, clip),
                **{column: scores[name] for name, column in _SCORE_COLUMNS.items() if name in scores},
            }
        yield row


def nothing_left(tally: Tally, *, shown: int, folder: Path) -> str:
    """Why there is no data set, or still the old one."""
    lines = "".join(f"\n  {drop.source}: {drop.reason}" for drop in tally.dropped[:shown])
    rest = f"\n  and {tally.num_dropped - shown} more, in {CLIPS_NAME}" if tally.num_dropped > shown else ""
    there = f"{folder} still holds the data set that was there before, which clips.parquet and report.json no longer tell of"
    so = there if (folder / INDEX_NAME).exists() else "there is no data set"
    return f"none of {tally.num_dropped} videos and clips gives a sample, so {so}:{lines}{rest}"


def group_reason(reason: str) -> str:
    """A reason without what differs from clip to clip."""
    return re.sub(r"\d[\d.]*(e-?\d+)?", "#", reason.split(": ")[0])


def ordered(reasons: Mapping[str, Counter[str]], stages: Sequence[str]) -> dict[str, dict[str, int]]:
    """Reasons in the order of the stages, the most frequent first."""
    return {stage: dict(reasons[stage].most_common()) for stage in stages if stage in reasons}
