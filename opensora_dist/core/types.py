"""Small shapes that several rooms share."""

from __future__ import annotations

from typing import NamedTuple


class Thw(NamedTuple):
    """A (frames, height, width) triple: of pixels, of latents or of tokens, as the name beside it says."""

    t: int
    h: int
    w: int

    @property
    def volume(self) -> int:
        """t * h * w."""
        return self.t * self.h * self.w

    def __str__(self) -> str:
        return f"{self.t}x{self.h}x{self.w}"
