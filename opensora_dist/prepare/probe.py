"""What a container says about a video, before a frame is decoded: for clips.parquet and for what is judged by size and rate."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import av
from PIL import Image, UnidentifiedImageError

from opensora_dist.core.errors import DataError
from opensora_dist.core.video import open_video
from opensora_dist.prepare.sources import Source


@dataclass(frozen=True, kw_only=True)
class Probe:
    """A source by its headers; 0 where they don't say. Frame counts and durations in containers lie: nothing is cut by them.

    Args:
        height, width: In pixels, as stored.
        fps: Mean frames per second; of an image 0.
        duration_s: Seconds; of an image 0.
        num_bytes: Of the file, sound included.
        bits: Per second of the picture, or of the file where the stream doesn't say.
    """

    height: int = 0
    width: int = 0
    fps: float = 0.0
    duration_s: float = 0.0
    num_bytes: int = 0
    bits: float = 0.0

    def to_json(self) -> dict[str, Any]:
        """As plain values."""
        return asdict(self)


def probe_source(source: Source) -> Probe:
    """Reads the headers. What can't be read is left at 0: decoding will say what is the matter."""
    num_bytes = max(0, source.num_bytes)
    try:
        if source.kind == "image":
            with Image.open(source.open()) as image:
                return Probe(height=image.height, width=image.width, num_bytes=num_bytes, bits=8.0 * num_bytes)
        with open_video(source.open()) as (container, stream):
            if stream.duration is not None and stream.time_base is not None:
                duration_s = float(stream.duration * stream.time_base)
            else:
                duration_s = (container.duration or 0) / av.time_base
            context = stream.codec_context
            bits = float(stream.bit_rate or (8 * num_bytes / duration_s if duration_s > 0 else 0))
            return Probe(
                height=context.height,
                width=context.width,
                fps=float(stream.average_rate or 0),
                duration_s=max(0.0, duration_s),
                num_bytes=num_bytes,
                bits=bits,
            )
    except (DataError, OSError, UnidentifiedImageError, SyntaxError, ValueError, Image.DecompressionBombError):
        return Probe(num_bytes=num_bytes)
