"""How much moves in a clip."""

from __future__ import annotations

import numpy as np

from opensora_dist.prepare.scores.view import View


def motion(view: View) -> float | None:
    """Mean length of the optical flow, in pixels from a frame to the next at 256 pixels height. An image has none."""
    if not view.pairs:
        return None
    return float(np.linalg.norm(view.flows_Phw2, axis=-1).mean())
