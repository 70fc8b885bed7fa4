"""The work on sources, lot by lot: what workers find is recorded, and what passes goes through the device's stages.

Lots are neighbours in the list of sources, and follow from that list alone. Clips of one lot and one shape are numbered as they come, and
those with neighbouring numbers share a batch: which clips are encoded together depends neither on workers nor on where a run began.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any

import torch

from opensora_dist.config.prepare import PrepareConfig
from opensora_dist.core.protocols import TextEncoder, VideoCodec
from opensora_dist.core.types import Thw
from opensora_dist.prepare.batches import batched
from opensora_dist.prepare.blobs import Blobs
from opensora_dist.prepare.book import Book, Work
from opensora_dist.prepare.device import Device, Item
from opensora_dist.prepare.resume import STATE_DIR, Finished
from opensora_dist.prepare.sources import Source
from opensora_dist.prepare.stages import Clip, Clock
from opensora_dist.prepare.store import StageStore
from opensora_dist.prepare.work import ClipFound, SourceDone, SourceTask
from opensora_dist.prepare.workers import LotTask, work_lots

_BATCH_CLIPS = 64
_BATCH_PIXELS = 1 << 24  # 200 MB of float32 RGB on the codec's device
_LOT_SOURCES = {"video": 8, "image": 64}


@dataclass(frozen=True, kw_only=True)
class PrepareProgress:
    """How far a preparation is: of ``what`` ("scoring", "clips", "shards"), how many are done. Resumed work counts as done.

    Args:
        samples, dropped: Clips whose fate is known.
    """

    what: str
    done: int
    total: int
    samples: int = 0
    dropped: int = 0


OnProgress = Callable[[PrepareProgress], None]


def lots_of(sources: Sequence[Source]) -> list[tuple[Source, ...]]:
    """Neighbours of one kind, so many at a time."""
    return [lot for kind, some in groupby(sources, key=lambda s: s.kind) for lot in batched(some, _LOT_SOURCES[kind])]


def batch_clips(shape: Thw) -> int:
    """How many clips of a shape are worked on at once."""
    return max(1, min(_BATCH_CLIPS, _BATCH_PIXELS // shape.volume))


@dataclass(kw_only=True)
class _Lot:
    """A lot under way: what comes next of its sources, and clips that wait for their batch."""

    rest: list[Source]
    seen: int = -1  # ordinal of the last clip of the source under way
    places: Counter[Thw] = field(default_factory=Counter)
    chunks: dict[Thw, list[Item]] = field(default_factory=lambda: defaultdict(list))


class Run:
    """One process's work on lots.

    Args:
        store, blobs: Of the output folder.
        device: Of the networks.
    """

    def __init__(
        self,
        config: PrepareConfig,
        *,
        folder: Path,
        finished: dict[str, Finished],
        store: StageStore,
        codec: VideoCodec,
        text: TextEncoder,
        device: torch.device,
    ) -> None:
        self._config, self.store = config, store
        places = {key: place for record in finished.values() for key, place in record.places(folder).items()}
        self.blobs = Blobs(folder / STATE_DIR / "encoded", in_shards=places)
        self.book = Book(config, store=store, blobs=self.blobs)
        self._device = Device(self.book, codec=codec, text=text, device=device)
        self._clock = Clock()
        self.num_clips = 0  # worked on by this run

    @property
    def clock(self) -> Clock:
        """Seconds and calls per stage so far, of workers and device."""
        total = Clock()
        total.update(self._clock)
        total.update(self._device.clock)
        return total

    def advance(
        self,
        lots: Sequence[Sequence[Source]],
        *,
        until: Collection[Work] = (),
        on_source: Callable[[], None],
        on_lot: Callable[[Sequence[Source]], None],
    ) -> None:
        """Takes the clips of these lots as far as they go, or until they wait for one of ``until``.

        Args:
            on_source: Called after each source that something was left to do for; its last clips may still wait for their batch.
            on_lot: Called with those sources of a lot, when nothing is left to do for them.
        """
        tasks = (task for number, lot in enumerate(lots) if (task := self._task(number, lot, until)).sources)
        under_way: dict[int, _Lot] = {}
        with closing(work_lots(tasks, self._config, workers=self._config.workers)) as messages:
            for task, message in messages:
                lot = under_way.setdefault(task.number, _Lot(rest=list(lots[task.number])))
                if isinstance(message, ClipFound):
                    self._take(lot, message)
                elif isinstance(message, SourceDone):
                    self._end_source(lot, message)
                    on_source()
                else:
                    for chunk in lot.chunks.values():
                        self._device.work(chunk)
                    del under_way[task.number]
                    on_lot([one.source for one in task.sources])

    def _task(self, number: int, lot: Sequence[Source], until: Collection[Work]) -> LotTask:
        self._forget_lost(lot)
        tasks = (self._source_task(source, until) for source in lot)
        return LotTask(number=number, sources=tuple(task for task in tasks if task is not None))

    def _forget_lost(self, lot: Sequence[Source]) -> None:
        """Where arrays that were recorded are gone, forgets those of the whole lot: so they are encoded again in the same batches."""
        stored = [
            (stage, key)
            for source in lot
            if self.book.source_problem(source) is None
            for clip in self.book.clips(source)
            if self._reaches_encoding(source, clip)
            for stage, key in zip(("latents", "text"), self.book.encoded(source, clip), strict=True)
            if "xxh3" in (self.store.get(stage, key) or {})
        ]
        if any(key not in self.blobs for _, key in stored):
            self.store.put_all([(stage, key, None) for stage, key in stored])

    def _reaches_encoding(self, source: Source, clip: Clip) -> bool:
        verdict = self.book.verdict(source, clip)
        return verdict.kept or verdict.waits_for in ("latents", "text", "save")

    def _source_task(self, source: Source, until: Collection[Work]) -> SourceTask | None:
        book, keys = self.book, self.book.keys
        if book.source_problem(source) is not None:
            return None
        waits = {clip: book.verdict(source, clip).waits_for for clip in book.clips(source)}
        todo = [clip for clip, work in waits.items() if work is not None and work not in until]
        was_cut = book.was_cut(source)
        if was_cut and not todo:
            return None
        scores = ((clip.content, self.store.get("scores", keys.scores(clip))) for clip in waits)
        shots = self.store.get("shots", keys.shots(source))
        return SourceTask(
            source=source,
            probe=self.store.get("probe", keys.probe(source)),
            shots=shots,
            scores={content: known for content, known in scores if known is not None},
            skip=frozenset(clip.content for clip in waits if clip not in todo),
            last=max(clip.ordinal for clip in todo) if was_cut else None,
            frames="duplicates" not in until or book.wants_aesthetic,
        )

    def _take(self, lot: _Lot, found: ClipFound) -> None:
        """Records a clip, and puts it in its batch."""
        self._skip_to(lot, found.source)
        clip, keys = found.clip, self.book.keys
        records: list[tuple[str, str, Any]] = []
        if self.store.get("clip", keys.clip(found.source, clip.ordinal)) is None:
            place = [clip.start_s, clip.shape, [clip.height, clip.width]]
            records.append(("clip", keys.clip(found.source, clip.ordinal), place))
        if found.scores is not None:
            records.append(("scores", keys.scores(clip), found.scores))
        self.store.put_all(records)
        lot.seen = clip.ordinal
        self._place(lot, clip.shape)
        if found.frames_THW3 is not None:
            lot.chunks[clip.shape].append(Item(source=found.source, clip=clip, frames_THW3=found.frames_THW3))
        self.num_clips += found.scores is not None or found.frames_THW3 is not None

    def _place(self, lot: _Lot, shape: Thw) -> None:
        """Numbers a clip, and works on the batch before where it begins another."""
        if lot.places[shape] % batch_clips(shape) == 0:
            self._device.work(lot.chunks.pop(shape, []))
        lot.places[shape] += 1

    def _skip_to(self, lot: _Lot, source: Source) -> None:
        """Numbers the clips of sources that have nothing left to do."""
        while lot.rest[0].name != source.name:
            skipped = lot.rest.pop(0)
            if self.book.source_problem(skipped) is None:
                for clip in self.book.clips(skipped):
                    self._place(lot, clip.shape)

    def _end_source(self, lot: _Lot, done: SourceDone) -> None:
        self._skip_to(lot, done.source)
        source, keys = done.source, self.book.keys
        if done.num_clips is None:
            for clip in self.book.clips(source):
                if clip.ordinal > lot.seen:
                    self._place(lot, clip.shape)
        records: list[tuple[str, str, Any]] = []
        if done.probe and self.store.get("probe", keys.probe(source)) is None:
            records.append(("probe", keys.probe(source), done.probe))
        if done.shots is not None and self.store.get("shots", keys.shots(source)) is None:
            records.append(("shots", keys.shots(source), done.shots))
        if done.num_clips is not None and (done.problem is not None or not self.book.was_cut(source)):
            # A file that could be cut before, and can't now, didn't change: it is what it is read by.
            passing = done.passing or (done.problem is not None and self.book.was_cut(source))
            record = {"num_clips": done.num_clips, "problem": done.problem} | ({"passing": True} if passing else {})
            records.append(("cut", keys.cut(source), record))
        self.store.put_all(records)
        self._clock.update(done.clock)
        lot.rest.pop(0)
        lot.seen = -1
