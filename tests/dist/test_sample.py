"""Sampling from a checkpoint: what it is refused for, in which precision it draws, and when its files are written."""

from __future__ import annotations

import pytest
import torch
from dataset_factory import write_dataset
from PIL import Image
from training import SAMPLES, overrides, train_here

from opensora_dist.core.errors import ConfigError, WeightsError
from opensora_dist.core.types import Thw
from opensora_dist.recipes import build
from opensora_dist.recipes import sample as recipe
from opensora_dist.train.generate import SamplingOptions

PROMPTS = ["red", "a blue square", "green"]


@pytest.fixture(scope="module")
def runs(ranks, tmp_path_factory):
    folder = tmp_path_factory.mktemp("sample")
    write_dataset(folder / "data", samples=SAMPLES)
    for dtype in ("float32", "bfloat16"):
        ranks.run(train_here, overrides(folder / "data", folder / dtype, "run.steps=1", f"run.dtype={dtype}"), world=1)
    return folder


def _sample(run, out, **other):
    options = SamplingOptions(sampler=other.pop("sampler", None), steps=2, cfg_scale=2.0)
    wish = {"prompts": PROMPTS, "count": 1, "clip": None, "seed": 0, "batch": 1, "device": "cpu", "weights": "ema"}
    return recipe.sample(run, out=out, options=options, **{**wish, **other})


@pytest.mark.parametrize("weights", ["ema", "model"])
def test_a_checkpoint_that_lacks_or_adds_a_parameter_is_refused(runs, weights, tmp_path, monkeypatch):
    def read_tensors(folder, *, prefix):
        stored = real(folder, prefix=prefix)
        if prefix == f"{weights}.":
            stored[f"{prefix}another"] = stored.pop(f"{prefix}final_layer.linear.weight")
        return stored

    real = build.read_tensors
    monkeypatch.setattr(build, "read_tensors", read_tensors)
    with pytest.raises(WeightsError, match=r"another: the model has none\s+final_layer.linear.weight: the run has none"):
        _sample(runs / "float32", tmp_path / "out", weights=weights)
    assert not (tmp_path / "out").exists()


def test_each_video_is_a_file_before_the_next_is_drawn_and_the_sheet_shows_the_first(runs, tmp_path, monkeypatch):
    there = []

    def watched(*args, **kwargs):
        for frames in real(*args, **kwargs):
            there.append(len(list(tmp_path.glob("*.mp4"))))
            yield frames

    real = recipe.draw_videos
    monkeypatch.setattr(recipe, "draw_videos", watched)
    files = _sample(runs / "float32", tmp_path)
    assert there == [0, 1, 2] and all(path.is_file() for path in files.videos)
    three = Image.open(files.contact_sheet).size
    monkeypatch.setattr(recipe, "_SHEET_ROWS", 2)
    two = Image.open(_sample(runs / "float32", tmp_path).contact_sheet).size
    assert two == (three[0], three[1] * 2 // 3)


@pytest.mark.parametrize("wish", [{"sampler": "ddim"}, {"clip": Thw(3, 33, 48)}, {"prompts": []}], ids=str)
def test_a_refused_wish_writes_nothing(runs, wish, tmp_path):
    with pytest.raises(ConfigError):
        _sample(runs / "float32", tmp_path / "out", **wish)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_videos_are_drawn_in_the_precision_of_the_run(runs, dtype, tmp_path, monkeypatch):
    seen = []

    def watched(*args, **kwargs):
        seen.append(torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else torch.float32)
        return real(*args, **kwargs)

    real = recipe.generate_latents
    monkeypatch.setattr(recipe, "generate_latents", watched)
    _sample(runs / dtype, tmp_path)
    assert set(seen) == {getattr(torch, dtype)}
