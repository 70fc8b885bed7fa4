"""Whole commands under their launchers meet a fault that their config asks for, and go on: no work lost beyond the promise."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import promises
import pytest
from cli_process import cli, running
from dataset_factory import write_dataset
from forked_ranks import Fault, run
from training import SAMPLES, events, metrics, overrides

from opensora_dist.resilience.endings import ENDINGS_VARIABLE, Ending, read_endings

TORCHRUN = ("-m", "torch.distributed.run", "--nproc-per-node", "2", "--rdzv-backend", "c10d", "--rdzv-endpoint", "127.0.0.1:0")
LIMIT_S = 280.0


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    path = tmp_path_factory.mktemp("drills") / "data"
    write_dataset(path, samples=SAMPLES)
    return path


def _starts(run_dir: Path) -> list[int]:
    """The steps that starts went on from, oldest first."""
    path = run_dir / "restarts.jsonl"
    return [json.loads(line)["step"] for line in path.read_text().splitlines()] if path.exists() else []


def _trains_again(run_dir: Path, *, starts: int) -> bool:
    went_on = _starts(run_dir)
    return len(went_on) == starts and bool(steps := metrics(run_dir)) and steps[-1]["step"] > went_on[-1]


def _since(run_dir: Path, fault: str) -> float:
    """Seconds since a fault happened."""
    return time.time() - (run_dir / "faults" / f"{fault}.json").stat().st_mtime


def test_under_torchrun_a_run_goes_on_after_a_kill_and_after_a_hang(data, tmp_path, promise, monkeypatch):
    """One launch, three starts: rank 0 is killed in step 18, and rank 1 hangs in step 27."""
    run_dir, every = tmp_path / "run", 5
    monkeypatch.setenv(ENDINGS_VARIABLE, str(tmp_path / "endings"))
    args = overrides(data, run_dir, "run.steps=30", "run.log_every=1", f"checkpoint.every_steps={every}")
    args.append("checkpoint.asynchronous=false")
    args += ["resilience.watchdog_s=5", "fault.kill_rank=0@step18", "fault.hang_rank=1@step27"]
    with running("train", *args, launcher=(*TORCHRUN, "--max-restarts", "2")) as command:
        command.wait_for(lambda: _trains_again(run_dir, starts=2), limit_s=LIMIT_S)
        killed_s = _since(run_dir, "kill_rank-rank-0")
        command.wait_for(lambda: (run_dir / "logs" / "hang.json").exists(), limit_s=LIMIT_S)
        found_s = _since(run_dir, "hang_rank-rank-1")
        command.wait_for(lambda: _trains_again(run_dir, starts=3), limit_s=LIMIT_S)
        hung_s = _since(run_dir, "hang_rank-rank-1")
        ended = command.end(limit_s=LIMIT_S)
    assert ended.code == 0, ended.err
    assert {e.ending for e in read_endings(tmp_path / "endings", world=2).values()} == {Ending.DONE}, "the last start counts"
    assert _starts(run_dir) == [0, 15, 25], "at most one interval is done again"
    assert [m["step"] for m in metrics(run_dir)] == list(range(1, 31))
    assert killed_s < 180
    promise(promises.KILL).measured(
        f"training again {killed_s:.1f} s after the kill; 2 steps done again, of an interval of {every}, with "
        "checkpoint.asynchronous=false; with asynchronous saves (not in this drill) the interval of a write under way is lost, too"
    )
    hang = json.loads((run_dir / "logs" / "hang.json").read_text())
    assert hang["ranks"] == [1] and len(events(run_dir, "hang")) == 1
    assert "rank 1 is held up in _strike (resilience/faults.py:" in hang["text"] and "step 27" in hang["text"]
    assert "while rank 0 waits in all_reduce of gradients" in hang["text"] and hang["text"] in ended.err
    assert found_s < 90
    for rank in range(2):
        stacks = (run_dir / "logs" / f"stacks-rank-{rank}.txt").read_text()
        assert stacks.startswith(f"rank {rank}, step 27, phase step") and "train_step" in stacks
    said = f"found {found_s:.1f} s after it began, with watchdog_s=5; rank 1, its line and rank 0's wait named; training again after {hung_s:.1f} s"
    promise(promises.HANG).measured(said)


def test_a_rank_that_is_stopped_is_named_by_the_other_in_the_collective_that_it_waits_in(data, tmp_path, promise):
    """The main rank at that, which writes events otherwise."""
    fault = Fault("clip", signal.SIGSTOP, rank=0)
    args = overrides(
        data, tmp_path / "run", "run.steps=50", "run.log_every=1", "parallel.zero.stage=3", "resilience.watchdog_s=4"
    )
    ended = run(args, fault, world=2, logs=tmp_path / "logs", limit_s=90)[1]
    assert ended.code == 1 and ended.noted is Ending.HANG, ended.said
    assert "rank 0 does not answer: stopped, or its machine is gone, while rank 1 waits in all_reduce for " in ended.said
    hang = json.loads((tmp_path / "run" / "logs" / "hang.json").read_text())
    assert hang["ranks"] == [0] and [p["what"] for p in hang["positions"]] == ["all_reduce"]
    assert [e["ranks"] for e in events(tmp_path / "run", "hang")] == [[0]]
    assert "all_reduce" in (tmp_path / "run" / "logs" / "stacks-rank-1.txt").read_text()
    promise(promises.HANG).measured(
        f"rank 0 stopped by SIGSTOP: named, with rank 1's all_reduce, in {ended.after_s:.1f} s, with watchdog_s=4"
    )


def test_two_signals_to_one_rank_save_and_stop_all_with_code_0(data, tmp_path, promise, monkeypatch):
    run_dir = tmp_path / "run"
    monkeypatch.setenv(ENDINGS_VARIABLE, str(tmp_path / "endings"))
    args = overrides(data, run_dir, "run.steps=4000", "run.log_every=1", "parallel.nproc=2", "parallel.max_restarts=1")
    with running("train", *args) as command:
        command.wait_for(lambda: len(metrics(run_dir)) >= 3 if (run_dir / "metrics.jsonl").exists() else False)
        began = time.monotonic()
        for signum in (signal.SIGUSR1, signal.SIGTERM):
            os.kill(command.ranks()[1], signum)
        ended = command.end(limit_s=LIMIT_S)
        seconds = time.monotonic() - began
    assert ended.code == 0, ended.err
    step = json.loads((run_dir / "STOPPED").read_text())["step"]
    assert metrics(run_dir)[-1]["step"] == step and (run_dir / "checkpoints" / f"step-{step:08d}").is_dir()
    assert _starts(run_dir) == [0], "a stop on request is no failure"
    noted = read_endings(tmp_path / "endings", world=2)
    assert [e.ending for e in noted.values()] == [Ending.STOPPED] * 2 and [e.signal for e in noted.values()] == [None, "SIGUSR1"]
    promise(promises.SIGNAL).measured(f"SIGUSR1, then SIGTERM to rank 1: saved, marker, code 0 after {seconds:.1f} s")


_STARTING = """
import sys
from datetime import timedelta
from pathlib import Path
import torch.distributed as dist
from opensora_dist.resilience.startup import StopWhileStarting
with StopWhileStarting(Path(sys.argv[1]), saved_step=lambda: 7, launched=True):
    Path(sys.argv[1], "ready").touch()
    dist.TCPStore("127.0.0.1", 0, 2, is_master=True, wait_for_workers=True, timeout=timedelta(seconds=60))
"""


@pytest.mark.parametrize("signum", [signal.SIGUSR1, signal.SIGTERM])
def test_a_signal_while_a_rank_waits_for_others_to_start_ends_it_with_what_is_true(tmp_path, promise, signum):
    """A launcher sends SIGTERM where another rank has failed, too."""
    noting = {**os.environ, ENDINGS_VARIABLE: str(tmp_path / "endings"), "RANK": "0"}
    command = [sys.executable, "-c", _STARTING, str(tmp_path)]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=noting) as process:
        try:
            while not (tmp_path / "ready").exists():
                assert process.poll() is None
                time.sleep(0.02)
            process.send_signal(signum)
            _, said = process.communicate(timeout=60)
        finally:
            process.kill()
    assert f"ended by {signum.name} before the first step" in said and "goes on from step 7" in said
    assert process.returncode == (0 if signum == signal.SIGUSR1 else 1), said
    assert (tmp_path / "STOPPED").exists() == (signum == signal.SIGUSR1)
    noted = read_endings(tmp_path / "endings", world=1)[0]
    assert noted.ending is (Ending.STOPPED if signum == signal.SIGUSR1 else Ending.LOST), "torchrun sends SIGTERM of itself"
    if signum == signal.SIGUSR1:
        assert json.loads((tmp_path / "STOPPED").read_text()) == {"signal": "SIGUSR1", "step": 7}
        promise(promises.SIGNAL).measured(
            "SIGUSR1 before the first step: marker with the step of the last checkpoint, code 0, at once"
        )


_TWICE = """
import os, signal, sys, time
from pathlib import Path
import torch, torch.distributed as dist
from opensora_dist.parallel.mesh import process_group
rank, counts = os.environ["RANK"], Path(sys.argv[1], "counts-" + os.environ["RANK"])
with process_group(torch.device("cpu"), timeout_s=60):
    with open(counts, "a") as handle:
        handle.write(os.environ["TORCHELASTIC_RESTART_COUNT"])
    if len(counts.read_text()) == 1:
        if rank == "1":
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(60)
    total = torch.ones(1)
    dist.all_reduce(total)
    Path(sys.argv[1], "sum-" + rank).write_text(str(total.item()))
"""


@pytest.mark.slow
def test_machines_whose_agents_count_restarts_apart_meet_again(tmp_path):
    """One agent's rank is killed; the other agent restarts its own for the new round, which it doesn't count."""
    script = tmp_path / "twice.py"
    script.write_text(_TWICE)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "1", "--max-restarts", "2"]
    command += ["--rdzv-backend", "c10d", "--rdzv-endpoint", f"127.0.0.1:{port}", "--rdzv-id", "two", "--local-addr", "127.0.0.1"]
    command += ["--monitor-interval", "0.2", str(script), str(tmp_path)]
    env = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    agents = [subprocess.Popen(command, env=env, stderr=subprocess.PIPE, text=True, start_new_session=True) for _ in range(2)]
    try:
        said = [agent.communicate(timeout=120)[1] for agent in agents]
    finally:
        for agent in agents:
            if agent.poll() is None:
                os.killpg(agent.pid, signal.SIGTERM)
                agent.wait()
    assert [agent.returncode for agent in agents] == [0, 0], said
    assert sorted((tmp_path / f"counts-{rank}").read_text() for rank in range(2)) == ["00", "01"]
    assert [(tmp_path / f"sum-{rank}").read_text() for rank in range(2)] == ["2.0", "2.0"]


@pytest.mark.slow
def test_under_torchrun_a_run_that_fails_at_the_same_step_is_not_started_for_ever(data, tmp_path):
    args = overrides(data, tmp_path / "run", "run.steps=30", "run.log_every=1", "optim.lr=1e30", "resilience.max_skipped_steps=1")
    ended = cli("train", *args, launcher=(*TORCHRUN, "--max-restarts", "20"), limit_s=LIMIT_S)
    assert ended.code == 1
    assert _starts(tmp_path / "run") == [0, 0]
    assert "two starts in a row failed after going on from step 0, so another is of no use" in ended.err
