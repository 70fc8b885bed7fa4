"""What a scheduler has to offer: scripts made by a pure function, and one call each to submit, look and cancel."""

from __future__ import annotations

import os
import re
import shlex
import signal
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Final, Protocol

from opensora_dist.core.errors import OpensoraError
from opensora_dist.launch.job import Job

BACKENDS: Final = ("slurm", "k8s", "sky")
"""Names of the launchers in ``registry``, for those who need no more of them."""


class LaunchError(OpensoraError):
    """A scheduler refused, can't be reached, or did not answer in time."""


class UnsureError(LaunchError):
    """A submission got no answer: it may have arrived or not. ``Launcher.find`` tells."""


class Phase(StrEnum):
    """Where a submission stands, in the same words whatever the scheduler."""

    WAITING = "waiting"
    RUNNING = "running"
    DONE = "done"
    FAILED = "failed"
    CANCELLED = "cancelled"
    UNKNOWN = "unknown"  # the scheduler answers, and holds it no more: it is over, and how it ended only the run's own files say

    @property
    def over(self) -> bool:
        """Nothing more will come of it by itself."""
        return self not in (Phase.WAITING, Phase.RUNNING)


@dataclass(frozen=True, kw_only=True)
class Status:
    """
    Args:
        job_id: The scheduler's.
        phase: In our words.
        said: In the scheduler's: its state, its reason, its nodes.
    """

    job_id: str
    phase: Phase
    said: str


class Launcher(Protocol):
    """A scheduler. One instance per site."""

    name: str

    def problems(self, job: Job) -> list[str]:
        """What keeps this job from being rendered for this scheduler; field, value, rule and way out of each."""
        ...

    def render(self, job: Job) -> dict[str, str]:
        """Pure: file names in ``job.folder``, and what they hold. The first is what is submitted."""
        ...

    def command(self, job: Job) -> list[str]:
        """The command line that submits, for ``--dry-run`` and for ``submit``."""
        ...

    def submit(self, job: Job) -> list[str]:
        """Submits what was rendered and written; returns the scheduler's ids, the first one's first.

        Raises:
            LaunchError: It was refused; nothing is submitted.
            UnsureError: No answer.
        """
        ...

    def find(self, job: Job) -> list[str]:
        """Ids of what the scheduler holds of a job, by ``job.id``; changes nothing. Raises LaunchError."""
        ...

    def settle(self, job: Job) -> list[str]:
        """``find``, of a submission that was left without an answer; what isn't whole is taken back. Raises LaunchError."""
        ...

    def status(self, job_ids: Sequence[str]) -> list[Status]:
        """One of each id, in order; ``UNKNOWN`` of those that the scheduler holds no more. Raises LaunchError where it can't be asked."""
        ...

    def logs(self, job: Job, job_ids: Sequence[str], *, follow: bool) -> list[str] | Path:
        """A command that shows them, or the newest file that holds them."""
        ...

    def cancel(self, job_ids: Sequence[str]) -> None:
        """Cancels what of them is not over. Raises LaunchError."""
        ...


def ask(command: Sequence[str], *, timeout_s: float, unsure: str | None = None, stdin: str | None = None) -> str:
    """Runs a scheduler's command; returns what it printed.

    Args:
        unsure: Pattern of what it says where its request may have arrived although it failed: ``Socket timed out``.
        stdin: What it is given to read.
    Raises:
        LaunchError: It isn't installed here, or failed; with all that it said.
        UnsureError: It was killed, gave no answer in time, or said ``unsure``: what it was asked for may be done.
    """
    shown = shlex.join(command)
    pipe, given = subprocess.PIPE, subprocess.DEVNULL if stdin is None else subprocess.PIPE
    try:
        # A session of its own: what it starts ends with it, where it hangs.
        process = subprocess.Popen(
            command, stdin=given, stdout=pipe, stderr=pipe, text=True, errors="replace", start_new_session=True
        )
    except OSError as error:
        raise LaunchError(
            f"`{command[0]}` can't be run here ({error.strerror}); submit from a machine that has it on its PATH"
        ) from error
    with process:
        try:
            out, err = process.communicate(stdin, timeout=timeout_s)
        except subprocess.TimeoutExpired as error:
            os.killpg(process.pid, signal.SIGKILL)
            raise UnsureError(
                f"`{shown}` gave no answer within {timeout_s:g} s; is the scheduler up, and reached from here?"
            ) from error
        except BaseException:  # an interrupt, too: what was asked must not go on alone
            os.killpg(process.pid, signal.SIGKILL)
            raise
    said = "\n".join(text.strip() for text in (err, out) if text.strip()) or "it said nothing"
    if process.returncode < 0:
        raise UnsureError(f"`{shown}` was killed by signal {-process.returncode}: {said}")
    if process.returncode:
        kind = UnsureError if unsure is not None and re.search(unsure, said) else LaunchError
        raise kind(f"`{shown}` failed with {process.returncode}: {said}")
    return out
