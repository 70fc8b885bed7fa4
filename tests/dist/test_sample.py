"""Sampling from a checkpoint: what it is refused for, in which precision it draws, when its files are written, and on how many ranks."""

from __future__ import annotations

import json

import pytest
import torch
from cli_process import cli
from dataset_factory import write_dataset
from PIL import Image
from training import SAMPLES, overrides, train_here

from opensora_dist.config.load import load_config
from opensora_dist.config.train import TrainConfig
from opensora_dist.core.errors import CheckpointError, ConfigError, WeightsError
from opensora_dist.core.types import Thw
from opensora_dist.core.video import read_video
from opensora_dist.recipes import build, sharing
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


# The clips are of 3x2x3 tokens: three frames on two ranks.
_CLI = ["--device", "cpu", "--steps", 2, "--cfg-scale", 2.0]


def test_two_ranks_that_share_each_video_write_those_of_one_and_only_the_first_speaks(runs, tmp_path):
    one = _sample(runs / "float32", tmp_path / "one", batch=2)
    prompts = [arg for prompt in PROMPTS for arg in ("--prompt", prompt)]
    ended = cli("sample", runs / "float32", *prompts, *_CLI, "--batch", 2, "--nproc", 2, "--out", tmp_path / "two")
    assert ended.code == 0, ended.err
    files = sorted((tmp_path / "two").iterdir())
    assert [f.name for f in files] == [f.name for f in sorted([*one.videos, one.contact_sheet])]
    assert sorted(ended.out.split()) == [str(f) for f in files], "each path once"
    for path in one.videos:
        alone, shared = (read_video(folder / path.name)[0].astype(int) for folder in (path.parent, tmp_path / "two"))
        assert alone.std() > 0 and abs(alone - shared).max() <= 1


def test_evaluate_scores_on_the_first_of_the_ranks_that_draw(runs, tmp_path):
    more = ["--count", 2, "--json", "--out", tmp_path]
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    ended = cli("evaluate", runs / "float32", *_CLI, *more, "--scheme", "ring", launcher=torchrun)
    assert ended.code == 0, ended.err
    assert json.loads(ended.out)["videos"] == 2
    assert json.loads((tmp_path / "evaluation.json").read_text())["videos"] == 2


@pytest.mark.parametrize(
    "wish, said",
    [
        ({"nproc": 5}, "--nproc=5: 3x2x3 tokens have fewer frames and fewer rows than that; use --nproc=3 or less"),
        ({"nproc": 3, "scheme": "ulysses"}, "--scheme=ulysses"),
        ({"nproc": 1, "scheme": "ring"}, "--scheme=ring says how ranks share a video, and there is one rank"),
        ({"options": SamplingOptions(sampler="ddim")}, "sampler=ddim"),
        ({"clip": Thw(3, 33, 48)}, "33"),
    ],
    ids=lambda v: " ".join(v) if isinstance(v, dict) else "",
)
def test_what_ranks_can_not_share_is_said_before_one_starts(runs, monkeypatch, wish, said):
    monkeypatch.setattr(sharing, "run_ranks", lambda *args, **kwargs: pytest.fail("a rank was started"))
    given = {"nproc": 2, "scheme": None, "clip": None, "options": SamplingOptions(), "device": "cpu"} | wish
    with pytest.raises(ConfigError) as error:
        sharing.start_ranks([], checkpoint=runs / "float32", **given)
    assert said in str(error.value) and "parallel.sp" not in str(error.value)
    with pytest.raises(CheckpointError):
        sharing.start_ranks([], checkpoint=runs / "nowhere", **given | {"nproc": 2})


def test_one_rank_or_those_of_a_launcher_start_no_others(runs, monkeypatch):
    monkeypatch.setattr(sharing, "run_ranks", lambda *args, **kwargs: pytest.fail("a rank was started"))
    given = {"checkpoint": runs / "float32", "scheme": None, "clip": None, "options": SamplingOptions(), "device": "cpu"}
    assert sharing.start_ranks([], nproc=1, **given) is None
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert sharing.start_ranks([], nproc=2, **given) is None
    with pytest.raises(ConfigError, match="--nproc=3, but the launcher has started 2 ranks"):
        sharing.start_ranks([], nproc=3, **given)


@pytest.mark.parametrize("failed", [True, False])
def test_the_other_ranks_logs_are_kept_where_one_failed(runs, monkeypatch, failed):
    seen = []

    def run_ranks(argv, *, nproc, log_dir):
        seen.append((argv, nproc, log_dir))
        (log_dir / "rank-1.log").write_text("what went wrong")
        return 3 if failed else 0

    monkeypatch.setattr(sharing, "run_ranks", run_ranks)
    given = {"scheme": None, "clip": None, "options": SamplingOptions(), "device": "cpu"}
    assert sharing.start_ranks(["sample", "x"], nproc=2, checkpoint=runs / "float32", **given) == (3 if failed else 0)
    ((argv, nproc, logs),) = seen
    assert (argv, nproc, logs.exists()) == (["sample", "x"], 2, failed)
    if failed:
        (logs / "rank-1.log").unlink()
        logs.rmdir()


@pytest.mark.parametrize(
    "model, run, degree, chosen",
    [
        ("stdit", "ring", 3, "ring"),
        ("stdit", "auto", 3, "dsp"),
        ("stdit", "ulysses", 3, "dsp"),  # 3 ranks do not divide 4 heads
        ("stdit", "usp", 3, "usp"),  # its ring takes what ulysses can't
        ("dit", "dsp", 2, "ulysses"),
        ("dit", "auto", 3, "ring"),
        ("dit", "ulysses", 3, "ring"),
        ("dit", "fastseq", 2, "fastseq"),
    ],
)
def test_the_scheme_is_the_runs_where_it_suits_else_the_one_with_the_fewest_bytes(model, run, degree, chosen):
    wanted = [f"model.name={model}", "model.heads=4", "model.width=16", f"parallel.sp.scheme={run}", "parallel.sp.chunks=2"]
    config = load_config(TrainConfig, None, overrides=wanted)
    sp = sharing.sampling_sp(config, degree=degree, scheme=None, grid=Thw(3, 4, 4))
    assert (sp.degree, sp.scheme, sp.chunks) == (degree, chosen, 2)
    if chosen == "usp":
        assert sp.ulysses == 1


def test_a_scheme_that_is_asked_for_is_taken_or_refused():
    config = load_config(TrainConfig, None, overrides=["model.name=dit", "model.heads=4", "model.width=16"])
    assert sharing.sampling_sp(config, degree=2, scheme="allgather", grid=Thw(3, 4, 4)).scheme == "allgather"
    with pytest.raises(ConfigError, match=r"--scheme=dsp needs attention in two parts.*use --scheme="):
        sharing.sampling_sp(config, degree=2, scheme="dsp", grid=Thw(3, 4, 4))
