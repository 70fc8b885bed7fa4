"""Numbers that are none, copies that drift, ranks that are slow: found and named, on all ranks alike, with the fault injected for real."""

from __future__ import annotations

from unittest import mock

import promises
import pytest
import torch.distributed as dist
from dataset_factory import write_dataset
from training import SAMPLES, events, metrics, overrides, refused, train_here

from opensora_dist.train import step


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    path = tmp_path_factory.mktemp("guards") / "data"
    write_dataset(path, samples=SAMPLES)
    return path


def _nan_from(rank, first):
    """Rank ``rank`` has a loss that is not a number from a step on (the first is 1)."""
    real = step.micro_loss

    def micro_loss(*args, **kwargs):
        loss = real(*args, **kwargs)
        return loss * float("nan") if dist.get_rank() == rank and kwargs["step"] + 1 >= first else loss

    return mock.patch.object(step, "micro_loss", micro_loss)


def test_skipped_steps_in_a_row_end_the_run_on_all_ranks_naming_batches_and_the_rank(ranks, data, tmp_path, promise):
    args = overrides(data, tmp_path, "run.steps=20", "run.log_every=2", "resilience.max_skipped_steps=3")
    for said in ranks.run(refused, args, _nan_from, 1, 4, world=2):
        assert "3 steps in a row had gradients that are not finite (resilience.max_skipped_steps=3)" in said
        for line in metrics(tmp_path)[3:6]:
            assert f"step {line['step']}, batch {line['batch_digest']}: loss not finite on rank 1" in said
    assert [m["skipped"] for m in metrics(tmp_path)] == [False] * 3 + [True] * 3
    assert [e["ranks"] for e in events(tmp_path, "step_skipped")] == [[1]] * 3
    assert len(events(tmp_path, "not_finite")) == 1
    promise(promises.NONFINITE).measured(
        "ended at the log step after 3 skipped in a row; steps, batches and rank 1 named by both ranks"
    )


def test_a_bit_that_flips_in_one_of_four_copies_is_found_before_it_is_saved_and_its_rank_named(ranks, data, tmp_path, promise):
    args = overrides(data, tmp_path, "run.steps=9", "checkpoint.every_steps=3", "fault.flip_bit=2@step5")
    for said in ranks.run(refused, args, world=4):
        assert "copies that ranks hold alike differ after step 6 (they were alike after step 3)" in said
        assert "x_embedder.proj.weight: rank 2 differs from the other 3 of ranks [0, 1, 2, 3]" in said
    assert sorted(p.name for p in (tmp_path / "checkpoints").glob("step-*")) == ["step-00000003"]
    assert len(events(tmp_path, "replicas_differ")) == 1
    # The same command goes on from the last good one; the fault has had its turn.
    ranks.run(train_here, args, world=4)
    assert [e["step"] for e in events(tmp_path, "resume")] == [3]
    assert [m["step"] for m in metrics(tmp_path)] == list(range(1, 10))
    promise(promises.DRIFT).measured("1 bit of 1 of 4 copies: tensor and rank named before the next save")


@pytest.mark.parametrize("stage", [2, 3])
def test_a_bit_that_flips_in_a_shard_is_found_where_another_rank_holds_a_copy(ranks, data, tmp_path, promise, stage):
    args = overrides(data, tmp_path, "run.steps=9", "run.log_every=1", f"parallel.zero.stage={stage}", "parallel.dp_replicate=2")
    args += ["resilience.replica_check_every=2", "fault.flip_bit=3@step5"]
    for said in ranks.run(refused, args, world=4):
        assert "differ after step 6 (they were alike after step 4)" in said
        assert "ranks [1, 3] differ, and none is with a majority" in said and "[0, 2]" not in said
    promise(promises.DRIFT).measured(f"stage {stage}, 2 x 2 ranks: found within 2 steps")


def test_copies_are_compared_at_the_start_and_shards_without_a_copy_are_not(ranks, data, tmp_path):
    args = overrides(data, tmp_path, "run.steps=4", "parallel.zero.stage=3", "fault.flip_bit=1@step2")
    ranks.run(train_here, args, world=2)
    assert not events(tmp_path, "replicas_differ")


def test_a_slow_rank_is_named_with_what_it_is_slow_in(ranks, data, tmp_path, promise):
    args = overrides(data, tmp_path, "run.steps=30", "run.log_every=5", "model.width=64", "fault.slow_rank=1@x1.35")
    ranks.run(train_here, args, world=2)
    found = [e for e in events(tmp_path, "straggler") if e["what"] == "compute"]
    assert {e["rank"] for e in found} == {1} and all(e["ratio"] >= 1.2 and e["steps"] == 20 for e in found)
    promise(promises.STRAGGLER).measured(
        f"rank 1, slowed 1.35 times, named after 20 steps with {found[0]['ratio']:.2f}; a table of times at 1.19 names none, at 1.21 one"
    )


def test_faults_are_loud_and_in_the_event_log(ranks, data, tmp_path):
    args = overrides(data, tmp_path, "run.steps=4", "fault.nan_loss=1@step3", "fault.slow_rank=0@x1.1")
    ranks.run(train_here, args, world=2)
    assert [(e["fault"], e["asked"]) for e in events(tmp_path, "fault_injected")] == [
        ("nan_loss", "1@step3"),
        ("slow_rank", "0@x1.1"),
    ]
    assert [m["skipped"] for m in metrics(tmp_path)] == [False, False, True, False]
    assert [p.name for p in (tmp_path / "faults").iterdir()] == ["nan_loss-rank-1.json"]
