"""A run that leaves scheme and degree to ``auto`` trains the same model, and says what it predicted and what it took."""

from __future__ import annotations

import pytest
import torch
from dataset_factory import write_dataset
from training import SAMPLES, events, losses, metrics, overrides, train_here

from opensora_dist.parallel.sequence.registry import SCHEMES

STEPS = 24  # both shapes come ten times, which is when a measurement is told
GRIDS = {"3x2x3", "1x3x2"}


@pytest.mark.parametrize("world", [1, 2])
def test_auto_where_every_sample_is_one_ranks_measures_and_chooses_nothing(ranks, tmp_path, world):
    write_dataset(tmp_path / "data", samples=SAMPLES)
    double = ["run.dtype=float64", "run.steps=4"]
    ranks.run(train_here, overrides(tmp_path / "data", tmp_path / "plain", *double), world=1)
    ranks.run(train_here, overrides(tmp_path / "data", tmp_path / "auto", *double, "parallel.sp.scheme=auto"), world=world)
    torch.testing.assert_close(losses(tmp_path / "auto"), losses(tmp_path / "plain"), rtol=1e-10, atol=1e-10)
    assert events(tmp_path / "auto", "sequence_prediction") == []


@pytest.mark.parametrize("least", [1, 2])
def test_a_run_by_auto_is_the_run_and_holds_its_predictions_against_what_was_measured(ranks, tmp_path, least):
    write_dataset(tmp_path / "data", samples=SAMPLES)
    double = ["run.dtype=float64", f"run.steps={STEPS}"]
    auto = ["parallel.sp.degree=2", "parallel.sp.scheme=auto", f"parallel.sp.min_degree={least}"]
    ranks.run(train_here, overrides(tmp_path / "data", tmp_path / "plain", *double), world=1)
    ranks.run(train_here, overrides(tmp_path / "data", tmp_path / "auto", *double, *auto), world=2)
    torch.testing.assert_close(losses(tmp_path / "auto"), losses(tmp_path / "plain"), rtol=1e-10, atol=1e-10)
    assert [m["tokens"] for m in metrics(tmp_path / "auto")] == [m["tokens"] for m in metrics(tmp_path / "plain")]
    predicted = {e["bucket"]: e for e in events(tmp_path / "auto", "sequence_prediction")}
    measured = {e["bucket"]: e for e in events(tmp_path / "auto", "sequence_measured")}
    assert predicted.keys() == measured.keys() == GRIDS
    for grid, told in measured.items():
        assert told["measured_ms"] > 0 and told["predicted_ms"] == predicted[grid]["predicted_ms"]
        assert (told["scheme"], told["degree"]) == (predicted[grid]["scheme"], predicted[grid]["degree"])
        assert told["scheme"] in SCHEMES if told["degree"] == 2 else told["scheme"] == "local"
        assert least <= told["degree"] <= 2
