"""How much of a picture is under text, without a model: letters stand in lines, each of one tone, one pen and much the same height."""

# N things that may be letters, H W rows and columns

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from opensora_dist.prepare.scores.view import View

_FRAMES = 4
_BLOCKS = (15, 41, 91)  # pixels that a letter is set off against, for small, middling and large ones
_STEP = 18  # grey levels from the mean of the block on
_LEAST_H = 7  # pixels: smaller letters run together
_LEAST_CONTRAST = 40.0
_LEAST_SET_OFF = 0.75  # of the pixels about a letter
_LEAST_LETTERS = 4
_MOST_THINGS = 600  # of one size; a picture of leaves has thousands, and the clearest are letters if any are


@dataclass(frozen=True, kw_only=True)
class _Things:
    """Connected pixels that are of letters' make."""

    x_N: NDArray[np.floating]
    y_N: NDArray[np.floating]
    w_N: NDArray[np.floating]
    h_N: NDArray[np.floating]
    tone_N: NDArray[np.floating]
    pen_N: NDArray[np.floating]


def text_area(view: View) -> float:
    """Share of the picture under lines of text, 0 to 1, mean over a few frames, since text stays. docs/prepare.md has the errors.

    Source: the reasoning of Epshtein et al., Detecting text in natural scenes with stroke width transform, 2010, on components of a
    local threshold.
    """
    return float(np.mean([text_mask(grey).mean() for grey in view.greys[:: max(1, len(view.greys) // _FRAMES)]]))


def text_mask(grey_HW: NDArray[np.uint8]) -> NDArray[np.bool_]:
    """Where lines of text are, [H, W]."""
    mask = np.zeros(grey_HW.shape, dtype=bool)
    for block in _BLOCKS:
        for light_HW in (grey_HW, 255 - grey_HW):  # light letters, then dark ones
            _mark_lines(mask, _find_things(light_HW, block))
    return mask


def _find_things(light_HW: NDArray[np.uint8], block: int) -> _Things:
    """Light things on a darker ground that have a letter's size, fill, evenness and pen."""
    import cv2

    height, width = light_HW.shape
    above = cv2.adaptiveThreshold(light_HW, 1, cv2.ADAPTIVE_THRESH_MEAN_C, cv2.THRESH_BINARY, block, -_STEP)
    count, labels, stats, _ = cv2.connectedComponentsWithStats(above, connectivity=4)
    x, y, w, h, area = stats[1:].T.astype(np.float64)
    sized = (h >= _LEAST_H) & (h <= np.minimum(0.35 * height, 1.2 * block)) & (w <= 2.5 * h) & (h <= 9 * w)
    whole = (x > 0) & (y > 0) & (x + w < width) & (y + h < height)
    chosen = np.flatnonzero(sized & whole & (area >= 0.15 * w * h) & (area <= 0.95 * w * h))
    number = np.zeros(count, dtype=np.int32)
    number[chosen + 1] = np.arange(1, len(chosen) + 1)
    things = number[labels]
    ring = cv2.dilate(things.astype(np.float32), np.ones((5, 5), np.uint8)).astype(np.int32)
    ring[above > 0] = 0
    light = light_HW.reshape(-1).astype(np.float64)

    def mean(of: NDArray[np.int32], values: NDArray[np.floating] | NDArray[np.bool_]) -> NDArray[np.floating]:
        of = of.reshape(-1)
        sums, counts = np.bincount(of, values, len(chosen) + 1), np.bincount(of, minlength=len(chosen) + 1)
        return sums[1:] / np.maximum(counts[1:], 1)

    tone = mean(things, light)
    spread = np.sqrt(np.maximum(mean(things, light**2) - tone**2, 0))
    contrast = tone - mean(ring, light)
    # Pixels of a stroke are a quarter of its width from its edge in the mean.
    pen = 4 * mean(things, cv2.distanceTransform(above, cv2.DIST_L2, 3).reshape(-1).astype(np.float64)) - 1
    x, y, w, h = x[chosen], y[chosen], w[chosen], h[chosen]
    # What lies about a letter is darker all round; what lies between letters is no darker than what is beyond.
    set_off = mean(ring, light < np.append(0, tone - 0.5 * _LEAST_CONTRAST)[ring.reshape(-1)])
    good = np.flatnonzero((contrast > _LEAST_CONTRAST) & (spread < 0.6 * contrast) & (pen < 0.5 * h) & (set_off > _LEAST_SET_OFF))
    good = np.sort(good[np.argsort(-contrast[good], kind="stable")[:_MOST_THINGS]])
    return _Things(x_N=x[good], y_N=y[good], w_N=w[good], h_N=h[good], tone_N=tone[good], pen_N=pen[good])


def _mark_lines(mask_HW: NDArray[np.bool_], things: _Things) -> None:
    """Sets the boxes of lines: things that follow each other, one beside the next, alike in height, tone and pen."""
    x, y, w, h, tone, pen = things.x_N, things.y_N, things.w_N, things.h_N, things.tone_N, things.pen_N
    if len(x) < _LEAST_LETTERS:
        return
    taller, lower = np.maximum(h[:, None], h), np.minimum(h[:, None], h)
    gap = x - (x + w)[:, None]
    overlap = np.minimum((y + h)[:, None], y + h) - np.maximum(y[:, None], y)
    alike = (np.abs(tone[:, None] - tone) < 30) & (np.maximum(pen[:, None], pen) < 1.7 * np.minimum(pen[:, None], pen) + 0.5)
    beside = (x > x[:, None]) & (gap < 1.2 * taller) & (gap > -0.2 * lower) & (overlap > 0.7 * lower) & (taller < 2 * lower)
    for of in _connected(beside & alike):
        left, right, top, bottom = x[of].min(), (x + w)[of].max(), y[of].min(), (y + h)[of].max()
        usual = np.median(h[of])
        if len(of) >= _LEAST_LETTERS and right - left >= 2.5 * usual and bottom - top <= 2.2 * usual:
            mask_HW[int(top) : int(bottom), int(left) : int(right)] = True


def _connected(next_NN: NDArray[np.bool_]) -> list[NDArray[np.intp]]:
    """Which things hang together: the members of each group."""
    count = len(next_NN)
    linked = next_NN | next_NN.T | np.eye(count, dtype=bool)
    group_N = np.arange(count)
    while True:
        least = np.where(linked, group_N, count).min(axis=1)
        least = least[least]
        if (least == group_N).all():
            return [np.flatnonzero(group_N == group) for group in np.unique(group_N)]
        group_N = least
