"""A new run from another run's weights: the next stage of a training."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from dataset_factory import write_dataset

from opensora_dist.checkpoint.store import read_tensors
from opensora_dist.config.load import load_config
from opensora_dist.config.train import TrainConfig
from opensora_dist.parallel.mesh import build_mesh
from opensora_dist.recipes.train import check, train_rank

SMALL = ["model.depth=1", "model.width=16", "model.heads=2", "data.global_batch=4", "run.log_every=1", "optim.lr=1e-2"]


def _train(*overrides: str) -> None:
    config = load_config(TrainConfig, None, overrides=[*SMALL, *overrides])
    train_rank(config, build_mesh(torch.device("cpu"), dp_replicate=1, sp=config.parallel.sp, timeout_s=60))


def _tensors(run: Path, step: int, prefix: str) -> dict[str, torch.Tensor]:
    found = read_tensors(run / "checkpoints" / f"step-{step:08d}" / "tensors", prefix=f"{prefix}.")
    return {name.removeprefix(f"{prefix}."): tensor for name, tensor in found.items()}


def test_a_run_starts_from_another_runs_averaged_weights(ranks, tmp_path, monkeypatch):
    write_dataset(tmp_path / "one", samples={(2, 32, 32): 8})
    write_dataset(tmp_path / "two", samples={(3, 48, 32): 8}, seed=1)
    first, second = tmp_path / "first", tmp_path / "second"
    ranks.run(_train, f"data.path={tmp_path}/one", f"run.dir={first}", "run.steps=3", world=2)
    start = [f"data.path={tmp_path}/two", f"run.dir={second}", "run.seed=5", "model.init_from.format=run"]
    # A learning rate this small leaves float32 weights where they start.
    tiny = [*start, f"model.init_from.path={first}", "run.steps=1", "optim.lr=1e-20", "parallel.zero.stage=3"]
    ranks.run(_train, *tiny, world=2)
    averaged, weights = _tensors(first, 3, "ema"), _tensors(second, 1, "model")
    assert not torch.equal(averaged["final_layer.linear.weight"], _tensors(first, 3, "model")["final_layer.linear.weight"])
    for name, tensor in averaged.items():
        torch.testing.assert_close(weights[name], tensor, rtol=0, atol=0)

    # The run goes on although what it started from is gone.
    first.rename(tmp_path / "gone")
    ranks.run(_train, *start, f"model.init_from.path={first}", "run.steps=2", world=1)
    assert (second / "checkpoints" / "step-00000002").is_dir()


def test_weights_that_do_not_fit_or_are_not_there_are_named(ranks, tmp_path):
    write_dataset(tmp_path / "one", samples={(2, 32, 32): 8})
    ranks.run(_train, f"data.path={tmp_path}/one", f"run.dir={tmp_path}/first", "run.steps=1", world=1)
    other = [f"data.path={tmp_path}/one", f"run.dir={tmp_path}/other", "model.init_from.format=run", "model.width=20"]
    with pytest.raises(AssertionError, match=r"(?s)holds another model:.*x_embedder"):
        ranks.run(_train, *other, f"model.init_from.path={tmp_path}/first", world=1)
    with pytest.raises(Exception, match=r"model.init_from.path='nowhere' is not a run directory"):
        check(None, overrides=[*SMALL, *other, "model.init_from.path=nowhere", "model.width=16"])
