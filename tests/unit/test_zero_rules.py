"""What a ZeRO backend can't do is refused before ranks start, all of it at once."""

from __future__ import annotations

import pytest

from opensora_dist.config.load import load_config
from opensora_dist.config.rules import train_problems
from opensora_dist.config.train import TrainConfig
from opensora_dist.core import extras
from opensora_dist.recipes.checks import training_problems

DEEPSPEED = "parallel.zero.backend=deepspeed"


def _problems(tmp_path, *overrides, world=4):
    given = [f"data.path={tmp_path}", *overrides]
    return [p.message for p in train_problems(load_config(TrainConfig, None, overrides=given), world=world)]


@pytest.mark.parametrize("stage", range(4))
def test_every_stage_of_deepspeed_is_taken(tmp_path, stage):
    assert not _problems(tmp_path, DEEPSPEED, f"parallel.zero.stage={stage}")


def test_all_that_deepspeed_cannot_do_is_said_at_once(tmp_path):
    given = ["run.dtype=float64", "parallel.dp_replicate=2", "parallel.zero.stage=2", "parallel.zero.offload=all"]
    said = _problems(tmp_path, DEEPSPEED, *given, "parallel.zero.nvme_path=/nowhere")
    for name in ("run.dtype=float64", "parallel.dp_replicate=2", "parallel.zero.offload=all", "parallel.zero.nvme_path=/nowhere"):
        (one,) = [m for m in said if m.startswith(name)]
        assert DEEPSPEED in one and "parallel.zero.backend=native" in one


@pytest.mark.parametrize(
    "given, way_out",
    [
        (["parallel.zero.stage=0", "parallel.zero.offload=optimizer"], "stage 1, 2 or 3"),
        (["parallel.zero.stage=3", "parallel.zero.offload=optimizer", "parallel.zero.nvme_path={tmp_path}"], "offload=all"),
    ],
)
def test_offload_that_deepspeed_has_not_names_the_way_out(tmp_path, given, way_out):
    (said,) = _problems(tmp_path, DEEPSPEED, *(g.format(tmp_path=tmp_path) for g in given))
    assert f"use {way_out}" in said


@pytest.mark.parametrize("backend", ["native", "colossalai"])
def test_files_are_deepspeeds_alone(tmp_path, backend):
    given = [
        f"parallel.zero.backend={backend}",
        "parallel.zero.stage=3",
        "parallel.zero.offload=all",
        "parallel.zero.nvme_path=swap",
    ]
    (said,) = [m for m in _problems(tmp_path, *given) if "nvme_path" in m]
    assert f"parallel.zero.backend={backend}" in said and "parallel.zero.backend=deepspeed" in said


def test_deepspeed_that_is_not_installed_is_named_with_its_extra(tmp_path, monkeypatch):
    monkeypatch.setattr(extras.importlib.util, "find_spec", lambda name: None)
    (said,) = _problems(tmp_path, DEEPSPEED)
    assert "pip install 'opensora-dist[deepspeed]'" in said


def _under(monkeypatch, **variables):
    """As a rank: by default one that `train` has started itself."""
    for name, value in {"RANK": "0", "WORLD_SIZE": "2", "TORCHELASTIC_RESTART_COUNT": "0", **variables}.items():
        monkeypatch.delenv(name, raising=False) if value is None else monkeypatch.setenv(name, value)


def _restarts(tmp_path):
    config = load_config(TrainConfig, None, overrides=[f"data.path={tmp_path}", "run.device=cpu", "parallel.max_restarts=2"])
    return [p.message for p in training_problems(config) if "parallel.max_restarts" in p.fields]


@pytest.mark.parametrize("launcher", [{"TORCHELASTIC_RUN_ID": "none"}, {"TORCHELASTIC_RESTART_COUNT": None}])
def test_restarts_under_a_launcher_are_refused_with_its_own_flag(tmp_path, monkeypatch, launcher):
    _under(monkeypatch, **launcher)
    (said,) = _restarts(tmp_path)
    assert said.startswith("parallel.max_restarts=2") and "torchrun --max-restarts=2" in said


def test_restarts_of_ranks_that_train_starts_itself_are_taken(tmp_path, monkeypatch):
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    _under(monkeypatch)
    assert not _restarts(tmp_path)
    _under(monkeypatch, RANK=None, WORLD_SIZE=None)
    assert not _restarts(tmp_path)
