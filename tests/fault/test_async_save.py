"""Saves beside training: what they hold, what they cost, and what happens where they fail."""

from __future__ import annotations

import errno
import json
import threading
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

import promises
import pytest
import torch.distributed as dist
from dataset_factory import write_dataset
from training import SAMPLES, assert_same_tensors, curve, events, overrides, refused, train_here

from opensora_dist.checkpoint.commit import step_name
from opensora_dist.checkpoint.store import read_tensors
from opensora_dist.core.errors import DataError
from opensora_dist.train import loop, saving

STEPS = 6
STALLS = Path(__file__).parents[2] / "benchmarks/results/cpu/checkpoint.json"


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    path = tmp_path_factory.mktemp("async") / "data"
    write_dataset(path, samples=SAMPLES)
    return path


def _args(data, run_dir, *more):
    return overrides(data, run_dir, f"run.steps={STEPS}", "parallel.zero.stage=3", "checkpoint.every_steps=3", *more)


def _tensors(run_dir, step):
    return read_tensors(run_dir / "checkpoints" / step_name(step) / "tensors")


@contextmanager
def _writes_wait_for_step(step):
    """The first write goes on only once training has done ``step`` steps more than it holds."""
    real_write, real_step, reached = saving.save_tensors, loop.train_step, threading.Event()

    def save_tensors(*args, **kwargs):
        assert reached.wait(60)
        real_write(*args, **kwargs)

    def train_step(backend, data, **kwargs):
        result = real_step(backend, data, **kwargs)
        if data.step + 1 >= step:
            reached.set()
        return result

    with mock.patch.object(saving, "save_tensors", save_tensors), mock.patch.object(loop, "train_step", train_step):
        yield


@pytest.mark.parametrize("stage", [0, 1, 3])
def test_a_checkpoint_holds_the_state_of_its_step_however_far_training_went(ranks, data, tmp_path, stage):
    more = f"parallel.zero.stage={stage}"
    ranks.run(train_here, _args(data, tmp_path / "sync", "checkpoint.asynchronous=false", more), world=2)
    ranks.run(train_here, _args(data, tmp_path / "async", more), _writes_wait_for_step, 5, world=2)
    for step in (3, STEPS):
        assert_same_tensors(_tensors(tmp_path / "async", step), _tensors(tmp_path / "sync", step))
    assert curve(tmp_path / "async") == curve(tmp_path / "sync")
    first, last = events(tmp_path / "async", "checkpoint")
    assert (first["step"], last["step"]) == (3, STEPS)
    assert first["stall_s"] < first["seconds"]
    for event in events(tmp_path / "sync", "checkpoint"):
        assert event["stall_s"] == pytest.approx(event["seconds"], rel=0.2, abs=0.05)


@contextmanager
def _full_disk(rank, steps):
    """Writes of these steps fail on one rank; the others leave out the writer's collectives, in which they would wait for it."""
    real = saving.save_tensors

    def save_tensors(tensors, folder, **kwargs):
        if not any(folder.parent.name.startswith(step_name(step)) for step in steps):
            real(tensors, folder, **kwargs)
        elif dist.get_rank() == rank:
            raise OSError(errno.ENOSPC, "No space left on device")

    with mock.patch.object(saving, "save_tensors", save_tensors):
        yield


def test_a_failed_background_save_is_said_and_the_run_goes_on(ranks, data, tmp_path):
    ranks.run(train_here, _args(data, tmp_path, "checkpoint.every_steps=2"), _full_disk, 1, (2, 4), world=2)
    failed = events(tmp_path, "checkpoint_failed")
    assert [e["step"] for e in failed] == [2, 4]
    assert all("rank 1: OSError" in e["error"] and "No space left" in e["error"] for e in failed)
    assert [e["step"] for e in events(tmp_path, "checkpoint")] == [STEPS]
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["latest", step_name(STEPS)]


def test_a_last_save_that_failed_beside_training_is_tried_again_and_then_ends_the_run(ranks, data, tmp_path):
    for said in ranks.run(refused, _args(data, tmp_path), _full_disk, 0, (STEPS,), world=2):
        assert "rank 0: OSError" in said and "older checkpoints are untouched" in said
    assert [e["step"] for e in events(tmp_path, "checkpoint_failed")] == [STEPS, STEPS]
    assert [p.name for p in (tmp_path / "checkpoints").glob("step-*")] == [step_name(3)]


@contextmanager
def _error_at(step):
    """All ranks meet an error of their own in a step, while the write of the last checkpoint has not begun."""
    real_write, real_step, raised = saving.save_tensors, loop.train_step, threading.Event()

    def save_tensors(*args, **kwargs):
        assert raised.wait(60)
        real_write(*args, **kwargs)

    def train_step(backend, data, **kwargs):
        if data.step == step:
            raised.set()
            raise DataError("the data set is gone")
        return real_step(backend, data, **kwargs)

    with mock.patch.object(saving, "save_tensors", save_tensors), mock.patch.object(loop, "train_step", train_step):
        yield


def test_an_error_of_the_run_leaves_a_write_under_way_the_time_to_end(ranks, data, tmp_path):
    assert all("the data set is gone" in said for said in ranks.run(refused, _args(data, tmp_path), _error_at, 4, world=2))
    assert [e["step"] for e in events(tmp_path, "checkpoint")] == [3]
    assert (tmp_path / "checkpoints" / step_name(3) / "MANIFEST.json").is_file()


def test_the_measured_stall_of_a_save_beside_training_is_at_most_a_tenth_of_a_save_that_training_waits_for(promise):
    found = json.loads(STALLS.read_text())
    assert found["bar"] <= 0.10 and found["rows"]
    for row in found["rows"].values():
        ratio, stall = row["stall_ratio"]["median"], {how: s["median"] for how, s in row["stall_s"].items()}
        assert ratio <= found["bar"], row
        assert stall["asynchronous"] <= 5.0, row
        promise(promises.STALL).measured(
            f"{row['parameters'] / 1e6:.0f} M parameters, {row['checkpoint_bytes'] / 1e6:.0f} MB, one CPU process: "
            f"{stall['asynchronous']:.2f} s, {ratio:.3f} of the {stall['synchronous']:.2f} s of a synchronous save"
        )
