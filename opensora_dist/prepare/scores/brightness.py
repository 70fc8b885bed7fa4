"""How bright a clip is."""

from __future__ import annotations

import numpy as np

from opensora_dist.prepare.scores.view import View


def brightness(view: View) -> float:
    """Mean grey, 0 to 255."""
    return float(np.mean([grey.mean() for grey in view.greys]))
