"""launch/torchrun.sh refuses what can't work before it starts anything, and passes a request to stop on to its ranks.

On several hosts it runs in tests/hosts (`make test-hosts`).
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from threading import Event

import pytest

SCRIPT = Path(__file__).parents[2] / "launch/torchrun.sh"

# Stands for torch.distributed.run: writes down what it was given, and has one rank, which notes what it is told.
_PYTHON = """#!{python}
import json, pathlib, signal, subprocess, sys
folder = pathlib.Path({folder!r})
if sys.argv[1] != "-m":
    sys.exit(subprocess.run([sys.executable, *sys.argv[1:]]).returncode)
if not (folder / "argv").exists():
    (folder / "argv").write_text(json.dumps(sys.argv[1:]))
    hears = "lambda *_: sys.exit(0)" if {hears} else "signal.SIG_IGN"
    rank = [sys.executable, "-c", f"import signal, sys, pathlib\\nsignal.signal(signal.SIGUSR1, {{hears}})\\n"
            "pathlib.Path(sys.argv[1], 'ready').touch()\\nsignal.pause()", str(folder)]
    if {waits}:
        sys.exit(subprocess.run(rank).returncode)
"""


def _run(*args, cwd: Path | None = None, **variables: str) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "PYTHON": sys.executable, "NPROC": "1", **variables}
    return subprocess.run([SCRIPT, *args], env=env, cwd=cwd, capture_output=True, text=True, timeout=60)


def _stand_in(folder: Path, *, waits: bool = False, hears: bool = True) -> str:
    program = folder / "python"
    program.write_text(_PYTHON.format(python=sys.executable, folder=str(folder), waits=waits, hears=hears))
    program.chmod(0o755)
    return str(program)


def _given(folder: Path, *args, **variables) -> str:
    """What torchrun is started with."""
    done = _run(*args, **{"PYTHON": _stand_in(folder), **variables})
    assert done.returncode == 0, done.stderr
    return " ".join(json.loads((folder / "argv").read_text()))


@pytest.mark.parametrize(
    "args, said",
    [
        ([], "nothing to run"),
        (["--nodes", "2", "train"], "no such option: --nodes"),
        (["--nnodes"], "--nnodes needs a value"),
        (["--nnodes", "0", "train"], "NNODES=0: at least 1"),
        (["--nnodes", "two", "train"], "NNODES=two is no whole number"),
        (["--nproc", "0", "train"], "NPROC=0: at least 1"),
        (["--max-restarts=-1", "train"], "MAX_RESTARTS=-1 is no whole number"),
        (["--nnodes", "2", "train"], "NNODES=2 needs HEAD"),
        (["--nnodes", "2", "--head", "localhost", "train"], "HEAD=localhost is 127.0.0.1 here, where no other host finds it"),
        (["--nnodes", "2", "--head", "127.0.1.1", "train"], "HEAD=127.0.1.1 is 127.0.1.1 here"),
        (["--nnodes", "2", "--head", "no such host", "train"], "HEAD=no such host has no IPv4 address here"),
        (["--nnodes", "2", "--head", "$(touch x); 'y'", "train"], "HEAD=$(touch x); 'y' has no IPv4 address here"),
    ],
)
def test_what_cannot_work_is_refused_with_code_2_and_the_way_out(args, said, tmp_path):
    done = _run(*args, cwd=tmp_path)
    assert done.returncode == 2 and done.stderr.startswith("error: ") and said in done.stderr, done.stderr
    assert not list(tmp_path.iterdir())


def _own_address() -> str | None:
    """Of this machine, where others find it."""
    said = subprocess.run(["hostname", "-I"], capture_output=True, text=True).stdout.split()
    return next((address for address in said if "." in address and not address.startswith("127.")), None)


def test_one_host_meets_itself_on_a_port_that_the_system_picks(tmp_path):
    given = _given(tmp_path, "train", "a config.yaml", "run.name=it's", NPROC="4")
    assert "--nnodes 1 --nproc-per-node 4" in given and "--rdzv-endpoint 127.0.0.1:0" in given
    assert given.endswith("-m opensora_dist train a config.yaml run.name=it's")


@pytest.mark.skipif(
    _own_address() is None, reason="this machine has no address that others could find it at: run it where there is a network"
)
def test_options_and_environment_say_the_same(tmp_path):
    head = _own_address()
    options = ["--nnodes", "2", "--node-rank=1", "--head", head, "--port", "30000", "train"]
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    given = _given(tmp_path / "a", *options)
    assert f"--node-rank 1 --master-addr {head} --master-port 30000" in given
    assert given == _given(tmp_path / "b", "train", NNODES="2", NODE_RANK="1", HEAD=head, PORT="30000")


@pytest.mark.skipif(
    _own_address() is None, reason="this machine has no address that others could find it at: run it where there is a network"
)
@pytest.mark.parametrize("rank, said", [("", "NODE_RANK= is no whole number"), ("2", "NODE_RANK=2 must be less than NNODES=2")])
def test_a_static_rendezvous_needs_a_number_for_each_host(rank, said):
    done = _run("train", NNODES="2", HEAD=_own_address() or "", NODE_RANK=rank)
    assert done.returncode == 2 and said in done.stderr


@contextmanager
def _running(folder: Path, **stand_in: bool) -> Iterator[subprocess.Popen[str]]:
    """The script, with a rank that waits."""
    env, pause = {**os.environ, "PYTHON": _stand_in(folder, waits=True, **stand_in), "NPROC": "1"}, Event()
    with subprocess.Popen([SCRIPT, "train"], env=env, stderr=subprocess.PIPE, text=True, start_new_session=True) as process:
        try:
            while not (folder / "ready").exists():
                assert process.poll() is None
                pause.wait(0.02)
            yield process
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_a_request_to_stop_reaches_the_ranks_as_sigusr1_and_their_code_comes_back(tmp_path, signum):
    with _running(tmp_path) as process:
        process.send_signal(signum)
        _, said = process.communicate(timeout=30)
    assert process.returncode == 0 and f"asked to stop by {signum.name}" in said


def test_a_second_ctrl_c_waits_for_no_rank(tmp_path):
    with _running(tmp_path, hears=False) as process:
        process.send_signal(signal.SIGINT)
        assert process.stderr is not None and "asked to stop by SIGINT" in process.stderr.readline()
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=30) == 128 + signal.SIGTERM
