"""How much of a clip stands still altogether."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from opensora_dist.prepare.scores.view import View

_CELLS = 18  # on the short side: a cell averages out what a codec does to its pixels
_SAME = 4.0  # grey levels that a cell of an unmoved picture may still change by, as codecs correct themselves


def static(view: View) -> float | None:
    """Share of frames that show the same as the one before, whatever the codec made of it, 0 to 1. An image has none."""
    if not view.pairs:
        return None
    return float(np.mean([_same(a, b) for a, b in view.pairs]))


def _same(a_HW: NDArray[np.uint8], b_HW: NDArray[np.uint8]) -> bool:
    import cv2

    scale = min(1.0, _CELLS / min(a_HW.shape))
    size = (max(1, round(a_HW.shape[1] * scale)), max(1, round(a_HW.shape[0] * scale)))
    a, b = (cv2.resize(x.astype(np.float32), size, interpolation=cv2.INTER_AREA) for x in (a_HW, b_HW))
    return bool(np.abs(a - b).max() <= _SAME)
