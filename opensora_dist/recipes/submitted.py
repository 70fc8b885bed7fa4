"""What was submitted: looked at, read and cancelled."""

from __future__ import annotations

import contextlib
import subprocess
from pathlib import Path

from opensora_dist.core.errors import ConfigError
from opensora_dist.launch.base import LaunchError, Status
from opensora_dist.launch.records import LAUNCH_DIR, Record, read_records
from opensora_dist.launch.registry import build_launcher
from opensora_dist.recipes.submit import alone, held, statuses
from opensora_dist.resilience.attempts import ATTEMPTS_NAME, Attempt, attempts_of, read_lines


def newest(records: Path) -> Record:
    """The newest submission of a run; where it was left without an answer, the scheduler is asked for it.

    Raises:
        ConfigError: None was made, or it is being made.
        LaunchError: The scheduler can't be asked.
    """
    found = read_records(records.absolute())
    if not found:
        raise ConfigError(
            f"{records}/{LAUNCH_DIR} holds no submission; name the run directory of a run that was submitted, or its --records"
        )
    if found[-1].job_ids is not None:
        return found[-1]
    with alone(records.absolute()):  # else its answer is still to come
        return held(read_records(records.absolute())[-1])


def attempts(record: Record) -> list[tuple[str | None, Attempt]]:
    """Starts of a submission so far, with the task of an array that they are of. None where its run directory isn't seen from here."""
    # Nodes of a pool keep them in the run directory, wherever this record is.
    places = (record.job.folder.parent, record.job.run_dir / LAUNCH_DIR)
    lines = [line for place in dict.fromkeys(places) for line in read_lines(place / ATTEMPTS_NAME)]
    tasks = dict.fromkeys(line.get("task") for line in lines)
    return [(task, a) for task in tasks for a in attempts_of(lines, submission=record.job.folder.name, task=task)]


def show_logs(records: Path, *, follow: bool) -> int:
    """Prints the newest log; the exit code of what shows it."""
    record = newest(records)
    with contextlib.suppress(LaunchError):  # files are there without their scheduler
        record = held(record)
    if not record.job_ids:
        raise ConfigError(f"{record.job.folder} was refused or never arrived, so that nothing of it was written; submit it again")
    shown = build_launcher(record.backend, record.job.site).logs(record.job, record.job_ids, follow=follow)
    command = ["tail", "-n", "+1", *(["-F"] if follow else []), str(shown)] if isinstance(shown, Path) else shown
    try:
        return subprocess.run(command, check=False).returncode
    except KeyboardInterrupt:  # the way to end --follow
        return 0


def cancel(records: Path) -> list[str]:
    """Cancels what is not over; returns its ids."""
    record = newest(records)
    going: list[Status] = [s for s in statuses(record) if not s.phase.over]
    if going:
        build_launcher(record.backend, record.job.site).cancel([s.job_id for s in going])
    return [s.job_id for s in going]
