"""The stages that need no device: probe, shots, cut, score. The same functions for worker processes, array tasks and Ray.

What a stage finds is a record of the store under a key that says what it follows from: see ``StageKeys``. A source is decoded once, for
cutting, scoring and all that comes after; its clips are handed on as they come, so that an hour of video needs no more memory than a clip.
"""

# T H W frames, height, width of a clip

from __future__ import annotations

import math
import time
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from opensora_dist.config.prepare import FilterConfig, PrepareConfig
from opensora_dist.core.errors import DataError
from opensora_dist.core.types import Thw
from opensora_dist.core.video import Frames, evenly_spaced, iter_frames
from opensora_dist.prepare.clips import Cut, cut_clips
from opensora_dist.prepare.probe import Probe, probe_source
from opensora_dist.prepare.shards import sample_key
from opensora_dist.prepare.sources import Source, image_problem
from opensora_dist.prepare.store import address

STAGES = ("probe", "shots", "cut", "score", "filter", "duplicates", "safety", "caption", "clean", "match", "encode")
SCORES = (
    "brightness",
    "static",
    "sharpness",
    "motion",
    "text_area",
    "compression",
    "camera",
    "duplicates",
    "aesthetic",
    "match",
)
_VERSIONS = {  # raise one where the stage's results change for the same input
    "shots": 1,
    "cut": 1,
    "scores": 1,
    "aesthetic": 1,
    "images": 1,
    "caption": 1,
    "match": 1,
    "latents": 1,
    "text": 1,
}


@dataclass(frozen=True, kw_only=True)
class Clip:
    """A clip, known by where it is.

    Args:
        ordinal: Its number among its source's clips.
        key: Of the sample that it may become: it stays when other clips come or go.
        content: What its frames follow from, hashed.
        start_s, end_s: Seconds from the start of the video.
        shape: Frames, height and width in pixels.
        height, width: Of the video.
    """

    ordinal: int
    key: str
    content: str
    start_s: float
    end_s: float
    shape: Thw
    height: int
    width: int

    @property
    def fps(self) -> float:
        """Frames per second of the clip."""
        return self.shape.t / (self.end_s - self.start_s)


class StageKeys:
    """The keys of records under a config. Each hashes what its value depends on, and nothing else.

    Args:
        config: Of the preparation.
    """

    def __init__(self, config: PrepareConfig) -> None:
        self._config = config
        shots, clip = config.shots, config.clip
        self._shots = address("shots", _VERSIONS["shots"], shots.detector, shots.threshold, shots.dissolves)
        cut = (shots.min_s, shots.windows, shots.trim_s, clip.fps, sorted(clip.buckets))
        self._cut = address("cut", _VERSIONS["cut"], self._shots, cut)
        caption = config.caption.model_dump(mode="json", exclude={"keep_existing", "use", "append", "batch"})
        self._caption = address("caption", _VERSIONS["caption"], caption)
        images = config.safety.model_dump(mode="json", exclude={"words"})
        self._images = address("images", _VERSIONS["images"], images)
        codec, text = config.codec.model_dump(mode="json"), config.text.model_dump(mode="json")
        self._latents = address("latents", _VERSIONS["latents"], codec, config.seed, config.output.dtype)
        self._text = address("text", _VERSIONS["text"], text, config.output.dtype)

    def source(self, source: Source) -> str:
        """Of a source's file."""
        return address(source.name, source.num_bytes, source.mtime_ns)

    def shots(self, source: Source) -> str:
        """Of where a video is cut."""
        return address(self._shots, self.source(source))

    def cut(self, source: Source) -> str:
        """Of how many clips a source gives."""
        return address(self._cut, self.source(source))

    def clip(self, source: Source, ordinal: int) -> str:
        """Of where one of them is."""
        return address(self._cut, self.source(source), ordinal)

    def scores(self, clip: Clip) -> str:
        """Of what was measured of a clip; one record for all scores, which grows."""
        return address("scores", _VERSIONS["scores"], clip.content, self._config.scores.frames)

    def aesthetic(self, clip: Clip) -> str:
        """Of its aesthetic score."""
        scores = self._config.scores
        seen = (clip.content, scores.frames)
        return address("aesthetic", _VERSIONS["aesthetic"], seen, scores.clip_model, scores.aesthetic_head)

    def match(self, clip: Clip, caption: str) -> str:
        """Of the cosine of a clip and a caption."""
        scores = self._config.scores
        return address("match", _VERSIONS["match"], clip.content, scores.frames, caption, scores.clip_model)

    def images(self, clip: Clip) -> str:
        """Of what the image filter says."""
        return address(self._images, clip.content)

    def caption(self, clip: Clip) -> str:
        """Of what the captioner says."""
        return address(self._caption, clip.content)

    def latents(self, clip: Clip) -> str:
        """Of its latents. A codec that draws is keyed by the sample."""
        return address(self._latents, clip.content, clip.key)

    def text(self, clip: Clip, caption: str) -> str:
        """Of its text vectors. Of the clip too, so that each sample has its own."""
        return address(self._text, clip.key, caption)


def _zeros() -> dict[str, float]:
    return defaultdict(float)


@dataclass(kw_only=True)
class Clock:
    """Seconds and calls per stage."""

    seconds: dict[str, float] = field(default_factory=_zeros)
    calls: Counter[str] = field(default_factory=Counter)

    def add(self, stage: str, since_s: float) -> None:
        """A call that began at ``since_s`` of ``time.perf_counter`` has ended."""
        self.seconds[stage] += time.perf_counter() - since_s
        self.calls[stage] += 1

    def update(self, other: Clock) -> None:
        """Takes in another's."""
        for stage, seconds in other.seconds.items():
            self.seconds[stage] += seconds
        self.calls.update(other.calls)


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
    """

    source: Source
    probe: dict[str, Any]
    shots: list[list[float]] | None
    num_clips: int | None
    problem: str | None
    clock: Clock


def work_source(task: SourceTask, config: PrepareConfig) -> Iterator[ClipFound | SourceDone]:
    """Probes, finds shots, decodes, cuts and scores: all clips of a source, in order, then what is to be said of the source.

    Raises:
        Exception: What isn't the source's fault; a source that can't be used is a ``SourceDone`` with a problem.
    """
    source, keys, clock = task.source, StageKeys(config), Clock()
    probe, shots = task.probe, task.shots
    num_clips, problem, whole = 0, image_problem(source, [Thw(*b) for b in config.clip.buckets]), True
    try:
        if probe is None:
            since_s = time.perf_counter()
            probe = probe_source(source).to_json()
            clock.add("probe", since_s)
        if problem is None and shots is None:
            shots = _shots(source, config, clock)
        if problem is None:
            for cut in _timed(_cuts(source, config, shots or []), clock):
                clip = as_clip(source, num_clips, cut, config, keys)
                num_clips += 1
                yield _found(clip, cut, task, config, Probe(**probe), clock)
                if task.last is not None and clip.ordinal >= task.last:
                    whole = False
                    break
    except DataError as error:
        problem = str(error).removeprefix(f"{source.label}: ")
    except Exception as error:
        error.add_note(f"while working on {source.label}")
        raise
    yield SourceDone(
        source=source, probe=probe or {}, shots=shots, num_clips=num_clips if whole else None, problem=problem, clock=clock
    )


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


def named_clip(
    source: Source, config: PrepareConfig, keys: StageKeys, *, ordinal: int, start_s: float, shape: Thw, size: tuple[int, int]
) -> Clip:
    """A clip by where it is. One that is taken from the start of an uncut video is known by the video's name alone."""
    end_s = start_s + shape.t / config.clip.fps
    alone = not _finds_shots(config) and config.shots.windows == "first"
    return Clip(
        ordinal=ordinal,
        key=sample_key(source.name, span_s=None if alone or source.kind == "image" else (start_s, end_s)),
        content=address(keys.source(source), config.clip.fps, start_s, shape),
        start_s=start_s,
        end_s=end_s,
        shape=shape,
        height=size[0],
        width=size[1],
    )


def scores_of(config: PrepareConfig) -> frozenset[str]:
    """Names of all scores that are wanted: asked for, filtered by, or appended to captions."""
    filtered = {name for name in SCORES if getattr(config.filter, name) is not None}
    return frozenset({*config.scores.also, *filtered, *config.caption.append})


def computed_scores(config: PrepareConfig) -> frozenset[str]:
    """Of the wanted scores, those that workers compute from frames."""
    return scores_of(config) - {"aesthetic", "match"}


def _shots(source: Source, config: PrepareConfig, clock: Clock) -> list[list[float]]:
    """[start_s, end_s, first frame, the one behind its last] of each shot, long or short; none stands for the whole video."""
    if not _finds_shots(config) or source.kind == "image":
        return []
    from opensora_dist.prepare.shots import find_shots

    since_s = time.perf_counter()
    shots = find_shots(source.open(), config.shots.model_copy(update={"min_s": 0.0}))
    clock.add("shots", since_s)
    return [[shot.start_s, shot.end_s, shot.start_frame, shot.end_frame] for shot in shots]


def _finds_shots(config: PrepareConfig) -> bool:
    return config.shots.detector != "none" or config.shots.dissolves


def _cuts(source: Source, config: PrepareConfig, shots: list[list[float]]) -> Iterator[Cut]:
    least_s = config.shots.min_s
    long = [(first, behind) for start_s, end_s, first, behind in shots if end_s - start_s >= least_s or len(shots) == 1]
    if shots and not long:
        raise DataError(f"none of its {len(shots)} shots lasts shots.min_s={least_s:g} seconds; lower it")
    options: dict[str, Any] = {"shots": long, "trim_s": config.shots.trim_s} if shots else {}
    return cut_clips(
        iter_frames(source.open()),
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
    scores = dict(task.scores.get(clip.content, {}))
    missing = computed_scores(config) - scores.keys()
    if missing:
        since_s = time.perf_counter()
        scores |= measure(cut.frames_THW3, missing, config, probe)
        clock.add("score", since_s)
    wanted = task.frames and first_reason(scores, clip, config) is None
    return ClipFound(
        source=task.source, clip=clip, scores=scores if missing else None, frames_THW3=cut.frames_THW3 if wanted else None
    )


def measure(frames: Frames, names: frozenset[str], config: PrepareConfig, probe: Probe) -> dict[str, Any]:
    """The scores of these names."""
    from opensora_dist.prepare.duplicates import phash
    from opensora_dist.prepare.scores import score_frames

    scores: dict[str, Any] = {}
    if "duplicates" in names:
        scores["duplicates"] = phash(evenly_spaced(frames, config.scores.frames))
    if rest := names - {"duplicates"}:
        measured = score_frames(frames, fps=config.clip.fps, names=rest, source=probe, looks=config.scores.frames)
        # JSON has no NaN, and no threshold means anything to it
        scores |= {name: None if isinstance(x, float) and not math.isfinite(x) else x for name, x in measured.items()}
    return scores


def first_reason(scores: Mapping[str, Any], clip: Clip, config: PrepareConfig) -> str | None:
    """Why a clip is dropped by what is known of it so far, or None."""
    if config.filter == FilterConfig():
        return None
    from opensora_dist.prepare.filters import dropped_by

    lasts = {"duration_s": clip.end_s - clip.start_s} if clip.shape.t > 1 else {}  # an image lasts no time
    return dropped_by({**lasts, "min_side": min(clip.height, clip.width), **scores}, config.filter)
