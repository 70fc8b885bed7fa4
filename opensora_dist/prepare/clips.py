"""A clip out of a video: frames at a target rate, the bucket that suits it best, resized and cropped to that bucket."""

# T H W frames, height, width of a bucket in pixels

from __future__ import annotations

import math
from bisect import bisect_right
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, groupby

import numpy as np
from numpy.typing import NDArray

from opensora_dist.core.errors import DataError
from opensora_dist.core.types import Thw
from opensora_dist.core.video import Frames

# Containers round timestamps to a tick, of 1 ms in Matroska: without slack, every third frame of a 30 fps video would be missed.
_SLACK_S = 1e-3


def sample_frames(frames: Iterable[tuple[float, NDArray[np.uint8]]], *, fps: float) -> Iterator[NDArray[np.uint8]]:
    """Frames on screen at 0, 1/fps, 2/fps, ...: for each moment, the last frame at or before it.

    Args:
        frames: (seconds from the start, frame [H, W, 3]) in order.
        fps: Frames per second wanted; above the video's own rate, frames repeat.
    """
    held: NDArray[np.uint8] | None = None
    time_s, count, k = 0.0, 0, 0
    for time_s, frame in frames:
        while held is not None and k / fps < time_s - _SLACK_S:
            yield held
            k += 1
        held, count = frame, count + 1
    if held is None:
        return
    end_s = time_s + time_s / (count - 1) if count > 1 else 0.0  # the last frame stays for one mean interval
    while k == 0 or k / fps < end_s - _SLACK_S:
        yield held
        k += 1


def choose_bucket(buckets: Sequence[Thw], *, frames: int, height: int, width: int) -> Thw | None:
    """The bucket for a video of that many frames of that size, or None where every bucket is longer.

    Among those that aren't longer: nearest in aspect ratio, then the largest that needs no enlarging, or the one that needs the
    least where all do, then the longest.
    """

    def rank(bucket: Thw) -> tuple[float, bool, int, int, Thw]:
        aspect = abs(math.log(bucket.h / bucket.w * width / height))
        enlarges = bucket.h > height or bucket.w > width
        area = bucket.h * bucket.w
        return round(aspect, 6), enlarges, area if enlarges else -area, -bucket.t, bucket

    return min((b for b in buckets if b.t <= frames), key=rank, default=None)


def resize_and_crop(frame: NDArray[np.uint8], *, height: int, width: int) -> NDArray[np.uint8]:
    """Scales a frame until it covers height x width, keeping its aspect ratio, and takes the centre."""
    import cv2  # of the `prepare` extra; `prepare` says so where it is missing

    had_h, had_w = frame.shape[:2]
    scale = max(height / had_h, width / had_w)
    new_h, new_w = max(height, round(had_h * scale)), max(width, round(had_w * scale))
    if (new_h, new_w) != (had_h, had_w):
        method = cv2.INTER_AREA if scale < 1 else cv2.INTER_CUBIC
        frame = np.asarray(cv2.resize(frame, (new_w, new_h), interpolation=method), dtype=np.uint8)
    top, left = (new_h - height) // 2, (new_w - width) // 2
    return frame[top : top + height, left : left + width]


@dataclass(frozen=True, kw_only=True)
class Cut:
    """A clip.

    Args:
        start_s: Seconds from the start of the video to its first frame.
        frames_THW3: uint8 RGB, of one of the buckets.
        height, width: Of the video.
    """

    start_s: float
    frames_THW3: Frames
    height: int
    width: int


def cut_clips(
    frames: Iterable[tuple[float, NDArray[np.uint8]]],
    *,
    fps: float,
    buckets: Sequence[Thw],
    shots: Sequence[tuple[float, float]] = ((0, math.inf),),
    trim_s: float = 0.0,
    every: bool = False,
) -> Iterator[Cut]:
    """The clips of a video, in order. Decoding stops at the last frame that could matter.

    Args:
        frames: (seconds from the start, frame [H, W, 3]) in order.
        fps: Frames per second wanted.
        buckets: Shapes that a clip may have, as ``choose_bucket`` chooses.
        shots: First frame of each and the one behind its last, in order; clips never straddle two.
        trim_s: Left out at each end of a shot.
        every: As many clips as follow each other in a shot, rather than the first alone.
    Raises:
        DataError: The video can't be decoded, or none of its shots is as long as the shortest bucket.
    """
    starts = [start for start, _ in shots]
    longest, found = 0, False
    for place, group in groupby(enumerate(frames), key=lambda item: bisect_right(starts, item[0]) - 1):
        inside = (timed for i, timed in group if place >= 0 and i < shots[place][1])
        trimmed = _trimmed(inside, trim_s=trim_s)
        if (first := next(trimmed, None)) is None:
            continue
        start_s, (height, width) = first[0], first[1].shape[:2]
        moments = ((time_s - start_s, frame) for time_s, frame in chain([first], trimmed))
        windows = _Windows(buckets, height=height, width=width, every=every)
        for index, clip in windows.cut(sample_frames(moments, fps=fps)):
            found = True
            yield Cut(start_s=start_s + index / fps, frames_THW3=clip, height=height, width=width)
        longest = max(longest, windows.had)
        if place == len(shots) - 1:
            break
    if not found:
        raise DataError(
            f"has {longest} frames at {fps:g} per second{'' if len(shots) == 1 else ' in its longest shot'}, "
            f"the shortest bucket needs {min(bucket.t for bucket in buckets)}; "
            "raise clip.fps, or add a shorter bucket to clip.buckets"
        )


def _trimmed(frames: Iterable[tuple[float, NDArray[np.uint8]]], *, trim_s: float) -> Iterator[tuple[float, NDArray[np.uint8]]]:
    """Frames of a shot without those of its first and last ``trim_s`` seconds. Holds as many frames as that takes."""
    if not trim_s:
        yield from frames
        return
    start_s: float | None = None
    held: deque[tuple[float, NDArray[np.uint8]]] = deque()
    for time_s, frame in frames:
        start_s = time_s if start_s is None else start_s
        if time_s - start_s < trim_s - _SLACK_S:
            continue
        held.append((time_s, frame))
        while time_s - held[0][0] > trim_s - _SLACK_S:
            yield held.popleft()


class _Windows:
    """Clips that follow each other in one shot.

    How many frames a shot has is known only at its end, and full-size frames aren't kept: each frame is cut at once for every size that
    may yet be chosen.
    """

    def __init__(self, buckets: Sequence[Thw], *, height: int, width: int, every: bool) -> None:
        self._every = every
        self._first = list(buckets)
        # Behind the first clip of a shot, a bucket of one frame would take every frame that is left over.
        self._later = [bucket for bucket in buckets if bucket.t > 1] or self._first
        self._size = {"height": height, "width": width}
        lengths = {bucket.t for bucket in buckets}
        parts = (self._first, self._later) if every else (self._first,)
        picks = [choose_bucket(part, frames=t, **self._size) for part in parts for t in lengths]
        self._cuts: dict[tuple[int, int], list[NDArray[np.uint8]]] = {(pick.h, pick.w): [] for pick in picks if pick is not None}
        self._longest = max(lengths)
        self.had = 0

    def cut(self, frames: Iterable[NDArray[np.uint8]]) -> Iterator[tuple[int, Frames]]:
        """(place of its first frame, clip) each."""
        start, waiting, choices = 0, 0, self._first
        best = choose_bucket(choices, frames=self._longest, **self._size)
        for frame in frames:
            for (height, width), cut in self._cuts.items():
                cut.append(resize_and_crop(frame, height=height, width=width))
            self.had += 1
            waiting += 1
            if best is not None and waiting == best.t:
                yield start, self._take(best)
                if not self._every:
                    return
                start, waiting, choices = start + best.t, 0, self._later
                best = choose_bucket(choices, frames=self._longest, **self._size)
        while (bucket := choose_bucket(choices, frames=waiting, **self._size)) is not None:
            yield start, self._take(bucket)
            if not self._every:
                return
            start, waiting, choices = start + bucket.t, waiting - bucket.t, self._later

    def _take(self, bucket: Thw) -> Frames:
        clip = np.stack(self._cuts[bucket.h, bucket.w][: bucket.t])
        for cut in self._cuts.values():
            del cut[: bucket.t]
        return clip
