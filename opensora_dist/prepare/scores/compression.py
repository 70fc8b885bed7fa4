"""How much a source was compressed."""

from __future__ import annotations

from opensora_dist.prepare.scores.view import View


def compression(view: View) -> float | None:
    """Bits per pixel of the source, by its headers; of an image, those of the file. None where the headers don't say."""
    source = view.source
    pixels = source.height * source.width * (source.fps or 1.0)
    return source.bits / pixels if pixels and source.bits else None
