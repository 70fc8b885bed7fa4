"""What goes wrong in a run: it goes on where it can, says clearly why where it can't, and never takes a part for the whole."""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
import time
from contextlib import contextmanager
from itertools import cycle, product
from pathlib import Path
from unittest import mock

import promises
import pytest
import torch
import torch.distributed as dist
from cli_process import cli, running
from dataset_factory import write_dataset
from training import (
    SAMPLES,
    assert_same_tensors,
    curve,
    events,
    losses,
    metrics,
    nan_at,
    overrides,
    refused,
    tensors,
    train_here,
)

from opensora_dist.checkpoint.store import read_tensors
from opensora_dist.core.io import read_json
from opensora_dist.train import loop


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    path = tmp_path_factory.mktemp("faults") / "data"
    write_dataset(path, samples=SAMPLES)
    return path


@pytest.mark.parametrize("stage", [0, pytest.param(2, marks=pytest.mark.slow), 3])
def test_a_loss_that_is_no_number_on_one_rank_skips_the_step_on_all(ranks, data, stage, tmp_path, promise):
    args = overrides(data, tmp_path, f"parallel.zero.stage={stage}", "checkpoint.every_steps=1", "checkpoint.keep_last=9")
    ranks.run(train_here, [*args, "run.steps=6"], nan_at, 1, 3, world=2)
    assert [m["skipped"] for m in metrics(tmp_path)] == [False] * 3 + [True] + [False] * 2
    bad = metrics(tmp_path)[3]
    assert bad["loss"] is None and bad["grad_norm"] is None
    assert [(e["step"], e["batch_digest"]) for e in events(tmp_path, "step_skipped")] == [(4, bad["batch_digest"])]
    before, after, later = (read_tensors(tmp_path / "checkpoints" / f"step-{s:08d}" / "tensors") for s in (3, 4, 6))
    assert_same_tensors(before, after)
    assert all(torch.isfinite(t).all() for t in later.values())
    assert any(not torch.equal(later[n], after[n]) for n in later if n.startswith("exp_avg."))
    taken = [read_json(tmp_path / "checkpoints" / f"step-{s:08d}" / "trainer.json")["optimizer_steps"] for s in (3, 4, 6)]
    assert taken == [3, 3, 5]
    promise(promises.NONFINITE).measured(
        f"stage {stage}: skipped on both ranks, weights, moments and average bitwise as before, batch named"
    )


def test_a_resume_after_a_skipped_step_is_bitwise_the_run_that_went_on(ranks, data, tmp_path):
    for name, parts in (("whole", (6,)), ("parts", (4, 6))):
        for steps in parts:
            ranks.run(train_here, overrides(data, tmp_path / name, f"run.steps={steps}"), nan_at, 0, 2, world=2)
    assert curve(tmp_path / "parts") == curve(tmp_path / "whole")
    assert_same_tensors(tensors(tmp_path / "parts"), tensors(tmp_path / "whole"))


def _flip_a_bit(folder: Path) -> None:
    victim = max((folder / "tensors").iterdir(), key=lambda p: p.stat().st_size)
    content = bytearray(victim.read_bytes())
    content[-5] ^= 1
    victim.write_bytes(content)


def test_a_damaged_newest_checkpoint_is_passed_over_for_the_one_before_and_said(ranks, data, tmp_path):
    args = overrides(data, tmp_path, "checkpoint.every_steps=2")
    ranks.run(train_here, [*args, "run.steps=6"], world=2)
    whole, newest = curve(tmp_path), tensors(tmp_path)
    _flip_a_bit(tmp_path / "checkpoints" / "step-00000006")
    ranks.run(train_here, [*args, "run.steps=6"], world=2)
    assert [e["path"] for e in events(tmp_path, "checkpoint_rejected")] == ["step-00000006"]
    assert "content hash" in events(tmp_path, "checkpoint_rejected")[0]["problems"][0]
    assert [e["step"] for e in events(tmp_path, "resume")] == [4]
    assert curve(tmp_path) == whole
    assert_same_tensors(tensors(tmp_path), newest)


KINDS = {
    "tensors": "tensors/shard-00002-model-00001-of-00001.safetensors",
    "manifest": "MANIFEST.json",
    "trainer state": "trainer.json",
    "config": "config.yaml",
    "data set": "dataset.json",
}


def _flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


DAMAGES = {
    "bit flip": _flip,
    "truncation": lambda file: file.write_bytes(file.read_bytes()[:-7]),
    "missing": lambda file: file.unlink(),
    "extra": lambda file: shutil.copy(file, file.with_name(f"more-{file.name}")),
}
# Each kind and each damage at least once.
QUICK = list(zip(KINDS, cycle(DAMAGES)))


@pytest.fixture(scope="module")
def saved(ranks, data, tmp_path_factory):
    """A run with checkpoints of steps 2 and 3."""
    folder = tmp_path_factory.mktemp("saved")
    ranks.run(train_here, overrides(data, folder, "run.steps=3", *TWICE), world=2)
    return folder


TWICE = ("checkpoint.every_steps=2", "parallel.zero.stage=3", "run.log_every=1")


@pytest.mark.parametrize(
    "kind, damage",
    [pytest.param(*case, marks=[] if case in QUICK else pytest.mark.slow) for case in product(KINDS, DAMAGES)],
)
def test_damage_to_any_kind_of_file_is_found_before_loading_and_the_previous_checkpoint_is_used_and_said(
    ranks, data, saved, tmp_path, kind, damage, promise
):
    run_dir = tmp_path / "run"
    shutil.copytree(saved, run_dir)
    file = run_dir / "checkpoints" / "step-00000003" / KINDS[kind]
    DAMAGES[damage](file)
    ranks.run(train_here, overrides(data, run_dir, "run.steps=3", *TWICE), world=2)
    (rejected,) = events(run_dir, "checkpoint_rejected")
    assert rejected["path"] == "step-00000003"
    named = file.name if damage != "extra" else f"more-{file.name}"
    assert any(named in problem for problem in rejected["problems"]), rejected
    assert [e["step"] for e in events(run_dir, "resume")] == [2]
    assert curve(run_dir) == curve(saved)
    assert_same_tensors(tensors(run_dir), tensors(saved))
    promise(promises.DAMAGE).measured(
        "in each kind of file: named before loading, the one before used, metrics and tensors of the run that was not damaged"
    )


def test_where_every_checkpoint_is_damaged_the_run_does_not_start_over(ranks, data, tmp_path):
    ranks.run(train_here, overrides(data, tmp_path, "run.steps=2"), world=1)
    before = curve(tmp_path)
    _flip_a_bit(tmp_path / "checkpoints" / "step-00000002")
    assert "no checkpoint verifies" in ranks.run(refused, overrides(data, tmp_path, "run.steps=4"), world=1)[0]
    assert curve(tmp_path) == before


def test_a_resume_with_another_model_seed_batch_and_data_set_is_refused_naming_each(ranks, data, tmp_path):
    ranks.run(train_here, overrides(data, tmp_path / "run", "run.steps=2"), world=2)
    before = curve(tmp_path / "run")
    write_dataset(tmp_path / "other", samples=SAMPLES, seed=1)
    changed = overrides(
        tmp_path / "other", tmp_path / "run", "run.steps=4", "model.width=24", "run.seed=5", "data.global_batch=8"
    )
    for said in ranks.run(refused, changed, world=2):  # both ranks say so, none hangs
        for rule in ("model.width was 16, now 24", "run.seed was 0, now 5", "data.global_batch was 4, now 8", "another data set"):
            assert rule in said, rule
    assert curve(tmp_path / "run") == before
    assert "width: 16" in (tmp_path / "run" / "config.yaml").read_text()


def test_resume_never_refuses_a_used_run_directory(ranks, data, tmp_path):
    ranks.run(train_here, overrides(data, tmp_path, "run.steps=2", "checkpoint.resume=never"), world=1)
    before = curve(tmp_path)
    assert (
        "checkpoint.resume=never, but"
        in ranks.run(refused, overrides(data, tmp_path, "run.steps=4", "checkpoint.resume=never"), world=1)[0]
    )
    assert curve(tmp_path) == before


def test_resume_never_refuses_the_metrics_of_a_run_that_saved_nothing(ranks, data, tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 1.0}\n')
    args = overrides(data, tmp_path, "run.steps=2", "checkpoint.resume=never")
    assert all("checkpoint.resume=never, but" in said for said in ranks.run(refused, args, world=2))
    assert losses(tmp_path) == [1.0]


def test_a_run_directory_in_use_is_refused_and_its_files_are_left_alone(data, tmp_path):
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs" / "rank-1.log").write_text("of the run that is under way\n")
    with open(tmp_path / ".lock", "w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        ended = cli("train", *overrides(data, tmp_path, "run.steps=2", "parallel.nproc=2"))
    assert ended.code == 2, ended.err
    assert "is in use by another process" in ended.err
    assert "Traceback" not in ended.err
    assert (tmp_path / "logs" / "rank-1.log").read_text().startswith("of the run that is under way\n")
    assert sorted(p.name for p in tmp_path.iterdir()) == [".lock", "logs"]


@pytest.fixture
def small_disk(tmp_path):
    """A file system of its own that a few checkpoints fill."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(folder)]
    if os.geteuid() != 0 or subprocess.run(mount, check=False, capture_output=True).returncode:
        pytest.skip(
            "a small tmpfs can only be mounted by root with the right to mount: run this file as root, in a container with CAP_SYS_ADMIN"
        )
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def _fill(folder: Path, *, leave: int) -> Path:
    """Takes what is free on the file system of ``folder``, but for ``leave`` bytes."""
    stat = os.statvfs(folder)
    ballast = folder / "ballast"
    ballast.write_bytes(bytes(stat.f_bavail * stat.f_frsize - leave))
    return ballast


def test_a_disk_that_fills_up_costs_checkpoints_and_no_older_one(ranks, data, small_disk, promise):
    run_dir = small_disk / "run"
    args = overrides(data, run_dir, "checkpoint.every_steps=2", "checkpoint.keep_last=9")
    ranks.run(train_here, [*args, "run.steps=2"], world=2)
    kept = tensors(run_dir)
    # Room for metrics and events, none for a checkpoint: the saves in the middle are said and passed over, the last one ends it.
    ballast = _fill(small_disk, leave=96 << 10)
    for said in ranks.run(refused, [*args, "run.steps=7"], world=2):
        assert "No space left on device" in said and "older checkpoints are untouched" in said
    assert [m["step"] for m in metrics(run_dir)] == list(range(1, 8))
    assert [e["step"] for e in events(run_dir, "checkpoint_failed")] == [4, 6, 7]
    assert [p.name for p in (run_dir / "checkpoints").iterdir() if p.is_dir()] == ["step-00000002"]
    assert_same_tensors(tensors(run_dir), kept)
    ballast.unlink()
    ranks.run(train_here, [*args, "run.steps=7"], world=2)
    assert [m["step"] for m in metrics(run_dir)] == list(range(1, 8))
    assert tensors(run_dir).keys() == kept.keys()
    promise(promises.DISK_FULL).measured(
        "trained through 2 failed saves, each an event; the older checkpoint bitwise; resumed with room"
    )


@contextmanager
def _no_byte_left(folder, first, last):
    """From the start of one step to that of another, on rank 0's word, which has the run's files."""
    real, ballast = loop.train_step, folder / "ballast"

    def train_step(backend, data, **kwargs):
        if dist.get_rank() == 0 and data.step == first:
            _fill(folder, leave=0)
        if dist.get_rank() == 0 and data.step == last:
            ballast.unlink()
        return real(backend, data, **kwargs)

    with mock.patch.object(loop, "train_step", train_step):
        yield


def test_a_disk_without_a_single_byte_left_in_the_middle_costs_checkpoints_and_no_line(ranks, data, small_disk, promise):
    run_dir = small_disk / "run"
    args = overrides(data, run_dir, "checkpoint.every_steps=2", "checkpoint.asynchronous=false", "run.log_every=1", "run.steps=9")
    ranks.run(train_here, args, _no_byte_left, small_disk, 3, 7, world=2)
    assert [e["step"] for e in events(run_dir, "checkpoint_failed")] == [4, 6]
    assert [e["step"] for e in events(run_dir, "checkpoint")] == [2, 8, 9]
    assert [m["step"] for m in metrics(run_dir)] == list(range(1, 10))
    promise(promises.DISK_FULL).measured("0 bytes left for 4 steps: 2 saves failed, no line of metrics and events lost")


def test_a_disk_without_a_single_byte_left_ends_the_run_with_a_clear_error(ranks, data, small_disk):
    run_dir = small_disk / "run"
    ranks.run(train_here, overrides(data, run_dir, "run.steps=2"), world=1)
    kept = tensors(run_dir)
    _fill(small_disk, leave=0)
    ended = cli("train", *overrides(data, run_dir, "run.steps=4"))
    assert ended.code == 1
    assert "No space left on device" in ended.err and "Traceback" not in ended.err
    assert_same_tensors(tensors(run_dir), kept)


@pytest.mark.slow  # the drills do it quicker
def test_a_rank_killed_hard_ends_the_run_leaves_no_process_and_the_run_goes_on_to_its_end(ranks, data, tmp_path):
    args = overrides(data, tmp_path / "run", "run.steps=40", "run.log_every=1", "checkpoint.every_steps=5")
    args += ["parallel.nproc=2", "parallel.sp.degree=2"]
    with running("train", *args) as command:
        command.wait_for(lambda: len(metrics(tmp_path / "run")) >= 7)
        pids = command.ranks()
        assert sorted(pids) == [0, 1]
        os.kill(pids[1], 9)
        began = time.monotonic()
        ended = command.end(limit_s=60)
        assert time.monotonic() - began < 60
    assert ended.code == 1, ended.err
    assert "rank 1 was ended by SIGKILL" in ended.err
    assert "error: rank 0 lost contact" in ended.err
    assert not [pid for pid in pids.values() if Path(f"/proc/{pid}").exists()]
    assert 7 <= len(metrics(tmp_path / "run")) < 40
    ranks.run(train_here, args, world=2)
    assert [m["step"] for m in metrics(tmp_path / "run")] == list(range(1, 41))
    assert events(tmp_path / "run", "resume")[0]["step"] % 5 == 0
