"""What a ZeRO backend can't do is refused before ranks start, all of it at once."""

from __future__ import annotations

import pytest

from opensora_dist.config.load import load_config
from opensora_dist.config.rules import train_problems
from opensora_dist.config.train import TrainConfig
from opensora_dist.core import extras

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


def test_files_are_refused_by_native(tmp_path):
    (said,) = _problems(tmp_path, "parallel.zero.stage=3", "parallel.zero.offload=all", f"parallel.zero.nvme_path={tmp_path}")
    assert "parallel.zero.backend=native" in said and "parallel.zero.backend=deepspeed" in said


def test_deepspeed_that_is_not_installed_is_named_with_its_extra(tmp_path, monkeypatch):
    monkeypatch.setattr(extras.importlib.util, "find_spec", lambda name: None)
    (said,) = _problems(tmp_path, DEEPSPEED)
    assert "pip install 'opensora-dist[deepspeed]'" in said
