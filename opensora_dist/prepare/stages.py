"""The stages, clips as they go through them, and what they find.

What a stage finds is a record of the store under a key that says what it follows from: see ``StageKeys``.
"""

from __future__ import annotations

import functools
import math
import time
from collections import Counter, defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, get_args

from opensora_dist.config.codec import CodecConfig, TextConfig
from opensora_dist.config.prepare import FilterConfig, PrepareConfig, ScoreName
from opensora_dist.core.types import Thw
from opensora_dist.prepare.fingerprint import fingerprint
from opensora_dist.prepare.shards import sample_key
from opensora_dist.prepare.sources import Source
from opensora_dist.prepare.store import address

STAGES = ("probe", "shots", "cut", "score", "filter", "duplicates", "safety", "caption", "clean", "match", "encode")
SCORES: tuple[str, ...] = get_args(ScoreName)
_VERSIONS = {  # raise one where the stage's results change for the same input
    "probe": 1,
    "shots": 2,
    "cut": 2,
    "scores": 2,
    "aesthetic": 2,
    "images": 2,
    "caption": 2,
    "match": 2,
    "latents": 1,
    "text": 1,
}


@dataclass(frozen=True, kw_only=True)
class Clip:
    """A clip, known by where it is.

    Args:
        ordinal: Its number among its source's clips.
        key: Of the sample that it may become: it stays when other clips come or go.
        content: What its frames follow from, hashed; the version of cutting too.
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


class StageKeys:
    """The keys of records under a config. Each hashes what its value depends on, and nothing else.

    Networks are known by their files, which are looked at once, when the first key that needs them is asked for: see ``fingerprint``.

    Args:
        config: Of the preparation.
    """

    def __init__(self, config: PrepareConfig) -> None:
        self._config = config
        shots, clip = config.shots, config.clip
        self._shots = address("shots", _VERSIONS["shots"], shots.detector, shots.threshold, shots.dissolves)
        cut = (shots.min_s, shots.windows, shots.trim_s, clip.fps, sorted(clip.buckets))
        self._cut = address("cut", _VERSIONS["cut"], self._shots, cut)
        self._images = address("images", _VERSIONS["images"], config.safety.images, config.safety.image_frames)

    @functools.cached_property
    def _caption(self) -> str:
        caption = self._config.caption
        asked = caption.model_dump(mode="json", exclude={"model", "keep_existing", "use", "append", "batch"})
        return address("caption", _VERSIONS["caption"], asked, fingerprint(caption.model))

    @functools.cached_property
    def _latents(self) -> str:
        codec = self._config.codec
        seed = None if codec.name == "dct" else self._config.seed  # that one draws nothing
        return address("latents", _VERSIONS["latents"], _known_by_files(codec), seed, self._config.output.dtype)

    @functools.cached_property
    def _text(self) -> str:
        return address("text", _VERSIONS["text"], _known_by_files(self._config.text), self._config.output.dtype)

    @functools.cached_property
    def _clip_model(self) -> str | None:
        return fingerprint(self._config.scores.clip_model)

    @functools.cached_property
    def _aesthetic_head(self) -> str | None:
        return fingerprint(self._config.scores.aesthetic_head)

    def source(self, source: Source) -> str:
        """Of a source's file."""
        return address(source.name, source.num_bytes, source.mtime_ns)

    def probe(self, source: Source) -> str:
        """Of what its headers say."""
        return address("probe", _VERSIONS["probe"], self.source(source))

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
        return address("scores", _VERSIONS["scores"], _VERSIONS["probe"], clip.content, self._config.scores.frames)

    def aesthetic(self, clip: Clip) -> str:
        """Of its aesthetic score."""
        seen = (clip.content, self._config.scores.frames)
        return address("aesthetic", _VERSIONS["aesthetic"], seen, self._clip_model, self._aesthetic_head)

    def match(self, clip: Clip, caption: str) -> str:
        """Of the cosine of a clip and a caption."""
        return address("match", _VERSIONS["match"], clip.content, self._config.scores.frames, caption, self._clip_model)

    def images(self, clip: Clip) -> str:
        """Of what the image filter finds."""
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


def _known_by_files(network: CodecConfig | TextConfig) -> dict[str, Any]:
    """Its section, in which files stand for their path."""
    section = network.model_dump(mode="json")
    return section | {"path": fingerprint(section["path"])} if "path" in section else section


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


def named_clip(
    source: Source, config: PrepareConfig, keys: StageKeys, *, ordinal: int, start_s: float, shape: Thw, size: tuple[int, int]
) -> Clip:
    """A clip by where it is. One that is taken from the start of an uncut video is known by the video's name alone."""
    end_s = start_s + shape.t / config.clip.fps
    alone = not finds_shots(config) and config.shots.windows == "first"
    return Clip(
        ordinal=ordinal,
        key=sample_key(source.name, span_s=None if alone or source.kind == "image" else (start_s, end_s)),
        content=address(_VERSIONS["cut"], keys.source(source), config.clip.fps, start_s, shape),
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


def finds_shots(config: PrepareConfig) -> bool:
    """Whether videos are cut into shots."""
    return config.shots.detector != "none" or config.shots.dissolves


_NAN = "NaN"  # in records, as JSON has none; no camera motion is called that


def as_recorded(scores: Mapping[str, Any]) -> dict[str, Any]:
    """Scores as a record holds them. One that is infinite is as good as none."""
    return {name: _NAN if isinstance(x, float) and not math.isfinite(x) else x for name, x in scores.items()}


def as_measured(record: Mapping[str, Any]) -> dict[str, Any]:
    """Scores as they were measured; NaN where a number was looked for in vain."""
    return {name: math.nan if x == _NAN else x for name, x in record.items()}


def first_reason(scores: Mapping[str, Any], clip: Clip, config: PrepareConfig) -> str | None:
    """Why a clip is dropped by what is known of it so far, or None."""
    if config.filter == FilterConfig():
        return None
    for name, value in scores.items():  # no threshold means anything to NaN
        if isinstance(value, float) and math.isnan(value) and getattr(config.filter, name, None) is not None:
            return f"{name} is not a number, and filter.{name} asks for one"
    from opensora_dist.prepare.filters import dropped_by

    lasts = {"duration_s": clip.end_s - clip.start_s} if clip.shape.t > 1 else {}  # an image lasts no time
    return dropped_by({**lasts, "min_side": min(clip.height, clip.width), **scores}, config.filter)
