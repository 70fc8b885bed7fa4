"""launch/torchrun.sh on two hosts, which are modelled on this machine: trained, stopped, killed and started again, for real.

`make test-hosts` runs these, as root.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import ExitStack, contextmanager
from pathlib import Path
from threading import Event

import pytest
from training import curve, metrics, overrides

ROOT = Path(__file__).parents[2]
SCRIPT = str(ROOT / "launch/torchrun.sh")
NAMES = ("node1", "node2")
LAYOUT = ["parallel.sp.degree=2", "run.log_every=1", "parallel.timeout_s=60"]
LIMIT_S = 150.0


class Launched:
    """The script on one host."""

    def __init__(self, command: list[str], said: Path) -> None:
        env = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
        env |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "PYTHON": sys.executable}
        env["RES_OPTIONS"] = "timeout:1 attempts:1"  # torch asks for the names of addresses, and no name server is in reach
        self._said = said
        with open(said, "w") as out:
            self.process = subprocess.Popen(command, stdout=out, stderr=out, stdin=subprocess.DEVNULL, env=env)

    @property
    def said(self) -> str:
        return self._said.read_text()

    def end(self, *, limit_s: float = LIMIT_S) -> int:
        try:
            return self.process.wait(limit_s)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"not ended within {limit_s} s\n{self.said}") from None

    def torchrun(self) -> int:
        """Its process id: a child of the script whose command says so; 0 before it is there."""
        return next((pid for pid, command in _children(self.process.pid) if "torch.distributed.run" in command), 0)

    def ranks(self) -> list[int]:
        torchrun = self.torchrun()
        return [pid for pid, command in _children(torchrun) if "opensora_dist" in command] if torchrun else []


def _children(parent: int) -> list[tuple[int, str]]:
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if int((folder / "stat").read_text().rpartition(")")[2].split()[1]) == parent:
                found.append((int(folder.name), (folder / "cmdline").read_text()))
        except OSError:  # it ended meanwhile
            continue
    return found


def script(rank: int, *options: str, args: list[str], head: str = "node1") -> list[str]:
    """Its command line on one of two hosts."""
    return [SCRIPT, "--nnodes", "2", "--nproc", "2", "--head", head, "--node-rank", str(rank), *options, "train", *args]


@contextmanager
def launched(hosts, *options, args, logs, head=None):
    """The script on both hosts, with what each of them needs; gone with all it started when the block is left."""
    with ExitStack() as stack:
        runs = []
        for rank, host in enumerate(hosts.values()):
            stack.callback(hosts.kill, host.name)
            command = host.command(script(rank, *options, args=args, head=head or "node1"))
            runs.append(Launched(command, logs / f"{host.name}.log"))
            stack.callback(runs[-1].process.wait)
            stack.callback(runs[-1].process.kill)
        yield runs


def wait_for(ready, runs, *, limit_s: float = LIMIT_S):
    pause, until = Event(), time.monotonic() + limit_s
    while not ready():
        said = "\n".join(run.said for run in runs)
        assert all(run.process.poll() is None for run in runs), f"ended too early\n{said}"
        assert time.monotonic() < until, f"not ready within {limit_s} s\n{said}"
        pause.wait(0.05)


def steps_done(run_dir: Path) -> int:
    return len(metrics(run_dir)) if (run_dir / "metrics.jsonl").exists() else 0


def starts(run_dir: Path) -> list[int]:
    """The steps that starts went on from."""
    return [json.loads(line)["step"] for line in (run_dir / "restarts.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def on_one_host(data, tmp_path_factory):
    """What the same training gives with all four ranks on this machine."""
    folder = tmp_path_factory.mktemp("one")
    args = overrides(data, folder / "run", "run.steps=6", *LAYOUT)
    run = Launched([SCRIPT, "--nproc", "4", "train", *args], folder / "said.log")
    assert run.end() == 0, run.said
    return curve(folder / "run")


@pytest.mark.parametrize("kind", ["static", "c10d"])
def test_two_hosts_train_two_by_two_with_the_losses_of_one(hosts, data, tmp_path, on_one_host, kind):
    args = overrides(data, tmp_path / "run", "run.steps=6", *LAYOUT)
    with launched(hosts, "--rendezvous", kind, args=args, logs=tmp_path) as runs:
        codes = [run.end() for run in runs]
    assert codes == [0, 0], "\n".join(run.said for run in runs)
    events = [json.loads(line) for line in (tmp_path / "run/events.jsonl").read_text().splitlines()]
    mesh = next(e["mesh"] for e in events if e["event"] == "start")
    assert curve(tmp_path / "run") == on_one_host, mesh


@pytest.mark.parametrize("kind", ["static", "c10d"])
def test_hosts_whose_own_names_are_loopback_meet_at_the_address_of_the_head(hosts, data, tmp_path, kind):
    """As Debian's installer leaves /etc/hosts."""
    args = overrides(data, tmp_path / "run", "run.steps=2", *LAYOUT)
    files = {host: host.folder / "hosts" for host in hosts.values()}
    before = {host: path.read_text() for host, path in files.items()}
    try:
        for host, path in files.items():
            path.write_text(f"127.0.0.1 localhost\n127.0.1.1 {host.name}\n")
        address = hosts["node1"].address
        with launched(hosts, "--rendezvous", kind, args=args, logs=tmp_path, head=address) as runs:
            codes = [run.end() for run in runs]
        refused = Launched(hosts["node1"].command(script(0, args=args)), tmp_path / "refused.log")
        assert refused.end() == 2
    finally:
        for host, path in files.items():
            path.write_text(before[host])
    assert codes == [0, 0], "\n".join(run.said for run in runs)
    assert "HEAD=node1 is 127.0.1.1 here, where no other host finds it" in refused.said


@pytest.mark.parametrize("kind, asked", [("static", 1), ("c10d", 0)], ids=["static-worker", "c10d-head"])
def test_sigterm_to_the_script_of_one_host_saves_and_stops_both_with_code_0(hosts, data, tmp_path, kind, asked):
    run_dir = tmp_path / "run"
    args = overrides(data, run_dir, "run.steps=4000", *LAYOUT)
    with launched(hosts, "--rendezvous", kind, args=args, logs=tmp_path) as runs:
        wait_for(lambda: steps_done(run_dir) >= 3, runs)
        runs[asked].process.send_signal(signal.SIGTERM)
        codes = [run.end() for run in runs]
    assert codes == [0, 0], "\n".join(run.said for run in runs)
    step = json.loads((run_dir / "STOPPED").read_text())["step"]
    assert (run_dir / "checkpoints" / f"step-{step:08d}").is_dir() and metrics(run_dir)[-1]["step"] == step
    assert "asked to stop by SIGTERM" in runs[asked].said


def test_both_asked_before_the_first_step_end_with_code_0(hosts, data, tmp_path):
    """While ranks are starting they can't agree, and one that listens to no signal yet is told again."""
    args = overrides(data, tmp_path / "run", "run.steps=4000", *LAYOUT)
    with launched(hosts, args=args, logs=tmp_path) as runs:
        wait_for(lambda: all(run.ranks() for run in runs), runs)
        for run in runs:
            run.process.send_signal(signal.SIGTERM)
        codes = [run.end() for run in runs]
    assert codes == [0, 0], "\n".join(run.said for run in runs)
    assert json.loads((tmp_path / "run/STOPPED").read_text())["step"] == steps_done(tmp_path / "run")


def test_sigterm_to_torchrun_itself_saves_and_ends_it_with_a_code_that_is_not_0(hosts, data, tmp_path):
    """Its ranks can't tell this from another rank's failure, and save all the same."""
    run_dir = tmp_path / "run"
    args = overrides(data, run_dir, "run.steps=4000", *LAYOUT)
    with launched(hosts, args=args, logs=tmp_path) as runs:
        wait_for(lambda: steps_done(run_dir) >= 3, runs)
        os.kill(runs[0].torchrun(), signal.SIGTERM)
        codes = [run.end() for run in runs]
    step = json.loads((run_dir / "STOPPED").read_text())["step"]
    assert (run_dir / "checkpoints" / f"step-{step:08d}").is_dir()
    assert codes[0] != 0, "\n".join(run.said for run in runs)


def test_under_c10d_a_killed_rank_starts_all_again_from_the_last_checkpoint(hosts, data, tmp_path):
    run_dir = tmp_path / "run"
    args = overrides(data, run_dir, "run.steps=12", "checkpoint.every_steps=3", "checkpoint.asynchronous=false", *LAYOUT)
    args.append("fault.kill_rank=3@step8")
    with launched(hosts, "--rendezvous", "c10d", "--max-restarts", "2", args=args, logs=tmp_path) as runs:
        codes = [run.end() for run in runs]
    assert codes == [0, 0], "\n".join(run.said for run in runs)
    assert starts(run_dir) == [0, 6]
    assert [m["step"] for m in metrics(run_dir)] == list(range(1, 13))


def test_a_host_that_dies_ends_the_other_and_the_same_command_goes_on(hosts, data, tmp_path):
    run_dir = tmp_path / "run"
    args = overrides(data, run_dir, "run.steps=40", "checkpoint.every_steps=2", "checkpoint.asynchronous=false", *LAYOUT)
    with launched(hosts, args=args, logs=tmp_path) as runs:
        wait_for(lambda: steps_done(run_dir) >= 5, runs)
        hosts.kill("node2")
        assert runs[0].end() == 1, runs[0].said
    assert "lost contact with another rank" in runs[0].said
    with launched(hosts, args=[*args, "run.steps=8" if steps_done(run_dir) < 8 else "run.steps=40"], logs=tmp_path) as runs:
        assert [run.end() for run in runs] == [0, 0], "\n".join(run.said for run in runs)
    assert starts(run_dir)[0] == 0 and starts(run_dir)[1] >= 4


def test_under_c10d_a_host_that_dies_is_waited_for_and_comes_back(hosts, data, tmp_path):
    run_dir = tmp_path / "run"
    args = overrides(data, run_dir, "run.steps=400", "checkpoint.every_steps=2", "checkpoint.asynchronous=false", *LAYOUT)
    options = ("--rendezvous", "c10d", "--max-restarts", "2")
    with launched(hosts, *options, args=args, logs=tmp_path) as runs:
        wait_for(lambda: steps_done(run_dir) >= 5, runs)
        hosts.kill("node2")
        runs[1].process.wait()
        again = Launched(hosts["node2"].command(script(1, *options, args=args)), tmp_path / "again.log")
        wait_for(lambda: len(starts(run_dir)) == 2 and steps_done(run_dir) > starts(run_dir)[1] + 1, [runs[0], again])
        runs[0].process.send_signal(signal.SIGTERM)
        codes = [runs[0].end(), again.end()]
    assert codes == [0, 0], runs[0].said + again.said
    assert starts(run_dir)[1] >= 4
