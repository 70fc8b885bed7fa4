"""What a scheduler has to offer: scripts made by a pure function, and one call each to submit, look and cancel."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Protocol

from opensora_dist.core.errors import OpensoraError
from opensora_dist.launch.job import Job


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
    UNKNOWN = "unknown"

    @property
    def over(self) -> bool:
        """Nothing more will come of it by itself."""
        return self in (Phase.DONE, Phase.FAILED, Phase.CANCELLED)


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
        """Ids of what the scheduler holds of a job, by ``job.id``. Raises LaunchError."""
        ...

    def status(self, job_ids: Sequence[str]) -> list[Status]:
        """Raises LaunchError where the scheduler can't be asked."""
        ...

    def logs(self, job: Job, job_ids: Sequence[str], *, follow: bool) -> list[str] | Path:
        """A command that shows them, or the newest file that holds them."""
        ...

    def cancel(self, job_ids: Sequence[str]) -> None:
        """Cancels what of them is not over. Raises LaunchError."""
        ...


Rendered = Mapping[str, str]
