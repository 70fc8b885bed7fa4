"""A clip as scores look at it: what several of them need is computed once."""

# P pairs of neighbouring frames, H W rows and columns, h w those at the height that motion is measured at

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from opensora_dist.core.video import Frames, even_places
from opensora_dist.prepare.probe import Probe

MOTION_H = 256


@dataclass(frozen=True, kw_only=True)
class View:
    """The frames of a clip that are looked at.

    Args:
        frames_THW3: All frames, uint8 RGB.
        fps: Frames per second of the clip.
        looks: How many frames are looked at, evenly spaced, and how many pairs of a frame and the next.
        source: What the file's headers say.
    """

    frames_THW3: Frames
    fps: float
    looks: int
    source: Probe

    @cached_property
    def greys(self) -> list[NDArray[np.uint8]]:
        """The frames that are looked at, in grey [H, W]."""
        return [_grey(self.frames_THW3[i]) for i in even_places(len(self.frames_THW3), self.looks)]

    @cached_property
    def pairs(self) -> list[tuple[NDArray[np.uint8], NDArray[np.uint8]]]:
        """Pairs of a frame and the next, in grey; an image has none."""
        firsts = even_places(len(self.frames_THW3) - 1, self.looks)
        return [(_grey(self.frames_THW3[i]), _grey(self.frames_THW3[i + 1])) for i in firsts]

    @cached_property
    def small_pairs(self) -> list[tuple[NDArray[np.uint8], NDArray[np.uint8]]]:
        """The pairs, at most ``MOTION_H`` high."""
        return [(_lowered(a), _lowered(b)) for a, b in self.pairs]

    @cached_property
    def flows_Phw2(self) -> NDArray[np.float32]:
        """Optical flow of each pair: where the pixels of the first have gone in the next, (x, y) in pixels at ``MOTION_H`` height.

        Source: Kroeger et al., Fast Optical Flow using Dense Inverse Search, 2016, as OpenCV has it.
        """
        import cv2

        assert self.pairs, "an image has no flow"
        flow = cv2.DISOpticalFlow.create(cv2.DISOPTICAL_FLOW_PRESET_FAST)
        found = np.stack([np.asarray(flow.calc(a, b, None), dtype=np.float32) for a, b in self.small_pairs])
        return found * np.float32(MOTION_H / found.shape[1])


def _grey(frame_HW3: NDArray[np.uint8]) -> NDArray[np.uint8]:
    import cv2

    return np.asarray(cv2.cvtColor(frame_HW3, cv2.COLOR_RGB2GRAY), dtype=np.uint8)


def _lowered(grey_HW: NDArray[np.uint8]) -> NDArray[np.uint8]:
    import cv2

    height, width = grey_HW.shape
    if height <= MOTION_H:
        return grey_HW
    size = (max(1, round(width * MOTION_H / height)), MOTION_H)
    return np.asarray(cv2.resize(grey_HW, size, interpolation=cv2.INTER_AREA), dtype=np.uint8)
