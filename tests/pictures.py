"""Pictures with texture at every scale, and what a camera sees that moves over them: for tests of shots and scores."""

from __future__ import annotations

import cv2
import numpy as np


def picture(seed, *, height=360, width=640):
    """A seeded picture [H, W, 3], of blobs of 2 to 64 pixels, fainter the smaller they are."""
    rng = np.random.default_rng(seed)
    sum_HW3 = np.zeros((height, width, 3), np.float32)
    for size in (2, 4, 8, 16, 32, 64):
        noise = rng.normal(0, 1, (-(-height // size), -(-width // size), 3)).astype(np.float32)
        sum_HW3 += cv2.resize(noise, (width, height), interpolation=cv2.INTER_CUBIC) * size**0.5
    low, high = np.percentile(sum_HW3, [1, 99])
    return np.clip((sum_HW3 - low) / (high - low) * 255, 0, 255).astype(np.uint8)


def seen(of, frames, *, size=(144, 256), right=0.0, down=0.0, zoom=1.0, clockwise_deg=0.0):
    """Frames [T, h, w, 3] of a camera over the middle of a picture that each frame goes right and down by so many pixels, zooms by a
    factor, and turns clockwise."""
    height, width = size
    shot = []
    for t in range(frames):
        scale, angle = zoom**-t, np.deg2rad(clockwise_deg * t)
        c, s = scale * np.cos(angle), scale * np.sin(angle)
        # As far to either side of the picture's middle at the ends.
        x = of.shape[1] / 2 + right * (t - (frames - 1) / 2)
        y = of.shape[0] / 2 + down * (t - (frames - 1) / 2)
        back = np.array([[c, -s, x - c * width / 2 + s * height / 2], [s, c, y - s * width / 2 - c * height / 2]])
        shot.append(
            cv2.warpAffine(
                of, back, (width, height), flags=cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP, borderMode=cv2.BORDER_REFLECT
            )
        )
    return np.stack(shot)


def blend(before, after, frames):
    """Frames between two pictures, or between videos of that many frames: shares 1/(n+1) to n/(n+1) of the second."""
    share = (np.arange(1, frames + 1) / (frames + 1))[:, None, None, None]
    return ((1 - share) * before + share * after).round().astype(np.uint8)
