"""A run that was stopped and went on is the run that was never stopped."""

from __future__ import annotations

import json

import promises
import pytest
import torch
from dataset_factory import write_dataset
from training import (
    SAMPLES,
    assert_same_tensors,
    curve,
    events,
    losses,
    metrics,
    overrides,
    signal_at,
    signal_in_last_save,
    tensors,
    train_here,
)

STEPS = 10


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    path = tmp_path_factory.mktemp("resume") / "data"
    write_dataset(path, samples=SAMPLES)
    return path


@pytest.fixture(scope="module")
def whole(ranks, data, tmp_path_factory):
    """Runs that were never stopped, by stage."""
    made = {}

    def of(stage, world=2):
        if (stage, world) not in made:
            made[stage, world] = folder = tmp_path_factory.mktemp(f"whole-{stage}-{world}")
            ranks.run(train_here, overrides(data, folder, f"run.steps={STEPS}", f"parallel.zero.stage={stage}"), world=world)
        return made[stage, world]

    return of


@pytest.mark.parametrize("stage, world", [(0, 2), (0, 4), (3, 2)])
def test_five_steps_and_five_more_are_ten_bitwise(ranks, data, whole, stage, world, tmp_path, promise):
    # With four ranks the order of a sum shows, which it can't with two.
    for steps in (STEPS // 2, STEPS):
        ranks.run(train_here, overrides(data, tmp_path, f"run.steps={steps}", f"parallel.zero.stage={stage}"), world=world)
    assert [e["step"] for e in events(tmp_path, "resume")] == [STEPS // 2]
    assert curve(tmp_path) == curve(whole(stage, world))
    assert_same_tensors(tensors(tmp_path), tensors(whole(stage, world)))
    promise(promises.RESUME).measured(f"stage {stage} on {world} ranks: every line of the metrics and every tensor bitwise")


def test_five_steps_and_five_more_are_ten_bitwise_where_ranks_share_samples(ranks, data, tmp_path):
    shared = ["parallel.sp.degree=2", "parallel.recompute=full", "parallel.zero.stage=3"]
    for name, parts in (("whole", (STEPS,)), ("parts", (STEPS // 2, STEPS))):
        for steps in parts:
            ranks.run(train_here, overrides(data, tmp_path / name, f"run.steps={steps}", *shared), world=2)
    (start,) = events(tmp_path / "whole", "start")
    assert start["latents"] == {
        "1x6x4": "dsp over 2 ranks, 2 or 1 of 3 rows of tokens each",
        "3x4x6": "dsp over 2 ranks, 2 or 1 of 3 frames of tokens each",
    }
    assert start["mesh"] == "2 ranks on cpu: dp_shard 1 x ulysses 2"
    assert curve(tmp_path / "parts") == curve(tmp_path / "whole")
    assert_same_tensors(tensors(tmp_path / "parts"), tensors(tmp_path / "whole"))


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_a_signal_to_one_rank_stops_all_of_them_and_the_run_goes_on_bitwise(ranks, data, whole, stage, tmp_path, promise):
    args = overrides(data, tmp_path, f"run.steps={STEPS}", f"parallel.zero.stage={stage}")
    ranks.run(train_here, args, signal_at, 1, 3, world=2)
    stopped = json.loads((tmp_path / "STOPPED").read_text())["step"]
    assert 4 <= stopped <= 6
    assert [e["step"] for e in events(tmp_path, "stopped")] == [stopped]
    assert [m["step"] for m in metrics(tmp_path)] == list(range(1, stopped + 1))
    ranks.run(train_here, args, world=2)
    assert not (tmp_path / "STOPPED").exists()
    assert [e["step"] for e in events(tmp_path, "resume")] == [stopped]
    assert curve(tmp_path) == curve(whole(stage))
    assert_same_tensors(tensors(tmp_path), tensors(whole(stage)))
    promise(promises.SIGNAL).measured(f"stage {stage}: SIGTERM to rank 1 in step 4 saved step {stopped}; goes on bitwise")


SP2, USP4 = ("parallel.sp.degree=2",), ("parallel.sp.degree=4", "parallel.sp.scheme=usp", "parallel.sp.ulysses=2")
HSDP = ("parallel.sp.degree=2", "parallel.dp_replicate=2")


@pytest.mark.parametrize(
    "layouts",
    [
        ((2, 0), (1, 0), (2, 0)),
        ((2, 0), (2, 3), (1, 2)),
        ((2, 3), (1, 0), (2, 2)),
        ((2, 0, *SP2), (1, 0), (2, 3, *SP2)),
        ((2, 3), (2, 2, *SP2), (2, 0)),
        ((4, 3, *HSDP), (3, 2, "parallel.sp.degree=3"), (4, 2, *SP2)),
        pytest.param(((4, 3, *USP4), (2, 2), (4, 0, *SP2)), marks=pytest.mark.slow),
    ],
    ids=lambda p: "->".join("-".join(map(str, layout)).replace("parallel.", "") for layout in p),
)
def test_another_layout_continues_to_1e_10_in_float64(ranks, data, layouts, tmp_path):
    double = ["run.dtype=float64", "model.heads=4", "model.patch=[1,1,2]"]  # 4 and 6 rows, for 4 ranks
    ranks.run(train_here, overrides(data, tmp_path / "whole", "run.steps=9", *double), world=1)
    for part, (world, stage, *more) in enumerate(layouts, 1):
        args = overrides(data, tmp_path / "parts", f"run.steps={3 * part}", *double, f"parallel.zero.stage={stage}", *more)
        ranks.run(train_here, args, world=world)
    assert [m["step"] for m in metrics(tmp_path / "parts")] == list(range(1, 10))
    tokens, digests = ([m[name] for m in metrics(tmp_path / "parts")] for name in ("tokens", "batch_digest"))
    assert (tokens, digests) == tuple([m[name] for m in metrics(tmp_path / "whole")] for name in ("tokens", "batch_digest"))
    torch.testing.assert_close(losses(tmp_path / "parts"), losses(tmp_path / "whole"), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(tensors(tmp_path / "parts"), tensors(tmp_path / "whole"), rtol=1e-10, atol=1e-10)


def test_steps_after_the_last_checkpoint_are_done_again_and_stand_in_the_metrics_once(ranks, data, whole, tmp_path):
    """As after a kill: the metrics of steps that no checkpoint holds are on the disk already."""
    ranks.run(train_here, overrides(data, tmp_path, "run.steps=4"), world=2)
    late = metrics(whole(0))[4:6]
    with open(tmp_path / "metrics.jsonl", "a") as handle:
        handle.writelines(json.dumps({**line, "loss": 1e9}) + "\n" for line in late)
        handle.write('{"step": 7, "lo')
    ranks.run(train_here, overrides(data, tmp_path, f"run.steps={STEPS}"), world=2)
    assert curve(tmp_path) == curve(whole(0))


def test_a_finished_run_started_again_changes_nothing(ranks, data, tmp_path):
    args = overrides(data, tmp_path, "run.steps=3")
    ranks.run(train_here, args, world=2)
    before, files = curve(tmp_path), sorted((tmp_path / "checkpoints").rglob("*"))
    ranks.run(train_here, args, world=2)
    assert curve(tmp_path) == before
    assert sorted((tmp_path / "checkpoints").rglob("*")) == files


def test_a_signal_during_the_last_save_does_not_cost_it(ranks, data, whole, tmp_path):
    ranks.run(train_here, overrides(data, tmp_path, f"run.steps={STEPS}"), signal_in_last_save, 1, STEPS, world=2)
    assert not (tmp_path / "STOPPED").exists(), "nothing is left to do"
    assert_same_tensors(tensors(tmp_path), tensors(whole(0)))
