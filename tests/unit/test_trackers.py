"""Trackers are views: built from config, and never the end of a run."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

from opensora_dist.config.train import TrackConfig, WandbConfig
from opensora_dist.core.errors import ConfigError
from opensora_dist.core.video import write_video
from opensora_dist.observe.trackers import Trackers, build_trackers, track_problems


def _build(config: TrackConfig, run_dir: Path, **options) -> Trackers:
    return build_trackers(config, run_dir=run_dir, run_name="test", config_dump={"run": {"name": "test"}}, **options)


def test_by_default_there_are_none(tmp_path: Path) -> None:
    trackers = _build(TrackConfig(), tmp_path)
    trackers.log(1, {"loss": 1.0})
    trackers.close()
    assert trackers.failures == {}
    assert list(tmp_path.iterdir()) == []


def test_tensorboard_shows_numbers_and_videos(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    frames = np.random.default_rng(0).integers(0, 255, (4, 16, 16, 3)).astype(np.uint8)
    write_video(tmp_path / "v.mp4", frames, fps=8)
    trackers = _build(TrackConfig(tensorboard=True), tmp_path)
    trackers.log(1, {"loss": 0.5})
    trackers.log(2, {"loss": 0.25})
    trackers.log_video(2, "samples/0", tmp_path / "v.mp4")
    trackers.close()
    assert trackers.failures == {"tensorboard": 0}
    shown = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(e.step, e.value) for e in shown.Scalars("loss")] == [(1, 0.5), (2, 0.25)]
    (image,) = shown.Images("samples/0")
    assert (image.step, image.encoded_image_string[:3]) == (2, b"GIF")


@pytest.mark.parametrize(
    ("config", "missing"),
    [
        (TrackConfig(tensorboard=True), "tensorboard"),
        (TrackConfig(wandb=WandbConfig(mode="offline")), "wandb"),
    ],
)
def test_a_missing_package_is_a_config_error_with_the_way_out(
    tmp_path: Path, monkeypatch, config: TrackConfig, missing: str
) -> None:
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(ConfigError, match=rf"track\.{missing}.*pip install 'opensora-dist\[track\]'"):
        _build(config, tmp_path)


def test_online_without_a_key_is_refused_before_anything_asks_for_one(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    with pytest.raises(ConfigError, match="WANDB_API_KEY"):
        _build(TrackConfig(wandb=WandbConfig(mode="online")), tmp_path)


def test_all_that_trackers_lack_is_known_before_one_is_built(monkeypatch) -> None:
    for package in ("tensorboard", "wandb"):
        monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    problems = track_problems(TrackConfig(tensorboard=True, wandb=WandbConfig(mode="online")))
    assert [p.fields for p in problems] == [("track.tensorboard",), ("track.wandb.mode",), ("track.wandb.mode",)]
    assert track_problems(TrackConfig()) == []


class _Broken:
    name = "broken"

    def log(self, step, values):
        raise ConnectionError("no route")

    def log_video(self, step, name, path):
        raise RuntimeError("no codec")

    def close(self):
        raise OSError("disk full")


class _Working(_Broken):
    name = "working"

    def __init__(self) -> None:
        self.seen: list[int] = []

    def log(self, step, values):
        self.seen.append(step)

    def log_video(self, step, name, path):
        self.seen.append(-step)

    def close(self):
        self.seen.append(0)


def test_a_failing_tracker_is_said_once_counted_and_ends_nothing(caplog) -> None:
    working = _Working()
    trackers = Trackers([_Broken(), working])
    for step in (1, 2, 3):
        trackers.log(step, {"loss": 1.0})
    trackers.log_video(3, "samples/0", Path("v.mp4"))
    assert [r.getMessage() for r in caplog.records] == ["tracker broken failed (ConnectionError: no route); the run goes on"]
    trackers.close()
    assert working.seen == [1, 2, 3, -3, 0]
    assert trackers.failures == {"broken": 5, "working": 0}
    assert "failed 5 times" in caplog.records[-1].getMessage()
