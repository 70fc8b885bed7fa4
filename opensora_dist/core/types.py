"""Small shapes that several rooms share."""

from __future__ import annotations

import enum
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


class Axis(enum.Enum):
    """The tokens that see each other in a self-attention."""

    SPACE = "space"  # those of one frame
    TIME = "time"  # those at one place
    JOINT = "joint"  # all


class Region(NamedTuple):
    """A box of a sample: frames ``t0..t1``, rows ``h0..h1`` (ends left out), all columns. Of latents or tokens, as its name says."""

    t0: int
    t1: int
    h0: int
    h1: int

    @classmethod
    def whole(cls, grid: Thw) -> Region:
        """All of a sample."""
        return cls(0, grid.t, 0, grid.h)

    @property
    def frames(self) -> range:
        """Frames of the region."""
        return range(self.t0, self.t1)

    @property
    def rows(self) -> range:
        """Rows of the region."""
        return range(self.h0, self.h1)

    def shape(self, grid: Thw) -> Thw:
        """Frames, rows and columns of this region of a sample."""
        return Thw(self.t1 - self.t0, self.h1 - self.h0, grid.w)

    def times(self, patch: Thw) -> Region:
        """This region of tokens, in latents."""
        return Region(self.t0 * patch.t, self.t1 * patch.t, self.h0 * patch.h, self.h1 * patch.h)


class Share(NamedTuple):
    """What of the batches of one shape is a rank's: which samples, and which part of each.

    Args:
        data_rank: Which slice of the global batch, of ``data_size``.
        data_size: Slices: groups of ranks that see different samples.
        region: The latents of each of its samples that this rank holds.
    """

    data_rank: int
    data_size: int
    region: Region
