"""Cuts and scores of real footage.

How the list of cuts was made: every third frame of bikes.mp4, every fourth of bigbuckbunny.mp4 and carphone_pristine.mp4, every twelfth of
world.mp4 and every ninth of the film were laid out on sheets and looked at, with the mean difference of each frame from the one before at hand;
about each change of scene, the four frames before and after it were laid side by side, and the first frame of the new scene noted, counted from
0 as frames are decoded. The film fades in from black: frames 0 to 3 are black, the light grows until frame 49, and frame 50 is the first of
full light, by the mean grey of each. Its titles appear over a scene that goes on, which is no cut.
"""

from __future__ import annotations

from pathlib import Path

import cv2
import pytest
from real_clips import film_clip, gradio_clips, real_clips

from opensora_dist.config.load import load_config
from opensora_dist.config.prepare import PrepareConfig, ShotsConfig
from opensora_dist.core.types import Thw
from opensora_dist.core.video import iter_frames
from opensora_dist.prepare.clips import cut_clips
from opensora_dist.prepare.filters import dropped_by
from opensora_dist.prepare.probe import probe_source
from opensora_dist.prepare.scores import SCORES, score_frames
from opensora_dist.prepare.shots import find_shots
from opensora_dist.prepare.sources import Source

CUTS = {  # the first frame of each scene, and the number of frames
    "bikes.mp4": [0, 30, 76, 137, 187, 242, 250],
    "bigbuckbunny.mp4": [0, 132],
    "carphone_pristine.mp4": [0, 120],
    "world.mp4": [0, 901],
}
FILM_SCENES = [(50, 285), (285, 378), (378, 553), (553, 720)]
WEB = Path(__file__).parents[2] / "configs" / "prepare" / "webvideo_256.yaml"
BOTH = pytest.mark.parametrize("detector", ["content", "adaptive"])


def scenes(path, **options):
    return [(shot.start_frame, shot.end_frame) for shot in find_shots(path, ShotsConfig(min_s=0.1, **options))]


def assert_within_a_frame(found, listed):
    assert len(found) == len(listed), (found, listed)
    assert all(abs(a - b) <= 1 for one, other in zip(found, listed, strict=True) for a, b in zip(one, other, strict=True)), found


def scored(path):
    """The scores of clips that follow each other through a whole video, of a shape of the config for videos from the web."""
    source = Source(path=path, name=path.name, caption="", num_bytes=path.stat().st_size, mtime_ns=0)
    probe = probe_source(source)
    cv2.setNumThreads(1)
    for cut in cut_clips(iter_frames(path), fps=8, buckets=[Thw(16, 256, 256)], every=True):
        found = score_frames(cut.frames_THW3, fps=8, names=list(SCORES), source=probe, looks=8)
        yield {"duration_s": 2.0, "min_side": min(cut.height, cut.width), **found}


def web_filter():
    return load_config(PrepareConfig, WEB).filter


@BOTH
@pytest.mark.parametrize("name", ["bikes.mp4", "bigbuckbunny.mp4", "carphone_pristine.mp4"])
def test_shots_are_those_of_the_list(name, detector):
    found = scenes(real_clips() / name, detector=detector, dissolves=True)
    assert_within_a_frame(found, list(zip(CUTS[name], CUTS[name][1:])))


@pytest.mark.slow
def test_a_globe_that_turns_for_half_a_minute_is_one_shot():
    found = scenes(gradio_clips() / "world.mp4", detector="adaptive", dissolves=True)
    assert_within_a_frame(found, [(0, 901)])


@pytest.mark.slow
@BOTH
def test_shots_of_a_film_are_those_of_the_list(detector):
    found = find_shots(film_clip(), ShotsConfig(detector=detector, dissolves=True))  # half a second at least: what is black goes
    assert_within_a_frame([(shot.start_frame, shot.end_frame) for shot in found], FILM_SCENES)


def test_a_title_card_is_refused_as_static_wherever_it_is_cut():
    reasons = [dropped_by(found, web_filter()) for found in scored(gradio_clips() / "a.mp4")]
    assert len(reasons) == 3
    assert all("static=" in reason for reason in reasons), reasons


def test_moving_pictures_pass_the_same_filter():
    assert [dropped_by(found, web_filter()) for found in scored(real_clips() / "bigbuckbunny.mp4")] == [None, None]


def test_the_camera_of_real_shots_is_named():
    """Of bikes.mp4, by eye: a still camera from frame 137 on; from frame 187 on the bollard drifts to the left, so the camera goes right."""
    by_start = {}
    shots = find_shots(real_clips() / "bikes.mp4", ShotsConfig(detector="adaptive"))
    frames = iter_frames(real_clips() / "bikes.mp4")
    bounds = [(shot.start_frame, shot.end_frame) for shot in shots]
    for cut in cut_clips(frames, fps=8, buckets=[Thw(12, 256, 448)], shots=bounds):
        probe = probe_source(Source(path=real_clips() / "bikes.mp4", name="", caption="", num_bytes=1, mtime_ns=0))
        by_start[round(cut.start_s * 25)] = score_frames(cut.frames_THW3, fps=8, names=["camera"], source=probe, looks=8)[
            "camera"
        ]
    assert by_start[137] == "static"
    assert by_start[187] == "pan right"
