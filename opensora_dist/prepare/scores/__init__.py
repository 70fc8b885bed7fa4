"""What is measured of a clip's frames: one small file per score, each a pure function of a ``View``."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass

from opensora_dist.core.video import Frames
from opensora_dist.prepare.probe import Probe
from opensora_dist.prepare.scores.brightness import brightness
from opensora_dist.prepare.scores.camera import camera
from opensora_dist.prepare.scores.compression import compression
from opensora_dist.prepare.scores.motion import motion
from opensora_dist.prepare.scores.sharpness import sharpness
from opensora_dist.prepare.scores.static import static
from opensora_dist.prepare.scores.text_area import text_area
from opensora_dist.prepare.scores.view import View


@dataclass(frozen=True, kw_only=True)
class Score:
    """How a score is measured.

    Args:
        measure: The function; None is a score that a clip doesn't have, as an image has no motion.
        unit: For tables and axes.
    """

    measure: Callable[[View], float | str | None]
    unit: str


SCORES = {
    "brightness": Score(measure=brightness, unit="mean grey, 0 to 255"),
    "static": Score(measure=static, unit="share of frames"),
    "sharpness": Score(measure=sharpness, unit="variance of the Laplacian"),
    "motion": Score(measure=motion, unit="pixels a frame at 256 pixels height"),
    "text_area": Score(measure=text_area, unit="share of the picture"),
    "compression": Score(measure=compression, unit="bits per pixel of the source"),
    "camera": Score(measure=camera, unit="word"),
}


def score_frames(
    frames_THW3: Frames,
    *,
    fps: float,
    names: Collection[str],
    source: Probe,
    looks: int,
) -> dict[str, float | str | None]:
    """The scores of these names; the same frames give the same bits, whatever else is asked for. OpenCV's threads are the caller's.

    Args:
        frames_THW3: uint8 RGB; one frame is an image, which has no motion, static share or camera: those are None.
        fps: Frames per second of the clip.
        names: Of ``SCORES``.
        source: What the file's headers say.
        looks: Frames that are looked at, evenly spaced.
    """
    view = View(frames_THW3=frames_THW3, fps=fps, looks=looks, source=source)
    return {name: SCORES[name].measure(view) for name in sorted(names)}
