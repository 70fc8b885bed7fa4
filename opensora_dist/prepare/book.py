"""What the records of the stages say about each clip under a config: kept, dropped and why, or which stage it waits for."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from opensora_dist.config.load import expand
from opensora_dist.config.prepare import PrepareConfig
from opensora_dist.core.types import Thw
from opensora_dist.prepare.blobs import Blobs
from opensora_dist.prepare.sources import Source
from opensora_dist.prepare.stages import Clip, StageKeys, as_measured, computed_scores, first_reason, named_clip, scores_of
from opensora_dist.prepare.store import StageStore

NO_CAPTION = "no caption: its row has none, or there is no .txt beside it"
Work = Literal["score", "aesthetic", "duplicates", "images", "caption", "match", "latents", "text", "save"]


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """Where a clip stands.

    Args:
        waits_for: What has to be found out next; None where all is known.
        stage, reason: Which stage dropped it, and why; "" where none did.
    """

    waits_for: Work | None = None
    stage: str = ""
    reason: str = ""

    @property
    def kept(self) -> bool:
        """Whether it becomes a sample."""
        return self.waits_for is None and not self.stage


def saved_name(clip: Clip) -> str:
    """Of the file of a clip's video. It changes with what is to be seen in it: one that is there is the right one."""
    return f"{clip.key}-{clip.content[:8]}.mp4"


def _number(record: Mapping[str, float | None]) -> float:
    value = record["value"]
    return math.nan if value is None else value


class Book:
    """Reads the records.

    Args:
        config: Of the preparation.
        store: The records.
        blobs: The arrays.
    """

    def __init__(self, config: PrepareConfig, *, store: StageStore, blobs: Blobs) -> None:
        self.config, self.store, self.blobs = config, store, blobs
        self.keys = StageKeys(config)
        self._scores = computed_scores(config)
        self.wants_aesthetic, self._wants_match = (name in scores_of(config) for name in ("aesthetic", "match"))
        self._twins: Mapping[str, str] | None = None if config.filter.duplicates is not None else {}
        self._save = None if config.clip.save is None else expand(config.clip.save)
        self._cleaned = functools.lru_cache(maxsize=1 << 16)(self._clean)
        self._saved = {path.name for path in self._save.glob("*.mp4")} if self._save is not None else set()

    # Sources

    def source_problem(self, source: Source) -> str | None:
        """Why a source isn't looked at, or None."""
        if source.problem is not None:
            return source.problem
        return NO_CAPTION if source.caption is None and self.config.caption.model is None else None

    def clips(self, source: Source) -> Iterator[Clip]:
        """The clips of a source that are known so far, in order."""
        ordinal = 0
        while (place := self.store.get("clip", self.keys.clip(source, ordinal))) is not None:
            start_s, shape, size = place
            yield named_clip(
                source, self.config, self.keys, ordinal=ordinal, start_s=start_s, shape=Thw(*shape), size=(size[0], size[1])
            )
            ordinal += 1

    def was_cut(self, source: Source) -> bool:
        """Whether all clips of a source are known."""
        return self.store.get("cut", self.keys.cut(source)) is not None

    def cut_problem(self, source: Source) -> str | None:
        """Why a source has no (more) clips, or None."""
        return (self.store.get("cut", self.keys.cut(source)) or {}).get("problem")

    def gave_up(self, source: Source) -> bool:
        """Whether a source couldn't be worked on to its end, for a reason that may pass: its clips that wait are not waited for."""
        return "passing" in (self.store.get("cut", self.keys.cut(source)) or {})

    def try_again(self, sources: Iterable[Source]) -> None:
        """Forgets problems of earlier runs that may have passed."""
        self.store.put_all([("cut", self.keys.cut(source), None) for source in sources if self.gave_up(source)])

    def is_done(self, source: Source, *, until: Collection[Work] = ()) -> bool:
        """Whether nothing is left to do for a source, but for what waits for one of ``until``."""
        if self.source_problem(source) is not None:
            return True
        waiting = (self.verdict(source, clip).waits_for for clip in self.clips(source))
        return self.was_cut(source) and all(work is None or work in until for work in waiting)

    # Clips

    def scores(self, clip: Clip) -> dict[str, Any]:
        """All that was measured of a clip from its frames."""
        scores = as_measured(self.store.get("scores", self.keys.scores(clip)) or {})
        aesthetic = self.store.get("aesthetic", self.keys.aesthetic(clip)) if self.wants_aesthetic else None
        return scores if aesthetic is None else scores | {"aesthetic": _number(aesthetic)}

    def verdict(self, source: Source, clip: Clip) -> Verdict:
        """Where a clip stands."""
        for step in (self._by_scores, self._by_duplicates, self._by_images, self._by_caption, self._by_match, self._by_encoding):
            verdict = step(source, clip)
            if verdict is not None:
                return verdict
        return Verdict()

    def said(self, source: Source, clip: Clip) -> str | None:
        """The caption as it was written or generated; None where it has to be generated first, as where an empty one was written."""
        caption = self.config.caption
        if caption.model is None or (caption.keep_existing and source.caption):
            return source.caption
        forms = self.store.get("caption", self.keys.caption(clip))
        return None if forms is None else str(forms[caption.use])

    def written(self, source: Source, clip: Clip) -> str | None:
        """What was ``said``, cleaned where that is asked for."""
        text = self.said(source, clip)
        return None if text is None else self._cleaned(text)

    def _clean(self, text: str) -> str:
        from opensora_dist.prepare.clean import clean_caption

        return clean_caption(text, self.config.clean)

    def caption(self, source: Source, clip: Clip) -> str | None:
        """The caption that is trained on: as ``written``, with the scores that are appended."""
        text = self.written(source, clip)
        names = self.config.caption.append
        if text is None or not names:
            return text
        from opensora_dist.prepare.clean import append_scores

        return append_scores(text, self.scores(clip), names)

    def match(self, source: Source, clip: Clip) -> float | None:
        """The cosine of picture and caption, where it is known."""
        text = self.written(source, clip)
        record = None if text is None else self.store.get("match", self.keys.match(clip, text))
        return None if record is None else _number(record)

    def encoded(self, source: Source, clip: Clip) -> tuple[str, str]:
        """Keys of the latents and the text vectors of a kept clip."""
        text = self.caption(source, clip)
        assert text is not None
        return self.keys.latents(clip), self.keys.text(clip, text)

    def saved_as(self, clip: Clip) -> Path | None:
        """Where its video goes; None where none is asked for."""
        return None if self._save is None else self._save / saved_name(clip)

    def note_saved(self, clip: Clip) -> None:
        """Its video is there."""
        self._saved.add(saved_name(clip))

    # The whole set

    def resolve_duplicates(self, sources: Sequence[Source]) -> bool:
        """Decides which clips are duplicates of earlier ones, once every clip is scored. Nothing else depends on other clips.

        A clip that is known to be dropped, as one whose caption is refused, stands in for none.

        Returns:
            Whether it could be decided.
        """
        if self._twins is not None:
            return True
        scored: tuple[Work, ...] = ("duplicates",)
        if not all(self.is_done(source, until=scored) or self.gave_up(source) for source in sources):
            return False
        self._twins = self._near_ones(sources)
        return True

    def resolve_again(self, sources: Sequence[Source]) -> bool:
        """Whether there are clips that are no duplicates after all: of the ones kept in their stead, some have been dropped since.

        In the end none is a duplicate of a clip that is dropped, and which are kept follows from the records alone.
        """
        before = self._twins
        if not before:
            return False
        self._twins = self._near_ones(sources)
        return bool(before.keys() - self._twins.keys())

    def _near_ones(self, sources: Sequence[Source]) -> dict[str, str]:
        """By content of a clip, the key of an earlier one that looks like it."""
        from opensora_dist.prepare.duplicates import near_duplicates

        clips = [
            clip
            for source in sources
            if self.source_problem(source) is None
            for clip in self.clips(source)
            if self._by_scores(source, clip) is None and not self._is_dropped_later(source, clip)
        ]
        hashes = [self.scores(clip)["duplicates"] for clip in clips]
        assert self.config.filter.duplicates is not None
        kept = near_duplicates(hashes, self.config.filter.duplicates)
        return {clip.content: clips[i].key for clip, i in zip(clips, kept, strict=True) if i is not None}

    def _is_dropped_later(self, source: Source, clip: Clip) -> bool:
        """Whether a step behind the duplicates drops a clip, by what is known already."""
        for step in (self._by_images, self._by_match, self._by_caption, self._by_encoding):
            verdict = step(source, clip)
            if verdict is not None and (verdict.stage or verdict.waits_for == "caption"):
                return bool(verdict.stage)
        return False

    # Steps, in order; each says where a clip stands, or None where it passes

    def _by_scores(self, source: Source, clip: Clip) -> Verdict | None:
        scores = self.scores(clip)
        if self._scores - scores.keys():
            return Verdict(waits_for="score")
        reason = first_reason(scores, clip, self.config)
        if reason is not None:
            return Verdict(stage="filter", reason=reason)
        if self.wants_aesthetic and "aesthetic" not in scores:
            return Verdict(waits_for="aesthetic")
        return None

    def _by_duplicates(self, source: Source, clip: Clip) -> Verdict | None:
        if self._twins is None:
            return Verdict(waits_for="duplicates")
        twin = self._twins.get(clip.content)
        return None if twin is None else Verdict(stage="duplicates", reason=f"near-duplicate: looks like {twin}")

    def _by_images(self, source: Source, clip: Clip) -> Verdict | None:
        if self.config.safety.images == "none":
            return None
        found = self.store.get("images", self.keys.images(clip))
        if found is None:
            return Verdict(waits_for="images")
        from opensora_dist.prepare.safety import image_reason

        reason = image_reason(found, self.config.safety)
        return Verdict(stage="safety", reason=reason) if reason else None

    def _by_caption(self, source: Source, clip: Clip) -> Verdict | None:
        text = self.written(source, clip)
        if text is None:
            return Verdict(waits_for="caption")
        words, least = len(text.split()), self.config.clean.min_words
        if words < least:
            return Verdict(stage="clean", reason=f"clean.min_words={least}: its caption has {words}")
        said = self.said(source, clip)
        assert said is not None
        reason = self._refuses_text(said) or self._refuses_text(text)  # cleaning takes away words, and may join some
        return Verdict(stage="safety", reason=reason) if reason else None

    @functools.cached_property
    def _refuses_text(self) -> Callable[[str], str | None]:
        if self.config.safety.words is None:
            return lambda text: None
        from opensora_dist.prepare.safety import TextSafety

        return TextSafety(self.config.safety).refuses

    def _by_match(self, source: Source, clip: Clip) -> Verdict | None:
        if not self._wants_match:
            return None
        match = self.match(source, clip)
        if match is None:
            return Verdict(waits_for="match")
        reason = first_reason({"match": match}, clip, self.config)
        return Verdict(stage="match", reason=reason) if reason else None

    def _by_encoding(self, source: Source, clip: Clip) -> Verdict | None:
        keys: tuple[tuple[Work, str], ...] = tuple(zip(("latents", "text"), self.encoded(source, clip), strict=True))
        for stage, key in keys:
            record = self.store.get(stage, key)
            if record is None or ("problem" not in record and key not in self.blobs):
                return Verdict(waits_for=stage)
            if "problem" in record:
                return Verdict(stage="encode", reason=record["problem"])
        if self._save is not None and saved_name(clip) not in self._saved:
            return Verdict(waits_for="save")
        return None
