"""Scores of clips whose motion, light, blur, noise and text are known."""

from __future__ import annotations

import numpy as np
import pytest
from pictures import picture, seen
from PIL import Image, ImageDraw, ImageFont

from opensora_dist.config.prepare import FilterConfig, PrepareConfig, ScoresConfig
from opensora_dist.core.video import read_video, write_video
from opensora_dist.prepare.probe import Probe
from opensora_dist.prepare.scores import SCORES, score_frames
from opensora_dist.prepare.scores.camera import CAMERA_MOTIONS

FPS = 8
SIZE = (256, 256)


def scores(frames, *names, source=Probe(), looks=8):
    return score_frames(frames, fps=FPS, names=names, source=source, looks=looks)


def score(name, frames, **options):
    return scores(frames, name, **options)[name]


def noisy(frames, sigma):
    noise = np.random.default_rng(0).normal(0, sigma, frames.shape)
    return np.clip(frames + noise, 0, 255).astype(np.uint8)


def written(frames, text, *, at, size, fill=(255, 255, 255)):
    """The frames with a line of text, and the share of the picture that its box takes."""
    font, drawn = ImageFont.load_default(size), []
    for frame in frames:
        image = Image.fromarray(frame)
        pen = ImageDraw.Draw(image)
        pen.text(at, text, font=font, fill=fill, stroke_width=max(1, size // 10), stroke_fill=(0, 0, 0))
        left, top, right, bottom = pen.textbbox(at, text, font=font)
        drawn.append(np.asarray(image))
    return np.stack(drawn), (right - left) * (bottom - top) / (frames.shape[1] * frames.shape[2])


def test_every_score_that_a_config_can_name_is_measured_or_a_models():
    named = set(ScoresConfig.model_fields["also"].annotation.__args__[0].__args__)
    assert set(SCORES) == named - {"duplicates", "aesthetic", "match"}
    assert set(SCORES) <= set(FilterConfig.model_fields)
    assert PrepareConfig().scores.frames >= 2


def test_scores_are_the_same_whatever_else_is_asked_for():
    frames = seen(picture(0), 9, right=3)
    together = scores(frames, *SCORES)
    assert together == {name: score(name, frames) for name in SCORES} == scores(frames, *SCORES)


def test_brightness_is_mean_grey():
    grey = np.full((4, 64, 64, 3), 100, np.uint8)
    assert score("brightness", grey) == pytest.approx(100)
    assert score("brightness", np.zeros_like(grey)) == 0


@pytest.mark.parametrize("speed", [0.5, 2, 8, 16])
@pytest.mark.parametrize("height", [256, 512])
def test_motion_is_pixels_a_frame_at_256_pixels_height(speed, height):
    moved = seen(picture(1, height=720, width=1280), 9, size=(height, height), right=speed * height / 256)
    assert score("motion", moved) == pytest.approx(speed, rel=0.1, abs=0.1)


def test_noise_moves_nothing():
    assert score("motion", noisy(seen(picture(1), 9), 4)) < 0.5


@pytest.mark.parametrize(
    "move, word",
    [
        ({"right": 3}, "pan right"),
        ({"right": -12}, "pan left"),
        ({"down": 2}, "tilt down"),
        ({"down": -4}, "tilt up"),
        ({"zoom": 1.02}, "zoom in"),
        ({"zoom": 1 / 1.03}, "zoom out"),
        ({"clockwise_deg": 1.5}, "roll clockwise"),
        ({"clockwise_deg": -2}, "roll counterclockwise"),
        ({}, "static"),
        ({"right": 3, "down": 3}, "undetermined"),
    ],
)
def test_the_camera_is_named_as_captions_name_it(move, word):
    assert word in CAMERA_MOTIONS
    frames = seen(picture(2, height=720, width=1280), 12, size=SIZE, **move)
    assert (score("camera", frames), score("camera", noisy(frames, 4))) == (word, word)


def test_a_thing_that_moves_before_a_still_camera_is_no_camera_motion():
    frames = seen(picture(3), 9, size=SIZE)
    for t, frame in enumerate(frames):
        frame[80:160, 20 + 12 * t : 100 + 12 * t] = picture(4)[:80, :80]
    assert score("camera", frames) == "static"
    assert score("motion", frames) > 0.5


def test_a_shaking_camera_and_an_empty_picture_are_undetermined():
    big = picture(5, height=720, width=1280)
    shaken = np.concatenate([seen(big[:, 8 * (t % 2) :], 1, size=SIZE) for t in range(12)])
    assert score("camera", shaken) == "undetermined"
    assert score("camera", np.full((9, 256, 256, 3), 90, np.uint8)) == "undetermined"


def test_static_is_the_share_of_frames_that_repeat_whatever_a_codec_made_of_them(tmp_path):
    still, moving = seen(picture(6), 17), seen(picture(6), 17, right=2)
    assert (score("static", still), score("static", moving)) == (1.0, 0.0)
    assert score("static", np.repeat(moving[::2], 2, axis=0)[:17], looks=16) == pytest.approx(0.5, abs=0.04)
    write_video(tmp_path / "still.mp4", noisy(still[:1].repeat(17, axis=0), 2), fps=FPS, crf=32)
    assert score("static", read_video(tmp_path / "still.mp4")[0]) == 1.0
    cursor = still.copy()
    for t, frame in enumerate(cursor):
        frame[60:76, 10 * t : 10 * t + 16] = 255
    assert score("static", cursor) == 0.0


def test_blur_lowers_sharpness_and_noise_raises_it():
    import cv2

    sharp = seen(picture(7), 3)
    blurred = np.stack([cv2.GaussianBlur(frame, (0, 0), 3) for frame in sharp])
    assert score("sharpness", blurred) < 0.1 * score("sharpness", sharp)
    assert score("sharpness", noisy(sharp, 10)) > score("sharpness", sharp)


@pytest.mark.parametrize("size", [14, 20, 32])
@pytest.mark.parametrize("ground", ["black", "picture"])
def test_text_area_is_near_the_box_of_the_text(size, ground):
    blank = np.zeros((2, 256, 448, 3), np.uint8) if ground == "black" else seen(picture(8), 2, size=(256, 448)) // 2
    frames, share = written(blank, "Breaking news today", at=(30, 120), size=size)
    assert score("text_area", blank) <= 0.01
    assert score("text_area", frames) == pytest.approx(share, rel=0.35)


def test_an_untextured_picture_and_a_tiny_one_have_no_text():
    assert score("text_area", np.full((2, 256, 256, 3), 200, np.uint8)) == 0.0
    assert score("text_area", seen(picture(9), 2, size=(32, 32))) == 0.0


def test_compression_is_bits_per_pixel_of_the_source():
    frames = np.zeros((2, 16, 16, 3), np.uint8)
    video = Probe(height=100, width=200, fps=25, bits=1e6)
    assert score("compression", frames, source=video) == pytest.approx(1e6 / (100 * 200 * 25))
    image = Probe(height=100, width=200, bits=8e4)
    assert score("compression", frames[:1], source=image) == pytest.approx(4)
    assert score("compression", frames, source=Probe()) is None


def test_an_image_has_no_motion():
    found = scores(seen(picture(0), 1), *SCORES)
    assert {name for name, value in found.items() if value is None} == {"motion", "static", "camera", "compression"}
