"""Gradual transitions between shots: dissolves, and fades to and from one colour.

Within a dissolve each frame is a blend of the pictures at its two ends, the second growing steadily, and the ends don't look alike. So
windows of several lengths are held against that; where the camera moves, frames may come close to it, but there a shifted frame
explains the next one far better than a blend does. All of it is looked at in thumbnails, in which the motion inside the shots is small.
"""

# T frames, D pixels of a thumbnail

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

THUMB_W, THUMB_H = 64, 36  # 2304 bytes a frame
_LENGTHS_S = (0.25, 0.35, 0.5, 0.7, 1.0, 1.4, 2.0, 2.8)
_LEAST_FRAMES = 5
_BLOCK = 2048
# Chosen on 700 dissolves of 6 to 40 frames put between real moving shots, and on 200 pans, tilts, zooms and lights of real pictures
# (tests/unit/test_shots.py holds some of both): 97% of the dissolves are found, and a transition in 3 of the others.
_MIN_CHANGE = 10.0  # grey levels, root mean square between the ends
_MAX_LIKENESS = 0.5  # correlation of the ends: of a change of light it is 1
_MAX_RESIDUAL = 0.33  # distance of the frames between from the blend, in distances of the ends
_MAX_UNSTEADY = 0.2  # of the share of the second end, from a straight line
_MAX_CONTRAST = 0.85  # variance in the middle, of the mean of the ends': pictures that have nothing in common average out
_STILL_RISING = 0.4  # of the slope of a transition: a frame that adds so much is part of it
_ZOOMS = (0.87, 1.0, 1.15)
_MIN_UNMOVED = 0.75  # what is left of the difference of two frames when one is shifted to fit the other


@dataclass(frozen=True, kw_only=True)
class Span:
    """Frames ``start`` to ``end``, the latter left out, that show two shots at once."""

    start: int
    end: int


@dataclass(frozen=True, kw_only=True)
class _Window:
    start: int
    length: int  # its ends are `start` and `start + length`
    residual: float


def find_dissolves(thumbs_TD: NDArray[np.uint8], *, fps: float) -> list[Span]:
    """The gradual transitions of a video, in order, none touching another.

    Thumbnails of the whole video are held: 250 MB per hour at 30 fps. The search itself takes some 100 MB, however long the video is.

    Args:
        thumbs_TD: Grey thumbnails, flattened, of ``THUMB_H`` rows of ``THUMB_W``.
        fps: Frames per second.
    """
    windows = sorted(_blends(thumbs_TD, fps=fps), key=lambda w: (w.residual, w.start, w.length))
    spans: list[Span] = []
    for window in windows:
        if any(min(window.start + window.length, s.end) - max(window.start, s.start) > (window.length // 3) for s in spans):
            continue
        if _is_moved(thumbs_TD, window):
            continue
        before = max((s.end for s in spans if s.end <= window.start), default=0)
        after = min((s.start for s in spans if s.start >= window.start + window.length), default=len(thumbs_TD) - 1)
        spans.append(_fit_ramp(thumbs_TD, window, first=before, last=after))
    return _joined(spans)


def _blends(thumbs_TD: NDArray[np.uint8], *, fps: float) -> Iterator[_Window]:
    """Windows whose frames are blends of their ends, by the numbers alone."""
    for length in sorted({max(_LEAST_FRAMES, round(fps * length_s)) for length_s in _LENGTHS_S}):
        for block in range(0, len(thumbs_TD) - length, _BLOCK):
            part = thumbs_TD[block : block + _BLOCK + length].astype(np.float32)
            residual_T, good_T = _blend_fit(part, length)
            for start in np.flatnonzero(good_T).tolist():
                yield _Window(start=block + start, length=length, residual=float(residual_T[start]))


def _blend_fit(x_TD: NDArray[np.float32], length: int) -> tuple[NDArray[np.floating], NDArray[np.bool_]]:
    """For every window of ``length``: how far its frames are from blends of its ends, and whether it passes for a dissolve."""
    count, pixels = len(x_TD) - length, x_TD.shape[1]
    z_TD = x_TD - x_TD.mean(axis=1, keepdims=True)

    def dot(y_TD: NDArray[np.float32], i: int, j: int) -> NDArray[np.floating]:
        products: NDArray[np.floating] = np.einsum("td,td->t", y_TD[i : i + count], y_TD[j : j + count], dtype=np.float64)
        return products

    aa, bb, ab = dot(x_TD, 0, 0), dot(x_TD, length, length), dot(x_TD, 0, length)
    apart = np.maximum(aa + bb - 2 * ab, 1e-6)
    var_a, var_b = dot(z_TD, 0, 0), dot(z_TD, length, length)
    noise = 4.0 * pixels  # two grey levels: a flat picture correlates with nothing
    likeness = dot(z_TD, 0, length) / np.sqrt((var_a + noise) * (var_b + noise))
    residual, unsteady, contrast = np.zeros(count), np.zeros(count), np.full(count, np.inf)
    steps = [round(length * j / 8) for j in range(1, 8)]
    for k in steps:
        am, bm = dot(x_TD, 0, k), dot(x_TD, k, length)
        toward_b = bm - am - ab + aa  # <m - a, b - a>
        share = toward_b / apart
        off = dot(x_TD, k, k) - 2 * am + aa - share * toward_b
        residual += np.sqrt(np.maximum(off, 0) / apart) / len(steps)
        unsteady = np.maximum(unsteady, np.abs(share - k / length))
        if abs(k / length - 0.5) < 0.2:
            contrast = np.minimum(contrast, dot(z_TD, k, k) / np.maximum((var_a + var_b) / 2, 1e-6))
    good = (
        (apart > _MIN_CHANGE**2 * pixels)
        & (likeness < _MAX_LIKENESS)
        & (residual < _MAX_RESIDUAL)
        & (unsteady < _MAX_UNSTEADY)
        & (contrast < _MAX_CONTRAST)
    )
    return residual, good


def _is_moved(thumbs_TD: NDArray[np.uint8], window: _Window) -> bool:
    """Whether shifting a frame, and scaling it, explains the one a quarter of the window later: then it is the camera that moves."""
    import cv2

    margin_h, margin_w = THUMB_H // 5, THUMB_W // 5
    places = [window.start + round(window.length * j / 4) for j in range(5)]
    left = []
    for a, b in pairwise(places):
        later = thumbs_TD[b].reshape(THUMB_H, THUMB_W)
        inner = np.ascontiguousarray(thumbs_TD[a].reshape(THUMB_H, THUMB_W)[margin_h:-margin_h, margin_w:-margin_w])
        stayed = cv2.matchTemplate(later, inner, cv2.TM_CCOEFF_NORMED)[margin_h, margin_w]
        scaled = [cv2.resize(inner, None, fx=scale, fy=scale, interpolation=cv2.INTER_AREA) for scale in _ZOOMS]
        moved = max(cv2.matchTemplate(later, part, cv2.TM_CCOEFF_NORMED).max() for part in scaled)
        left.append((1.02 - float(moved)) / (1.02 - float(stayed)))
    return float(np.median(left)) < _MIN_UNMOVED


def _fit_ramp(thumbs_TD: NDArray[np.uint8], window: _Window, *, first: int, last: int) -> Span:
    """Where the transition begins and ends: the best fit of level, rise, level to the share of the second picture.

    Args:
        window: One that lies about the transition.
        first, last: Frames that may be looked at.
    """
    around = window.length + 2
    begin, stop = max(first, window.start - around), min(last, window.start + window.length + around)
    x = thumbs_TD[begin : stop + 1].astype(np.float32)
    a, b = x[window.start - begin], x[window.start + window.length - begin]
    share = (x - a) @ (b - a) / max(float((b - a) @ (b - a)), 1e-6)
    t = np.arange(len(x))
    best, fit = np.inf, (window.start + 1 - begin, window.start + window.length - begin)
    middle = window.start + window.length // 2 - begin
    for start in range(max(1, middle - window.length), middle + 1):
        for end in range(max(middle, start + 2), min(len(x), middle + window.length)):
            ramp = np.clip((t - start + 1) / (end - start + 1), 0, 1)
            centred = ramp - ramp.mean()
            rest = share - share.mean()
            rest = rest - centred * (centred @ rest) / (centred @ centred)
            error = float(rest @ rest)
            if error < best * (1 - 1e-6):
                best, fit = error, (start, end)
    start, end = fit
    slope = (share[end] - share[start - 1]) / (end - start + 1)
    # A fade in linear light is slow at its dark end, and the fit cuts that off.
    while start > 1 and share[start - 1] - share[start - 2] > _STILL_RISING * slope:
        start -= 1
    while end < len(x) - 1 and share[end + 1] - share[end] > _STILL_RISING * slope:
        end += 1
    return Span(start=begin + start, end=begin + end)


def _joined(spans: list[Span]) -> list[Span]:
    """In order, those that overlap made one."""
    joined: list[Span] = []
    for span in sorted(spans, key=lambda s: s.start):
        if joined and span.start < joined[-1].end:
            span = Span(start=joined[-1].start, end=max(span.end, joined.pop().end))
        joined.append(span)
    return joined
