"""The stages that run a network: aesthetic, safety, caption, match, encode. They belong to the process that has the device."""

# B clips, T H W pixels, C latent channels, t h w latents, Y text tokens, E text width

from __future__ import annotations

import functools
import itertools
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from opensora_dist.core.protocols import TextEncoder, VideoCodec
from opensora_dist.core.video import Frames, evenly_spaced, write_video
from opensora_dist.parallel.keys import Keys, sample_id
from opensora_dist.prepare.blobs import hash_array
from opensora_dist.prepare.book import Book, Work
from opensora_dist.prepare.sources import Source
from opensora_dist.prepare.stages import Clip, Clock

_STAGE_OF: dict[Work, str] = {
    "aesthetic": "score",
    "images": "safety",
    "caption": "caption",
    "match": "match",
    "latents": "encode",
    "text": "text",
    "save": "save",
}


@dataclass(frozen=True, kw_only=True)
class Item:
    """A clip with its frames."""

    source: Source
    clip: Clip
    frames_THW3: Frames


class Device:
    """Takes chunks of clips of one shape as far as they go.

    A network is loaded when the first clip needs it. Each stage records a whole chunk at once, and chunks follow from the sources and the
    config alone: so a preparation that was killed goes on with the batches of one that went straight through.

    Args:
        book: Where clips stand, and where records go.
        codec, text: As the config describes them.
        device: Of the other networks.
    """

    def __init__(self, book: Book, *, codec: VideoCodec, text: TextEncoder, device: torch.device) -> None:
        self._book, self._codec, self._text, self._device = book, codec, text, device
        self._config = book.config
        self._dtype = np.dtype(book.config.output.dtype)
        self._draws = Keys(book.config.seed)
        self.clock = Clock()
        self._works: dict[Work, Callable[[Sequence[Item]], list[tuple[str, str, Any]]]] = {
            "aesthetic": self._aesthetic,
            "images": self._images,
            "caption": self._caption,
            "match": self._match,
            "latents": self._latents,
            "text": self._text_vectors,
            "save": self._save,
        }

    def work(self, chunk: Sequence[Item]) -> None:
        """Brings every clip of a chunk to its end: kept, dropped, or waiting for other clips."""
        for work, function in self._works.items():
            todo = [item for item in chunk if self._book.verdict(item.source, item.clip).waits_for == work]
            if not todo:
                continue
            since_s = time.perf_counter()
            self._book.store.put_all(function(todo))
            stage = _STAGE_OF[work]
            self.clock.add(stage, since_s)
            self.clock.calls[stage] += len(todo) - 1

    @functools.cached_property
    def _clip_model(self) -> Any:
        from opensora_dist.prepare.clip_model import ClipModel

        scores = self._config.scores
        assert scores.clip_model is not None, "rules of the config"
        return ClipModel(scores.clip_model, head=scores.aesthetic_head, device=self._device)

    @functools.cached_property
    def _captioner(self) -> Any:
        from opensora_dist.prepare.captions import Captioner

        return Captioner(self._config.caption, device=self._device)

    @functools.cached_property
    def _image_safety(self) -> Any:
        from opensora_dist.prepare.safety import ImageSafety

        return ImageSafety(self._config.safety, device=self._device)

    def _aesthetic(self, items: Sequence[Item]) -> list[tuple[str, str, Any]]:
        keys = self._book.keys
        return [("aesthetic", keys.aesthetic(i.clip), _number(self._clip_model.aesthetic(self._looks(i)))) for i in items]

    def _images(self, items: Sequence[Item]) -> list[tuple[str, str, Any]]:
        keys = self._book.keys
        return [("images", keys.images(i.clip), self._image_safety.finds(i.frames_THW3)) for i in items]

    def _caption(self, items: Sequence[Item]) -> list[tuple[str, str, Any]]:
        answers = self._captioner.caption([item.frames_THW3 for item in items])
        return [("caption", self._book.keys.caption(i.clip), forms) for i, forms in zip(items, answers, strict=True)]

    def _match(self, items: Sequence[Item]) -> list[tuple[str, str, Any]]:
        records = []
        for item in items:
            text = self._book.written(item.source, item.clip)
            assert text is not None
            key = self._book.keys.match(item.clip, text)
            records.append(("match", key, _number(self._clip_model.match(self._looks(item), text))))
        return records

    def _looks(self, item: Item) -> Frames:
        """The frames that scores look at."""
        return evenly_spaced(item.frames_THW3, self._config.scores.frames)

    def _latents(self, items: Sequence[Item]) -> list[tuple[str, str, Any]]:
        frames_BTHW3 = torch.from_numpy(np.stack([item.frames_THW3 for item in items]))
        generators = [self._draws.generator("codec_posterior", sample_id(item.clip.key)) for item in items]
        latents_BCthw = self._codec.encode(frames_BTHW3, generators=generators).cpu()
        keys = [self._book.keys.latents(item.clip) for item in items]
        return [
            ("latents", key, self._stored("latents", key, latents_Cthw.transpose(0, 1)))
            for key, latents_Cthw in zip(keys, latents_BCthw, strict=True)
        ]

    def _text_vectors(self, items: Sequence[Item]) -> list[tuple[str, str, Any]]:
        captions = [self._book.caption(item.source, item.clip) or "" for item in items]
        keys = [self._book.keys.text(item.clip, caption) for item, caption in zip(items, captions, strict=True)]
        cut_before = self._text.num_cut()
        texts_YE = self._text.encode(captions)
        num_cut = self._text.num_cut() - cut_before
        records = [
            ("text", key, self._stored("text vectors", key, text_YE.cpu())) for key, text_YE in zip(keys, texts_YE, strict=True)
        ]
        # The encoder says how many, not which: of those that fill it, as what is cut does, so many.
        full = (
            record for (_, _, record), text_YE in zip(records, texts_YE, strict=True) if len(text_YE) == self._text.max_tokens
        )
        for record in itertools.islice(full, num_cut):
            record["cut"] = True
        return records

    def _stored(self, what: str, key: str, values: Tensor) -> dict[str, Any]:
        """Writes an array, and says its hash, or why it can't be stored: NaN and infinity would reach every weight of a model."""
        array = _as_stored(values, self._dtype)
        if not torch.isfinite(values).all():
            return {"problem": f"its {what} hold NaN or infinity as encoded; try codec.dtype or text.dtype=float32"}
        if not np.isfinite(array).all():
            largest, limit = float(values.abs().max()), float(np.finfo(self._dtype).max)
            over = f"its {what} reach {largest:.4g}, beyond {self._dtype.name} (at most {limit:g}); set output.dtype=float32"
            return {"problem": over}
        self._book.blobs.put(key, array)
        return {"xxh3": hash_array(array)}

    def _save(self, items: Sequence[Item]) -> list[tuple[str, str, Any]]:
        for item in items:
            path = self._book.saved_as(item.clip)
            assert path is not None
            write_video(path, item.frames_THW3, fps=self._config.clip.fps)
            self._book.note_saved(item.clip)
        return []


def _number(value: float) -> dict[str, float | None]:
    """A score as a record: JSON has no NaN."""
    return {"value": value if math.isfinite(value) else None}


def _as_stored(values: Tensor, dtype: np.dtype[np.floating]) -> NDArray[np.floating]:
    """In the stored precision; what overflows becomes infinite, without numpy's warning."""
    with np.errstate(over="ignore"):
        return values.float().numpy().astype(dtype)
