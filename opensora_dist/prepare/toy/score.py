"""Does a video show what its toy caption says? Measured on the frames by classical vision, with no learned part.

Toy backgrounds are nearly grey, so the object is whatever has colour: a pixel's *chroma* is its distance from grey in the CbCr
plane. Each frame is measured by itself (``Blob``), then four questions are put to the clip; ``score_video`` defines each.
"""

# T frames, H W height, width; x grows rightwards, y downwards

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import cv2
import numpy as np
from numpy.typing import NDArray

from opensora_dist.core.video import Frames
from opensora_dist.prepare.toy.grammar import COLOURS, DIRECTIONS, SHAPES, SIZES, parse
from opensora_dist.prepare.toy.render import coverage

MIN_CHROMA = 30.0  # backgrounds stay under 10, object colours are above 75
MIN_AREA, MAX_AREA = 0.005, 0.4  # of the frame: less is a speck, more is no object but a tinted frame
MAIN_SHARE = 0.9  # of all coloured pixels, that one whole object holds
MIN_SOLIDITY = 0.6  # area over the area of the convex hull; a cross has 0.71
AREA_BAND = (0.6, 1.6)  # an object's area over its median in the clip
MIN_WHOLE_FRAMES = 0.85  # of a clip's frames
MIN_SEEN_FRAMES = 0.5
MIN_TRAVEL = 0.1  # of the frame's side, per movement


@dataclass(frozen=True, kw_only=True)
class Blob:
    """The largest coloured region of one frame.

    Args:
        colour: The colour name nearest in hue.
        shape: The shape whose outline, at the region's place and area, overlaps it best.
        area: In pixels.
        share: Its part of all coloured pixels in the frame.
        solidity: Its area over that of its convex hull.
        x: Centre of mass, pixels from the left.
        y: Centre of mass, pixels from the top.
    """

    colour: str
    shape: str
    area: float
    share: float
    solidity: float
    x: float
    y: float


@dataclass(frozen=True, kw_only=True)
class ToyScore:
    """Answers for one clip, as ``score_video`` defines them, and what was seen instead (None: no object)."""

    colour: bool
    shape: bool
    size: bool
    whole: bool
    moves: tuple[bool, ...]
    seen_colour: str | None
    seen_shape: str | None
    seen_size: str | None
    seen_moves: tuple[str | None, ...]

    @property
    def direction(self) -> float:
        """The share of movements in the right direction; 1/4 by chance."""
        return sum(self.moves) / len(self.moves)


@dataclass(frozen=True, kw_only=True)
class ToySummary:
    """Rates over clips, 0 to 1; ``direction`` counts movements, and is 1/4 by chance."""

    videos: int
    colour: float
    shape: float
    size: float
    whole: float
    direction: float


def score_video(frames: Frames, *, caption: str) -> ToyScore:
    """Scores a clip against its caption.

    A frame *shows an object* if its largest coloured region covers between 0.5 and 40% of the frame.

    - **colour**: at least half of the frames show an object, and the colour seen most often is the caption's. By chance 1/8.
    - **shape**, **size**: likewise. By chance 1/4 and 1/3.
    - **whole**: at least 85% of the frames show one object in one piece: the region holds 90% of all coloured pixels, fills
      60% of its convex hull, and its area is 0.6 to 1.6 times its median over the clip.
    - **moves**: the clip is divided into as many equal spans as the caption has movements. A movement is right if at least half
      of its span's frames show an object and the straight line fitted to the object's positions runs mainly in the caption's
      direction, over at least 10% of the frame's side. By chance 1/4.

    Args:
        frames: uint8 [T, H, W, 3], T at least 2 per movement.
        caption: Of the toy language.
    Raises:
        ConfigError: The caption is not of the toy language.
    """
    scene = parse(caption)
    _, height, width, _ = frames.shape
    blobs = [find_blob(f) for f in frames]
    seen = [b for b in blobs if b is not None]
    spans = _spans(len(frames), count=len(scene.moves))
    moves = tuple(_movement(blobs, span, height=height, width=width) for span in spans)
    enough = len(seen) >= MIN_SEEN_FRAMES * len(frames)
    colour = _most_common([b.colour for b in seen]) if enough else None
    shape = _most_common([b.shape for b in seen]) if enough else None
    median_area = float(np.median([b.area for b in seen])) if seen else 0.0
    size = _nearest_size(math.sqrt(median_area) / min(height, width)) if enough else None
    whole = [
        b.share >= MAIN_SHARE
        and b.solidity >= MIN_SOLIDITY
        and AREA_BAND[0] * median_area <= b.area <= AREA_BAND[1] * median_area
        for b in seen
    ]
    return ToyScore(
        colour=colour == scene.colour,
        shape=shape == scene.shape,
        size=size == scene.size,
        whole=sum(whole) >= MIN_WHOLE_FRAMES * len(frames),
        moves=tuple(found == said for found, said in zip(moves, scene.moves, strict=True)),
        seen_colour=colour,
        seen_shape=shape,
        seen_size=size,
        seen_moves=moves,
    )


def summarise(scores: Sequence[ToyScore]) -> ToySummary:
    """Rates over clips; there must be at least one."""
    assert scores, "a summary of no score"
    moves = [right for s in scores for right in s.moves]
    count = len(scores)
    return ToySummary(
        videos=count,
        colour=sum(s.colour for s in scores) / count,
        shape=sum(s.shape for s in scores) / count,
        size=sum(s.size for s in scores) / count,
        whole=sum(s.whole for s in scores) / count,
        direction=sum(moves) / len(moves),
    )


def find_blob(frame: NDArray[np.uint8]) -> Blob | None:
    """The largest coloured region of a frame [H, W, 3], or None if it is too small or too large to be an object."""
    height, width, _ = frame.shape
    cb, cr = _cbcr(frame.astype(np.float64))
    chroma = np.hypot(cb, cr)
    coloured = (chroma > MIN_CHROMA).astype(np.uint8)
    _, labels, stats, _ = cv2.connectedComponentsWithStats(coloured, connectivity=8)
    areas = stats[1:, cv2.CC_STAT_AREA]
    if not len(areas):
        return None
    region = labels == 1 + int(areas.argmax())
    # The outline is where chroma falls to half of the object's own: there a blurred edge has its middle.
    body = region & (chroma > np.percentile(chroma[region], 75) / 2)
    area = float(body.sum())
    if not MIN_AREA <= area / (height * width) <= MAX_AREA:
        return None
    ys, xs = np.nonzero(body)
    x, y = float(xs.mean()) + 0.5, float(ys.mean()) + 0.5
    hue = math.atan2(float(cr[body].mean()), float(cb[body].mean()))
    return Blob(
        colour=min(_HUES, key=lambda name: abs(math.remainder(_HUES[name] - hue, math.tau))),
        shape=max(SHAPES, key=lambda shape: _overlap(body, shape, x=x, y=y, area=area)),
        area=area,
        share=float(areas.max() / areas.sum()),
        solidity=_solidity(body),
        x=x,
        y=y,
    )


def _cbcr(rgb: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Colour differences of BT.601, zero for grey."""
    r, g, b = rgb[..., 0], rgb[..., 1], rgb[..., 2]
    luma = 0.299 * r + 0.587 * g + 0.114 * b
    return (b - luma) / 1.772, (r - luma) / 1.402


def _hue(rgb: tuple[int, int, int]) -> float:
    cb, cr = _cbcr(np.array(rgb, dtype=np.float64))
    return math.atan2(float(cr), float(cb))


_HUES = {name: _hue(rgb) for name, rgb in COLOURS.items()}


def _overlap(body: NDArray[np.bool_], shape: str, *, x: float, y: float, area: float) -> float:
    """Intersection over union of a region with a shape of its area and centre of mass."""
    height, width = body.shape
    ideal = coverage(shape, centre=(x, y), scale=math.sqrt(area), height=height, width=width)
    inside = float(ideal[body].sum())
    return inside / (area + float(ideal.sum()) - inside)


def _solidity(body: NDArray[np.bool_]) -> float:
    contours, _ = cv2.findContours(body.astype(np.uint8), cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)
    hull = cv2.convexHull(np.concatenate(contours))
    filled = cv2.fillConvexPoly(np.zeros(body.shape, np.uint8), hull, 1)  # counts pixels, as the area does
    return float(body.sum() / filled.sum())


def _spans(length: int, *, count: int) -> list[tuple[int, int]]:
    """``count`` equal runs of frames as (first, last), both included; neighbours share the frame of the turn if there is one."""
    ends = [k * (length - 1) / count for k in range(count + 1)]
    return [(math.ceil(a), math.floor(b)) for a, b in pairwise(ends)]


def _movement(blobs: Sequence[Blob | None], span: tuple[int, int], *, height: int, width: int) -> str | None:
    """The main direction within a span of frames, or None where nothing moves far enough or too little is seen."""
    first, last = span
    seen = [(t, b) for t, b in enumerate(blobs[first : last + 1]) if b is not None]
    if len(seen) < max(2, MIN_SEEN_FRAMES * (last + 1 - first)):
        return None
    times = [t for t, _ in seen]
    dx = float(np.polyfit(times, [b.x for _, b in seen], 1)[0]) * (last - first)
    dy = float(np.polyfit(times, [b.y for _, b in seen], 1)[0]) * (last - first)
    horizontal = abs(dx) >= abs(dy)
    if (abs(dx) / width if horizontal else abs(dy) / height) < MIN_TRAVEL:
        return None
    heading = (int(math.copysign(1, dx)), 0) if horizontal else (0, int(math.copysign(1, dy)))
    return next(name for name, step in DIRECTIONS.items() if step == heading)


def _most_common(names: Sequence[str]) -> str:
    return Counter(names).most_common(1)[0][0]


def _nearest_size(scale: float) -> str:
    return min(SIZES, key=lambda name: abs(math.log(SIZES[name] / max(scale, 1e-6))))
