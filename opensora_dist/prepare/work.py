"""The work on one source: probe, shots, cut, score. The same function for worker processes, array tasks and Ray.

A source is decoded once, for cutting, scoring and all that comes after; its clips are handed on as they come, so that an hour of video
needs no more memory than a clip: but for its thumbnails, 250 MB at 30 fps, where dissolves are looked for.
"""

# T H W frames, height, width of a clip

from __future__ import annotations

import errno
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from opensora_dist.config.prepare import PrepareConfig
from opensora_dist.core.errors import DataError, OpensoraError
from opensora_dist.core.logging import get_logger
from opensora_dist.core.types import Thw
from opensora_dist.core.video import Frames, evenly_spaced, iter_frames
from opensora_dist.prepare.clips import Cut, cut_clips
from opensora_dist.prepare.probe import Probe, probe_source
from opensora_dist.prepare.sources import Source, image_problem
from opensora_dist.prepare.stages import (
    Clip,
    Clock,
    StageKeys,
    as_measured,
    as_recorded,
    computed_scores,
    finds_shots,
    first_reason,
    named_clip,
)

_log = get_logger(__name__)
_SHORT_S, _SHORT_SHARE = 1.0, 0.05  # audio may go on a little behind the last picture


@dataclass(frozen=True, kw_only=True)
class SourceTask:
    """What a worker is asked to do with a source.

    Args:
        probe, shots: As recorded, or None.
        scores: What is known of clips, by content.
        skip: Contents of clips that need neither scores nor frames.
        last: Ordinal of the last clip of interest, where the source was cut before.
        frames: Whether clips that pass the filters are handed on with their frames.
    """

    source: Source
    probe: dict[str, Any] | None = None
    shots: list[list[float]] | None = None
    scores: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    skip: frozenset[str] = frozenset()
    last: int | None = None
    frames: bool = True


@dataclass(frozen=True, kw_only=True)
class ClipFound:
    """A clip as a worker hands it on: with scores where it made any, with frames where they are needed."""

    source: Source
    clip: Clip
    scores: dict[str, Any] | None
    frames_THW3: Frames | None


@dataclass(frozen=True, kw_only=True)
class SourceDone:
    """A worker is through with a source.

    Args:
        num_clips: All it has; None where the worker stopped early, since no later clip was of interest.
        problem: Why there are no (more) clips.
        passing: The problem may be the moment's rather than the file's: a later run is to try again.
    """

    source: Source
    probe: dict[str, Any]
    shots: list[list[float]] | None
    num_clips: int | None
    problem: str | None
    clock: Clock
    passing: bool = False


def work_source(task: SourceTask, config: PrepareConfig) -> Iterator[ClipFound | SourceDone]:
    """Probes, finds shots, decodes, cuts and scores: all clips of a source, in order, then what is to be said of the source.

    Whatever goes wrong with one source is a ``SourceDone`` with a problem: one file in a million mustn't end the run.

    Raises:
        OSError, ImportError, ConfigError: The disk is full, or something isn't installed: every source would meet it.
    """
    source, keys, clock = task.source, StageKeys(config), Clock()
    probe, shots, decoded, passing = task.probe, task.shots, _Decoded(), False
    num_clips, problem, whole = 0, image_problem(source, [Thw(*b) for b in config.clip.buckets]), True
    try:
        if probe is None:
            since_s = time.perf_counter()
            probe = probe_source(source).to_json()
            clock.add("probe", since_s)
        if problem is None and shots is None:
            shots = _shots(source, config, clock)
        if problem is None:
            for cut in _timed(_cuts(source, config, shots or [], decoded), clock):
                clip = as_clip(source, num_clips, cut, config, keys)
                num_clips += 1
                yield _found(clip, cut, task, config, Probe(**probe), clock)
                if task.last is not None and clip.ordinal >= task.last:
                    whole = False
                    break
    except Exception as error:
        if _is_fatal(error):
            error.add_note(f"while working on {source.label}")
            raise
        problem, passing = _problem(error, source), _may_pass(error)
    if (short := decoded.short_of(probe)) is not None:
        problem = short if problem is None else f"{problem}; {short}"
    yield SourceDone(
        source=source,
        probe=probe or {},
        shots=shots,
        num_clips=num_clips if whole else None,
        problem=problem,
        clock=clock,
        passing=passing,
    )


def _is_fatal(error: Exception) -> bool:
    """Whether every other source would fail with it too."""
    full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
    return full or isinstance(error, ImportError) or (isinstance(error, OpensoraError) and not isinstance(error, DataError))


def _problem(error: Exception, source: Source) -> str:
    if isinstance(error, DataError):
        return str(error).removeprefix(f"{source.label}: ")
    _log.warning("%s: %s: %s", source.label, type(error).__name__, error, exc_info=error)
    return f"{type(error).__name__}: {error}"


def _may_pass(error: BaseException) -> bool:
    """Whether a later run is to try again: a read that failed says nothing of the file, nor does what nobody foresaw."""
    cause: BaseException | None = error
    while cause is not None:
        # Pillow's are without a number: they are about what the file holds
        if isinstance(cause, OSError) and cause.errno not in (None, errno.ENOENT):
            return True
        cause = cause.__cause__
    return not isinstance(error, DataError)


@dataclass(kw_only=True)
class _Decoded:
    """How far a video was decoded, and whether it was to its end."""

    until_s: float = 0.0
    step_s: float = 0.0
    ended: bool = False

    def watch(self, frames: Iterable[tuple[float, Any]]) -> Iterator[tuple[float, Any]]:
        """The same frames."""
        for time_s, frame in frames:
            self.step_s, self.until_s = time_s - self.until_s, time_s
            yield time_s, frame
        self.ended = True

    def short_of(self, probe: Mapping[str, Any] | None) -> str | None:
        """What is to be said where the headers tell of more."""
        promised_s, had_s = float((probe or {}).get("duration_s", 0.0)), self.until_s + self.step_s
        if not self.ended or promised_s - had_s <= max(_SHORT_S, _SHORT_SHARE * promised_s):
            return None
        return f"breaks off at {had_s:.1f} of {promised_s:.1f} s"


def as_clip(source: Source, ordinal: int, cut: Cut, config: PrepareConfig, keys: StageKeys) -> Clip:
    """A cut with its names."""
    shape = Thw(*cut.frames_THW3.shape[:3])
    return named_clip(
        source,
        config,
        keys,
        ordinal=ordinal,
        start_s=cut.start_s,
        shape=shape,
        size=(cut.height, cut.width),
    )


def _shots(source: Source, config: PrepareConfig, clock: Clock) -> list[list[float]]:
    """[start_s, end_s, first frame, the one behind its last] of each shot, long or short; none stands for the whole video."""
    if not finds_shots(config) or source.kind == "image":
        return []
    from opensora_dist.prepare.shots import find_shots

    since_s = time.perf_counter()
    shots = find_shots(source.open(), config.shots.model_copy(update={"min_s": 0.0}))
    clock.add("shots", since_s)
    return [[shot.start_s, shot.end_s, shot.start_frame, shot.end_frame] for shot in shots]


def _cuts(source: Source, config: PrepareConfig, shots: list[list[float]], decoded: _Decoded) -> Iterator[Cut]:
    least_s = config.shots.min_s
    long = [(first, behind) for start_s, end_s, first, behind in shots if end_s - start_s >= least_s or len(shots) == 1]
    if shots and not long:
        raise DataError(f"none of its {len(shots)} shots lasts shots.min_s={least_s:g} seconds; lower it")
    options: dict[str, Any] = {"shots": long, "trim_s": config.shots.trim_s} if shots else {}
    return cut_clips(
        decoded.watch(iter_frames(source.open())),
        fps=config.clip.fps,
        buckets=[Thw(*bucket) for bucket in config.clip.buckets],
        every=config.shots.windows == "all" and source.kind == "video",
        **options,
    )


def _timed(cuts: Iterator[Cut], clock: Clock) -> Iterator[Cut]:
    """The same, with the time that decoding and cutting take."""
    while True:
        since_s = time.perf_counter()
        cut = next(cuts, None)
        clock.add("cut", since_s)
        if cut is None:
            clock.calls["cut"] -= 1
            return
        yield cut


def _found(clip: Clip, cut: Cut, task: SourceTask, config: PrepareConfig, probe: Probe, clock: Clock) -> ClipFound:
    if clip.content in task.skip:
        return ClipFound(source=task.source, clip=clip, scores=None, frames_THW3=None)
    scores = as_measured(task.scores.get(clip.content, {}))
    missing = computed_scores(config) - scores.keys()
    if missing:
        since_s = time.perf_counter()
        scores |= measure(cut.frames_THW3, missing, config, probe)
        clock.add("score", since_s)
    wanted = task.frames and first_reason(scores, clip, config) is None
    return ClipFound(
        source=task.source,
        clip=clip,
        scores=as_recorded(scores) if missing else None,
        frames_THW3=cut.frames_THW3 if wanted else None,
    )


def measure(frames: Frames, names: frozenset[str], config: PrepareConfig, probe: Probe) -> dict[str, Any]:
    """The scores of these names."""
    from opensora_dist.prepare.duplicates import phash
    from opensora_dist.prepare.scores import score_frames

    scores: dict[str, Any] = {}
    if "duplicates" in names:
        scores["duplicates"] = phash(evenly_spaced(frames, config.scores.frames))
    if rest := names - {"duplicates"}:
        scores |= score_frames(frames, fps=config.clip.fps, names=rest, source=probe, looks=config.scores.frames)
    return scores
