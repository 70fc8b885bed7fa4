"""Where one shot of a video ends and the next begins."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray

from opensora_dist.config.prepare import ShotsConfig
from opensora_dist.core.errors import DataError
from opensora_dist.core.video import iter_frames
from opensora_dist.prepare.dissolves import THUMB_H, THUMB_W, Span, find_dissolves

_DETECT_W = 256  # as wide as PySceneDetect makes its frames
# Hue and saturation of a picture that is nearly black are noise, and the detectors take them for cuts: what a cut shows in grey.
_MIN_GREY_STEP = 6.0
_HELD = 8  # thumbnails of the last frames; a detector is at most two frames late


@dataclass(frozen=True, kw_only=True)
class Shot:
    """A part of a video without a cut.

    Args:
        start_s, end_s: Seconds from the first frame of the video to that of the shot, and to the frame behind its last one.
        start_frame, end_frame: The same counted in frames as they are decoded; ``end_frame`` is left out.
    """

    start_s: float
    end_s: float
    start_frame: int
    end_frame: int


def find_shots(file: Path | BinaryIO, config: ShotsConfig) -> list[Shot]:
    """The shots of a video that last ``config.min_s`` or longer, in order. Frames inside a dissolve are of no shot.

    In memory are a few frames; where dissolves are looked for, also a thumbnail of every frame: ``find_dissolves`` says how much that is.
    ``config.trim_s`` is left out where clips are cut, so that a change of it needs no second look.

    Args:
        file: What ``iter_frames`` takes.
        config: The detector, its threshold, and whether dissolves are looked for.
    Raises:
        DataError: The video can't be decoded.
    Source: PySceneDetect's ContentDetector and AdaptiveDetector, on frames decoded here, since containers miscount them.
    """
    times, thumbs, cuts = _look(file, config)
    if not times:
        name = file if isinstance(file, Path) else file.name
        raise DataError(f"{name}: holds no video frame; leave it out")
    frame_s = times[-1] / (len(times) - 1) if len(times) > 1 else 0.0
    times.append(times[-1] + frame_s)  # the last frame stays for one mean interval
    spans = find_dissolves(thumbs, fps=1 / frame_s) if config.dissolves and frame_s > 0 else []
    bounds = _between(cuts, spans, num_frames=len(times) - 1)
    shots = [Shot(start_s=times[a], end_s=times[b], start_frame=a, end_frame=b) for a, b in bounds]
    return [shot for shot in shots if shot.end_s - shot.start_s >= config.min_s or len(shots) == 1]


def _look(file: Path | BinaryIO, config: ShotsConfig) -> tuple[list[float], NDArray[np.uint8], list[int]]:
    """Decodes a video once: the time of every frame, its thumbnail [T, D] if dissolves are looked for, and the first frames of new shots."""
    import cv2

    cuts_seen = _detector(config)
    times: list[float] = []
    thumbs = bytearray()  # grows in place, which a list that becomes an array doesn't
    cuts: list[int] = []
    last: deque[NDArray[np.uint8]] = deque(maxlen=_HELD)
    for time_s, frame in iter_frames(file, max_width=_DETECT_W):
        grey = cv2.cvtColor(frame, cv2.COLOR_RGB2GRAY)
        last.append(np.asarray(cv2.resize(grey, (THUMB_W, THUMB_H), interpolation=cv2.INTER_AREA), dtype=np.uint8).reshape(-1))
        if config.dissolves:
            thumbs += last[-1].data
        for cut in cuts_seen(len(times), frame):
            place = cut - len(times) - 1  # from the end
            if _grey_step(last[place - 1], last[place]) >= _MIN_GREY_STEP:
                cuts.append(cut)
        times.append(time_s)
    return times, np.frombuffer(thumbs, np.uint8).reshape(-1, THUMB_W * THUMB_H), cuts


def _grey_step(before: NDArray[np.uint8], after: NDArray[np.uint8]) -> float:
    """Grey levels, root mean square."""
    return float(np.sqrt(np.mean(np.square(after.astype(np.float64) - before))))


def _detector(config: ShotsConfig) -> Callable[[int, NDArray[np.uint8]], list[int]]:
    """Takes one frame after the other with its number, and says at which frames shots begin, some frames late.

    PySceneDetect's, without its least length: a shot that is too short is left out, not made part of the one before.
    """
    if config.detector == "none":
        return lambda number, frame: []
    import cv2
    from scenedetect.common import FrameTimecode
    from scenedetect.detectors import AdaptiveDetector, ContentDetector

    detector: ContentDetector
    if config.detector == "content":
        detector = ContentDetector(min_scene_len=0, **({} if config.threshold is None else {"threshold": config.threshold}))
    else:
        given = {} if config.threshold is None else {"adaptive_threshold": config.threshold}
        detector = AdaptiveDetector(min_scene_len=1, **given)

    def cuts_seen(number: int, frame: NDArray[np.uint8]) -> list[int]:
        at = FrameTimecode(number, fps=25.0)  # any rate: frames are counted, and no time is taken from it
        return [cut.frame_num for cut in detector.process_frame(at, cv2.cvtColor(frame, cv2.COLOR_RGB2BGR))]

    return cuts_seen


def _between(cuts: Sequence[int], spans: Sequence[Span], *, num_frames: int) -> Iterator[tuple[int, int]]:
    """First frame of each shot, and the one behind its last. A cut inside a dissolve is part of it."""
    inside = [cut for cut in sorted(set(cuts)) if not any(span.start <= cut <= span.end for span in spans)]
    breaks = sorted([(cut, cut) for cut in inside] + [(span.start, span.end) for span in spans])
    start = 0
    for end, following in [*breaks, (num_frames, num_frames)]:
        if end > start:
            yield start, end
        start = max(start, following)
