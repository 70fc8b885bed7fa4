"""Training by DeepSpeed through the command line, and going on by it or by another backend."""

from __future__ import annotations

import pytest
import torch
from cli_process import cli
from dataset_factory import write_dataset
from training import SAMPLES, assert_same_tensors, curve, events, overrides, tensors, train_here

STEPS = 6


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    path = tmp_path_factory.mktemp("deepspeed") / "data"
    write_dataset(path, samples=SAMPLES)
    return path


def _by(backend, stage):
    return [f"parallel.zero.backend={backend}", f"parallel.zero.stage={stage}"]


def test_train_runs_by_deepspeed_from_the_command_line_and_goes_on_as_if_never_stopped(ranks, data, tmp_path):
    whole, parts = (overrides(data, tmp_path / name, *_by("deepspeed", 2)) for name in ("whole", "parts"))
    ended = cli("train", *parts, f"run.steps={STEPS // 2}", "parallel.nproc=2")
    assert ended.code == 0, ended.err
    assert "DeepSpeed" not in ended.out + ended.err, "it says more than warnings"
    ranks.run(train_here, [*parts, f"run.steps={STEPS}"], world=2)
    ranks.run(train_here, [*whole, f"run.steps={STEPS}"], world=2)
    assert [e["step"] for e in events(tmp_path / "parts", "resume")] == [STEPS // 2]
    assert curve(tmp_path / "parts") == curve(tmp_path / "whole")
    assert_same_tensors(tensors(tmp_path / "parts"), tensors(tmp_path / "whole"))


@pytest.mark.slow  # tests/dist/test_cross_resume.py does the same without the command line
@pytest.mark.parametrize("stage", range(4))
def test_a_run_by_deepspeed_goes_on_by_pytorch_on_another_number_of_ranks_and_back(ranks, data, tmp_path, stage):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    # A key's bias has no gradient but rounding; with a smaller epsilon AdamW would make whole steps of that.
    eps = "optim.eps=1e-5"
    ranks.run(train_here, overrides(data, whole, f"run.steps={STEPS}", eps), world=1)
    for steps, world, by in ((2, 4, _by("deepspeed", stage)), (4, 2, _by("native", 3)), (STEPS, 2, _by("deepspeed", stage))):
        ranks.run(train_here, overrides(data, parts, f"run.steps={steps}", eps, *by), world=world)
    for found, wanted in zip(curve(parts), curve(whole), strict=True):
        assert found[1:3] == pytest.approx(wanted[1:3], rel=1e-4)
        assert (found[0], *found[3:]) == (wanted[0], *wanted[3:])
    for name, tensor in tensors(whole).items():
        torch.testing.assert_close(tensors(parts)[name], tensor, rtol=1e-3, atol=1e-3 if name.startswith("model") else 1e-4)
