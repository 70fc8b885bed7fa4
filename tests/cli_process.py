"""The command line as its users run it: a process of its own, with a hard time limit, gone with everything it started."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from threading import Event
from typing import Any

LIMIT_S = 120.0
_REPOSITORY = Path(__file__).parent.parent


@dataclass
class Ended:
    """What a finished command left."""

    code: int
    out: str
    err: str


@dataclass
class Running:
    """A command that is under way."""

    process: subprocess.Popen[str]
    _output: dict[str, str] = field(default_factory=dict)

    def ranks(self) -> dict[int, int]:
        """Process ids of its ranks, by rank (Linux)."""
        found = {}
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
                variables = dict(v.partition("=")[::2] for v in (folder / "environ").read_text().split("\0"))
            except OSError:  # it ended meanwhile
                continue
            if parent == self.process.pid and "RANK" in variables:
                found[int(variables["RANK"])] = int(folder.name)
        return found

    def wait_for(self, ready: Callable[[], bool], *, limit_s: float = LIMIT_S) -> None:
        """Until ``ready()``; fails where the command ends before, or the limit passes."""
        pause = Event()
        for _ in range(int(limit_s / 0.02)):
            if ready():
                return
            assert self.process.poll() is None, f"ended with {self.process.returncode} too early\n{self.end().err}"
            pause.wait(0.02)
        raise AssertionError(f"not ready within {limit_s} s")

    def end(self, *, limit_s: float = LIMIT_S) -> Ended:
        """Waits for its end."""
        out, err = self.process.communicate(timeout=limit_s)
        return Ended(code=self.process.returncode, out=out, err=err)


@contextmanager
def running(*args: Any, launcher: tuple[str, ...] = (), cwd: Path | None = None) -> Iterator[Running]:
    """``opensora-dist ARGS``, one thread per rank; ended with its children when the block is left."""
    env = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    env |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(_REPOSITORY)}
    command = [sys.executable, *launcher, "-m", "opensora_dist", *map(str, args)]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env, cwd=cwd, start_new_session=True
    )
    try:
        yield Running(process)
    finally:
        # Ranks are in sessions of their own, and die with their parent.
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


def cli(*args: Any, launcher: tuple[str, ...] = (), cwd: Path | None = None, limit_s: float = LIMIT_S) -> Ended:
    """Runs a command to its end."""
    with running(*args, launcher=launcher, cwd=cwd) as command:
        return command.end(limit_s=limit_s)
