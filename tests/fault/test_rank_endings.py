"""Under torchrun one rank fails of itself, and the others end of that: each says which it was, and what follows is decided from it."""

from __future__ import annotations

import sys

import pytest
from cli_process import cli
from dataset_factory import write_dataset
from training import SAMPLES, metrics, overrides

from opensora_dist.resilience.attempts import Next, decide
from opensora_dist.resilience.endings import ENDINGS_VARIABLE, Ending, read_endings

# What `-m opensora_dist ARGS` would run, with one rank's mistake in a step.
_PROGRAM = """
import os, sys
from opensora_dist.cli.main import run
from opensora_dist.train import loop
real = loop.train_step
def train_step(backend, data, **kwargs):
    if data.step == 3 and os.environ["RANK"] == "1":
        raise {error}
    return real(backend, data, **kwargs)
loop.train_step = train_step
sys.argv = ["opensora-dist", *sys.argv[3:]]
run()
"""
_RDZV = ("--rdzv-backend", "c10d", "--rdzv-endpoint", "127.0.0.1:0")


@pytest.mark.parametrize(
    "error, ending, follows",
    [
        ('ValueError("a mistake")', Ending.ERROR, Next.FAILED),
        pytest.param(
            'RuntimeError("CUDA error: uncorrectable ECC error encountered")', Ending.DEVICE, Next.AGAIN, marks=pytest.mark.slow
        ),
    ],
)
def test_one_rank_fails_in_a_step_and_the_others_lose_it_without_a_stop_by_a_user(tmp_path, monkeypatch, error, ending, follows):
    """torchrun sends SIGTERM to the rank that is left, in the loop that listens to it."""
    write_dataset(tmp_path / "data", samples=SAMPLES)
    (tmp_path / "program.py").write_text(_PROGRAM.format(error=error))
    monkeypatch.setenv(ENDINGS_VARIABLE, str(tmp_path / "endings"))
    launcher = (
        "-m",
        "torch.distributed.run",
        "--nproc-per-node",
        "2",
        *_RDZV,
        "--no-python",
        sys.executable,
        str(tmp_path / "program.py"),
    )
    args = overrides(tmp_path / "data", tmp_path / "run", "run.steps=4000", "run.log_every=1")
    ended = cli("train", *args, launcher=launcher)
    assert ended.code == 1
    noted = read_endings(tmp_path / "endings", world=2)
    assert noted[0].ending is Ending.LOST and noted[1].ending is ending, (noted, ended.err)
    assert not (tmp_path / "run" / "STOPPED").exists() and len(metrics(tmp_path / "run")) == 3
    outcome = decide(noted, code=ended.code)
    assert outcome.next is follows and outcome.why.startswith("rank 1 on ")
