"""Pictures of a data set's samples and of what was left out of it, for its page."""

# t C h w latents, T H W pixels

from __future__ import annotations

import io
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch
from numpy.typing import NDArray
from PIL import Image

from opensora_dist.codecs.registry import build_codec
from opensora_dist.core.errors import DataError
from opensora_dist.core.io import read_json
from opensora_dist.core.protocols import VideoCodec
from opensora_dist.core.video import evenly_spaced, peek_frames
from opensora_dist.data.arrays import read_exactly
from opensora_dist.data.index import Index
from opensora_dist.observe.data_stats import DropReason
from opensora_dist.observe.stats_page import Picture
from opensora_dist.prepare.report import CLIPS_NAME, REPORT_NAME, group_reason
from opensora_dist.prepare.sources import find_source

_SAMPLES = 24
_REASONS = 12
_PER_REASON = 4
_FRAMES = 4
_SHEET_WIDTH = 480
_GAP = 2
_MAX_WIDTH = 640


def sample_pictures(index: Index) -> list[Picture]:
    """Some samples of each bucket, decoded from their latents where that takes no weights, else from their videos where these are
    still there."""
    codec = build_codec(index.spec.codec, device=torch.device("cpu")) if index.spec.codec.name == "dct" else None
    videos = _videos(index.folder)
    each = max(1, _SAMPLES // len(index.buckets))
    rows = [
        int(row)
        for bucket in index.buckets.values()
        for row in bucket[np.linspace(0, len(bucket) - 1, min(each, len(bucket)), dtype=int)]
    ]
    pictures = []
    for row in rows[:_SAMPLES]:
        frames = _decoded(index, row, codec) if codec is not None else _peek(videos, index.source(row), None, None)
        if frames:
            note = f"{index.clip_shape(row)} · {index.text_tokens[row]} tokens · {index.source(row)}"
            pictures.append(Picture(jpeg=_sheet(frames), title=index.caption(row) or "(empty caption)", note=note))
    return pictures


def dropped_pictures(folder: Path, drops: Sequence[DropReason]) -> dict[str, list[Picture]]:
    """Some clips of each reason for which clips were dropped, as far as their videos are still there and can be decoded.

    Args:
        folder: Of the data set.
    """
    videos, path = _videos(folder), folder / CLIPS_NAME
    if videos is None or not path.is_file():
        return {}
    clips = pq.read_table(path, columns=["path", "start_s", "end_s", "text", "kept", "stage", "reason"])
    lost = clips.filter(pc.invert(clips.column("kept"))).to_pylist()
    found: dict[str, list[Picture]] = {}
    for drop in drops[:_REASONS]:
        pictures: list[Picture] = []
        alike = [
            r for r in lost if (r["stage"] or "") == drop.stage and group_reason(r["reason"] or "") == group_reason(drop.reason)
        ]
        for row in alike[: 4 * _PER_REASON]:  # some may not be decodable
            if len(pictures) == _PER_REASON:
                break
            frames = _peek(videos, row["path"], row["start_s"], row["end_s"])
            if frames:
                where = f"{row['path']}" + (f" from {row['start_s']:.2f} s" if row["start_s"] else "")
                pictures.append(Picture(jpeg=_sheet(frames), title=row["reason"] or "", note=where))
        if pictures:
            found[drop.said] = pictures
    return found


def _videos(folder: Path) -> Path | None:
    """The folder of the sources, if it is still there."""
    report = folder / REPORT_NAME
    said = read_json(report).get("input") if report.is_file() else None
    return Path(said) if said and Path(said).is_dir() else None


def _decoded(index: Index, row: int, codec: VideoCodec) -> list[NDArray[np.uint8]]:
    """Some frames of a sample, or none where its shard is damaged: `data check` says how."""
    place, latent = index.latents_place(row), index.latent_shape(row)
    try:
        fd = index.shard_source.open(int(index.shard[row]))
        try:
            data = read_exactly(fd, place.offset, place.num_bytes)
        finally:
            os.close(fd)
    except (OSError, DataError):
        return []
    stored = np.frombuffer(data, dtype=index.dtype(row)).reshape(latent.t, index.spec.channels, latent.h, latent.w)
    latents_BCthw = torch.from_numpy(stored.astype(np.float32)).transpose(0, 1)[None]
    return list(evenly_spaced(codec.decode(latents_BCthw)[0].numpy(), _FRAMES))


def _peek(videos: Path | None, name: str, start_s: float | None, end_s: float | None) -> list[NDArray[np.uint8]]:
    try:
        source = None if videos is None else find_source(videos, name)
        if source is None:
            return []
        start_s = start_s or 0.0
        return peek_frames(source.open(), start_s=start_s, end_s=end_s or start_s + 2, count=_FRAMES, max_width=_MAX_WIDTH)
    except DataError:
        return []


def _sheet(frames: Sequence[NDArray[np.uint8]]) -> bytes:
    """Frames as one JPEG: wide ones in two columns, tall ones side by side, one by itself."""
    columns = min(len(frames), 2 if frames[0].shape[1] >= frames[0].shape[0] else _FRAMES)
    width = (_SHEET_WIDTH - _GAP * (columns - 1)) // columns
    height = max(1, round(width * frames[0].shape[0] / frames[0].shape[1]))
    rows = -(-len(frames) // columns)
    sheet = Image.new("RGB", (_SHEET_WIDTH, rows * height + _GAP * (rows - 1)))
    for i, frame in enumerate(frames):
        image = Image.fromarray(frame).resize((width, height), Image.Resampling.LANCZOS)
        sheet.paste(image, (i % columns * (width + _GAP), i // columns * (height + _GAP)))
    buffer = io.BytesIO()
    sheet.save(buffer, "JPEG", quality=80)
    return buffer.getvalue()
