"""What was submitted of a run: a folder each, numbered, in ``launch/`` of the run directory, and one that holds the answer of the scheduler.

A submission is written down before the scheduler is asked, and its answer after. So whatever ends between the two leaves a record without
an answer, which ``submit`` refuses to go past until the scheduler was asked for it.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

from opensora_dist.config.site import SiteConfig
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
        job_ids: The scheduler's; None: no answer is known.
        git: Commit of the tree that submitted, and whether it had changes.
        time: When, in UTC.
    """

    backend: str
    job: Job
    job_ids: tuple[str, ...] | None
    git: dict[str, Any] | None
    time: str


def new_folder(run_dir: Path) -> Path:
    """Where the next submission goes; nothing is made."""
    taken = [int(p.name) for p in (run_dir / LAUNCH_DIR).glob("[0-9][0-9][0-9][0-9]")]
    return run_dir / LAUNCH_DIR / f"{max(taken, default=0) + 1:04d}"


def write_record(record: Record) -> None:
    """In the folder of its job."""
    values = asdict(record)
    job = values["job"]
    for name in ("run_dir", "folder", "config"):
        job[name] = str(job[name])
    job["site"] = record.job.site.model_dump(mode="json")
    write_json(record.job.folder / RECORD_NAME, values)


def read_records(run_dir: Path) -> list[Record]:
    """Of a run directory, oldest first."""
    found = sorted((run_dir / LAUNCH_DIR).glob(f"*/{RECORD_NAME}"))
    return [_record(read_json(path)) for path in found]


def _record(values: dict[str, Any]) -> Record:
    job = dict(values["job"])
    for name in ("run_dir", "folder", "config"):
        job[name] = Path(job[name])
    job["argv"] = tuple(job["argv"])
    job["site"] = SiteConfig.model_validate(job["site"])
    ids = values["job_ids"]
    return Record(**{**values, "job": Job(**job), "job_ids": None if ids is None else tuple(ids)})
