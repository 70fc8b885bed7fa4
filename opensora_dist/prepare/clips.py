"""A clip out of a video: frames at a target rate, the bucket that suits it best, resized and cropped to that bucket."""

# T H W frames, height, width of a bucket in pixels

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray

from opensora_dist.core.errors import DataError
from opensora_dist.core.types import Thw
from opensora_dist.core.video import Frames, iter_frames

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


def cut_clip(file: Path | BinaryIO, *, fps: float, buckets: Sequence[Thw]) -> Frames:
    """The clip at the start of a video, uint8 [T, H, W, 3] of one of the buckets. An image gives one frame.

    Decoding stops at the last frame that could matter, and full-size frames aren't kept: how many frames a video has is known
    only at its end, so each frame is cut at once for every size that may yet be chosen.

    Raises:
        DataError: The video can't be decoded, or is shorter than every bucket.
    """
    lengths = sorted({bucket.t for bucket in buckets})
    choices: list[Thw] = []  # for each length, what is chosen once the video has that many frames
    cuts: dict[tuple[int, int], list[NDArray[np.uint8]]] = {}
    enough, had = lengths[-1], 0
    for frame in sample_frames(iter_frames(file), fps=fps):
        if not choices:
            height, width = frame.shape[:2]
            picks = [choose_bucket(buckets, frames=length, height=height, width=width) for length in lengths]
            choices = [pick for pick in picks if pick is not None]
            cuts = {(choice.h, choice.w): [] for choice in choices}
            enough = lengths[choices.index(choices[-1])]
        had += 1
        for (height, width), cut in cuts.items():
            cut.append(resize_and_crop(frame, height=height, width=width))
        if had == enough:
            break
    if had < lengths[0]:
        raise DataError(
            f"{file if isinstance(file, Path) else file.name}: has {had} frames at {fps:g} per second, the shortest bucket needs {lengths[0]}; "
            "raise clip.fps, or add a shorter bucket to clip.buckets"
        )
    bucket = [choice for length, choice in zip(lengths, choices, strict=True) if length <= had][-1]
    return np.stack(cuts[bucket.h, bucket.w][: bucket.t])
