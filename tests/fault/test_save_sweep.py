"""Killed at every phase of a save: there is always a verified checkpoint, and the run that goes on is the run never stopped."""

from __future__ import annotations

import signal
from itertools import cycle, product

import promises
import pytest
from dataset_factory import write_dataset
from forked_ranks import Fault, run
from training import SAMPLES, assert_same_tensors, curve, events, metrics, overrides, tensors, train_here

from opensora_dist.checkpoint.commit import SAVE_PHASES, find_resumable, step_name
from opensora_dist.checkpoint.manifest import verify

STEPS, EVERY = 6, 2
STRUCK = 4
"""The step whose save is struck: the second one, so that there is an older checkpoint, which it prunes."""

VICTIMS = {"rank 0": 0, "rank 1": 1, "all ranks": None}
ALL = list(product(SAVE_PHASES, VICTIMS, ("asynchronous", "synchronous")))
# Each victim in turn, at every phase but those that find on the disk what the next one finds as well.
ALIKE = ("list", "flush")
QUICK = [(phase, victim, "asynchronous") for phase, victim in zip([p for p in SAVE_PHASES if p not in ALIKE], cycle(VICTIMS))]
CASES = [pytest.param(*case, marks=[] if case in QUICK else pytest.mark.slow, id="-".join(case)) for case in ALL]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    path = tmp_path_factory.mktemp("sweep") / "data"
    write_dataset(path, samples=SAMPLES)
    return path


@pytest.fixture(scope="module")
def whole(ranks, data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    ranks.run(train_here, _args(data, folder), world=2)
    return folder


def _args(data, folder, *more):
    saves = (f"checkpoint.every_steps={EVERY}", "checkpoint.keep_last=1", "parallel.timeout_s=30")
    return overrides(data, folder, f"run.steps={STEPS}", "run.log_every=1", "parallel.zero.stage=3", *saves, *more)


@pytest.mark.parametrize("phase, victim, how", CASES)
def test_killed_at_any_phase_of_a_save_the_run_resumes_from_a_verified_checkpoint(
    ranks, data, whole, tmp_path, phase, victim, how, promise
):
    args = _args(data, tmp_path / "run", f"checkpoint.asynchronous={how == 'asynchronous'}")
    fault = Fault(phase, signal.SIGKILL, rank=VICTIMS[victim], step=STRUCK - 1)
    ended = run(args, fault, world=2, logs=tmp_path / "logs", limit_s=20)
    assert {rank: e.code for rank, e in ended.items() if fault.hits(rank)} == {
        rank: -signal.SIGKILL for rank in ended if fault.hits(rank)
    }
    # The rank that was left ended by itself, within the limit.
    assert all(e.code == 1 for rank, e in ended.items() if not fault.hits(rank)), {r: e.said for r, e in ended.items()}

    root = tmp_path / "run" / "checkpoints"
    found = find_resumable(root)
    assert found.path is not None and not found.rejected
    assert found.path.name in (step_name(EVERY), step_name(STRUCK))
    # Nothing that looks like a checkpoint is less than one.
    assert all(verify(folder) == [] for folder in root.glob("step-*") if ".partial-" not in folder.name)

    ranks.run(train_here, args, world=2)
    (resume,) = events(tmp_path / "run", "resume")
    assert resume["path"] == found.path.name
    assert [m["step"] for m in metrics(tmp_path / "run")] == list(range(1, STEPS + 1))
    assert curve(tmp_path / "run") == curve(whole)
    assert_same_tensors(tensors(tmp_path / "run"), tensors(whole))
    assert sorted(p.name for p in root.iterdir()) == ["latest", step_name(STEPS)]
    promise(promises.KILL_IN_SAVE).measured(
        "one rank or all killed at each phase: resumed from a verified checkpoint, metrics and tensors of the run never killed"
    )


def test_the_quick_cases_reach_every_phase_and_every_victim():
    assert {phase for phase, _, _ in QUICK} | set(ALIKE) == set(SAVE_PHASES)
    assert {victim for _, victim, _ in QUICK} == set(VICTIMS)
