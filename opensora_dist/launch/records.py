"""What was submitted of a run: a folder each, numbered, in ``launch/`` of the run directory, and one that holds the answer of the scheduler.

A submission is written down before the scheduler is asked, and its answer after. So whatever ends between the two leaves a record without
an answer, which ``submit`` refuses to go past until the scheduler was asked for it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Final

from opensora_dist.config.site import SiteConfig
from opensora_dist.core.errors import ConfigError
from opensora_dist.core.io import read_json, write_json
from opensora_dist.launch.job import Job

LAUNCH_DIR: Final = "launch"
RECORD_NAME: Final = "submission.json"


@dataclass(frozen=True, kw_only=True)
class Record:
    """
    Args:
        backend: Name of the launcher.
        job: What was submitted.
        job_ids: The scheduler's, the newest last; none: it was refused or never arrived; None: no answer is known.
        git: Commit of the tree that submitted, and whether it had changes.
        time: When, in UTC.
    """

    backend: str
    job: Job
    job_ids: tuple[str, ...] | None
    git: dict[str, Any] | None
    time: str


def new_folder(records: Path) -> Path:
    """Where the next submission goes; nothing is made."""
    taken = [int(p.name) for p in (records / LAUNCH_DIR).glob("[0-9][0-9][0-9][0-9]")]
    return records / LAUNCH_DIR / f"{max(taken, default=0) + 1:04d}"


def record_values(record: Record) -> dict[str, Any]:
    """What ``submission.json`` holds."""
    values = asdict(record)
    job = values["job"]
    for name in ("run_dir", "folder", "config"):
        job[name] = job[name] and str(job[name])
    job["site"] = record.job.site.model_dump(mode="json")
    del job["config_text"]  # it lies beside
    return values


def write_record(record: Record) -> None:
    """In the folder of its job."""
    write_json(record.job.folder / RECORD_NAME, record_values(record))


def read_record(folder: Path) -> Record:
    """Of one submission.

    Raises:
        ConfigError: The folder holds none.
    """
    path = folder / RECORD_NAME
    try:
        values = read_json(path)
    except FileNotFoundError as error:
        raise ConfigError(f"{path} doesn't exist; name the folder of a submission, as in runs/x/{LAUNCH_DIR}/0001") from error
    job = dict(values["job"])
    for name in ("run_dir", "folder", "config"):
        job[name] = job[name] and Path(job[name])
    job["argv"] = tuple(job["argv"])
    job["site"] = SiteConfig.model_validate(job["site"])
    ids = values["job_ids"]
    return Record(**{**values, "job": Job(**job), "job_ids": None if ids is None else tuple(ids)})


def note_answer(folder: Path, job_ids: Sequence[str]) -> Record:
    """Puts what the scheduler answered into a record, before what a job that began at once has added itself (``node resubmitted``)."""
    record = read_record(folder)
    record = replace(record, job_ids=tuple(dict.fromkeys((*job_ids, *(record.job_ids or ())))))
    write_record(record)
    return record


def read_records(records: Path) -> list[Record]:
    """Of a run directory, oldest first."""
    return [read_record(path.parent) for path in sorted((records / LAUNCH_DIR).glob(f"*/{RECORD_NAME}"))]
