"""A clip out of a video: frames at a target rate, the bucket that suits it best, resized and cropped to that bucket."""

# T H W frames, height, width of a bucket in pixels

from __future__ import annotations

import math
from bisect import bisect_right
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, groupby, islice

import numpy as np
from numpy.typing import NDArray

from opensora_dist.core.errors import DataError
from opensora_dist.core.types import Thw
from opensora_dist.core.video import Frames

# Containers round timestamps to a tick, of 1 ms in Matroska: without slack, every third frame of a 30 fps video would be missed.
_SLACK_S = 1e-3
# A step that is longer than both is no frame that stays on screen: recording stopped, or timestamps jump.
_GAP_S, _GAP_INTERVALS = 1.0, 10


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
    """Takes the centre of a frame that has the aspect ratio of height x width, and scales it to that.

    In this order, so that no picture takes more memory on the way than it has or gets: 1 x 60000 scaled to 256 high would take 11 GB.
    """
    import cv2  # of the `prepare` extra; `prepare` says so where it is missing

    had_h, had_w = frame.shape[:2]
    keep_h, keep_w = (min(had_h, max(1, round(had_w * height / width))), min(had_w, max(1, round(had_h * width / height))))
    top, left = (had_h - keep_h) // 2, (had_w - keep_w) // 2
    frame = frame[top : top + keep_h, left : left + keep_w]
    if (keep_h, keep_w) != (height, width):
        method = cv2.INTER_AREA if height < keep_h else cv2.INTER_CUBIC
        frame = np.asarray(cv2.resize(frame, (width, height), interpolation=method), dtype=np.uint8)
    return frame


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
    """The clips of a video, in order. Decoding stops at the last frame that could matter. A gap in the timestamps ends a shot.

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
    longest, found, stretches = 0, -1, 0
    for (place, _), group in groupby(_stretches(frames), key=lambda item: (bisect_right(starts, item[0]) - 1, item[1])):
        if found == place and not every:
            continue  # the shot has its clip
        stretches += 1
        inside = (timed for i, _, timed in group if place >= 0 and i < shots[place][1])
        trimmed = _trimmed(inside, trim_s=trim_s)
        if (first := next(trimmed, None)) is None:
            continue
        start_s, (height, width) = first[0], first[1].shape[:2]
        moments = ((time_s - start_s, frame) for time_s, frame in chain([first], trimmed))
        windows = _Windows(buckets, height=height, width=width, every=every)
        for index, clip in windows.cut(sample_frames(moments, fps=fps)):
            found = place
            yield Cut(start_s=start_s + index / fps, frames_THW3=clip, height=height, width=width)
        longest = max(longest, windows.had)
        if found == len(shots) - 1 and not every:
            break
    if found < 0:
        raise DataError(
            f"has {longest} frames at {fps:g} per second{'' if stretches == 1 else ' in its longest shot'}, "
            f"the shortest bucket needs {min(bucket.t for bucket in buckets)}; "
            "raise clip.fps, or add a shorter bucket to clip.buckets"
        )


def _stretches(
    frames: Iterable[tuple[float, NDArray[np.uint8]]],
) -> Iterator[tuple[int, int, tuple[float, NDArray[np.uint8]]]]:
    """(its number, gaps before it, the timed frame) each. Of the first step, the next one tells whether it is a gap."""
    timed = iter(frames)
    head = list(islice(timed, 2))
    if len(head) == 2 and head[1][0] - head[0][0] > _GAP_S:
        head += islice(timed, 1)
    steps_s, steps, gaps, before_s = 0.0, 0, 0, 0.0
    if len(head) == 3:
        steps_s, steps = head[2][0] - head[1][0], 1
    for number, (time_s, frame) in enumerate(chain(head, timed)):
        step_s = time_s - before_s
        if steps and step_s > max(_GAP_S, _GAP_INTERVALS * steps_s / steps):
            gaps += 1
        elif number:
            steps_s, steps = steps_s + step_s, steps + 1
        before_s = time_s
        yield number, gaps, (time_s, frame)


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
