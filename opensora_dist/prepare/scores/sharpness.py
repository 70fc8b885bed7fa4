"""How sharp a clip is."""

from __future__ import annotations

import numpy as np

from opensora_dist.prepare.scores.view import View


def sharpness(view: View) -> float:
    """Variance of the Laplacian of grey, mean over frames, at the size the clip is trained at: a number of that size alone.

    Source: Pech-Pacheco et al., Diatom autofocusing in brightfield microscopy, 2000.
    """
    import cv2

    return float(np.mean([cv2.Laplacian(grey, cv2.CV_32F).var() for grey in view.greys]))
