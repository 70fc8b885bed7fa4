"""What the camera does."""

# P pairs of neighbouring frames, K points that are followed, h w rows and columns at MOTION_H

from __future__ import annotations

from typing import get_args

import numpy as np
from numpy.typing import NDArray

from opensora_dist.config.prepare import CameraMotion
from opensora_dist.prepare.scores.view import MOTION_H, View

CAMERA_MOTIONS: tuple[CameraMotion, ...] = get_args(CameraMotion)
_STILL = 0.03  # of the picture's height a second: below it, nothing moves
_LEAD = 1.5  # how many times the others the strongest movement must be
_GRID = 8  # pixels between points
_LEAST_POINTS = 24
_LEAST_TEXTURE = 5e-5  # smaller eigenvalue of the structure tensor, of grey from 0 to 1: a flat place moves anyhow
_LEAST_SHARE = 0.5  # of the points that must move as the camera says
_FIT_PX = 1.0


def camera(view: View) -> CameraMotion | None:
    """One of ``CAMERA_MOTIONS``, in the words of captions; an image has none.

    A similarity (shift, scale, turn) is fitted to the flow of each pair, at places with texture; what most of the picture follows is the
    camera's. Directions are the camera's: it pans left where the picture goes right. "undetermined" where things move on their own, the
    camera shakes, or does two things at once.
    """
    if not view.pairs:
        return None
    moves = [_move(a, flow) for (a, _), flow in zip(view.small_pairs, view.flows_Phw2, strict=True)]
    sure = np.array([move for move in moves if move is not None])
    if 2 * len(sure) <= len(moves):
        return "undetermined"
    return _named(sure * view.fps / MOTION_H)


def _move(grey_hw: NDArray[np.uint8], flow_hw2: NDArray[np.float32]) -> NDArray[np.floating] | None:
    """(right, down, growth, clockwise turn) of a picture, in pixels at ``MOTION_H`` height; the last two as they move a point at the mean
    distance from the middle. None where most of it doesn't move as one."""
    import cv2

    height, width = grey_hw.shape
    scale = MOTION_H / height
    texture = cv2.cornerMinEigenVal(grey_hw.astype(np.float32) / 255, 5)
    ys, xs = np.mgrid[_GRID // 2 : height : _GRID, _GRID // 2 : width : _GRID]
    rich = texture[ys, xs] > _LEAST_TEXTURE
    ys, xs = ys[rich], xs[rich]
    if len(ys) < _LEAST_POINTS:
        return None
    middle = np.array([(width - 1) / 2, (height - 1) / 2])
    before_K2 = (np.stack([xs, ys], axis=1) - middle) * scale
    after_K2 = before_K2 + flow_hw2[ys, xs]
    fit, inliers = cv2.estimateAffinePartial2D(before_K2, after_K2, method=cv2.RANSAC, ransacReprojThreshold=_FIT_PX)
    if fit is None or inliers.mean() < _LEAST_SHARE:
        return None
    (a, _, right), (b, _, down) = fit
    radius = float(np.hypot(height, width) * scale / np.sqrt(12))
    return np.array([right, down, np.log(np.hypot(a, b)) * radius, np.arctan2(b, a) * radius])


def _named(moves_P4: NDArray[np.floating]) -> CameraMotion:
    """The word for movements in heights of the picture a second."""
    net = np.median(moves_P4, axis=0)
    strength = np.abs(net)
    if np.linalg.norm(moves_P4, axis=1).mean() < _STILL:
        return "static"
    lead = int(strength.argmax())
    if strength[lead] < max(_STILL, _LEAD * np.delete(strength, lead).max()):
        return "undetermined"
    if np.mean(np.sign(moves_P4[:, lead]) == np.sign(net[lead])) < 0.8:
        return "undetermined"
    words: tuple[tuple[CameraMotion, CameraMotion], ...] = (
        ("pan left", "pan right"),
        ("tilt up", "tilt down"),
        ("zoom in", "zoom out"),
        ("roll counterclockwise", "roll clockwise"),
    )
    forward, backward = words[lead]
    return forward if net[lead] > 0 else backward
