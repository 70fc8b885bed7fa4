"""Handing a run to a scheduler: everything is checked and written down first, and nothing is submitted twice."""

from __future__ import annotations

import shlex
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path

import opensora_dist
from opensora_dist.config.site import SiteConfig, load_site
from opensora_dist.core.errors import ConfigError
from opensora_dist.core.io import exclusive_lock, write_text
from opensora_dist.core.layout import CONFIG_NAME
from opensora_dist.core.logging import get_logger
from opensora_dist.launch.base import Launcher, LaunchError, Status, UnsureError
from opensora_dist.launch.job import Job, job_problems, time_limit_s
from opensora_dist.launch.records import LAUNCH_DIR, Record, new_folder, note_answer, read_records, write_record
from opensora_dist.launch.registry import build_launcher
from opensora_dist.observe.environment import git_state
from opensora_dist.recipes.payload import Command, Machines, Payload, load_payload

_LATE_S = 60.0  # after which a request that got no answer arrives no more
_log = get_logger(__name__)


@dataclass(frozen=True, kw_only=True)
class SubmitOptions:
    """What ``opensora-dist submit`` was asked for; fields as the options of the command."""

    backend: str
    nodes: int
    gpus_per_node: int
    ranks_per_node: int | None = None
    time: str | None = None
    max_requeues: int = 3
    name: str | None = None
    site: Path | None = None
    array: int | None = None
    records: Path | None = None


@dataclass(frozen=True, kw_only=True)
class Submission:
    """What would be submitted: nothing is written yet, and no scheduler asked.

    Args:
        launcher: Where.
        job: What.
        files: Rendered; names in the job's folder.
        records: Folder that the job's folder is numbered in.
        warnings: What can't be known here, or is not so here.
    """

    backend: str
    launcher: Launcher
    job: Job
    files: dict[str, str]
    records: Path
    warnings: tuple[str, ...]

    def shown(self) -> str:
        """Every file and the command line, as they would be."""
        parts = [f"# {self.job.folder / name}\n{text.rstrip()}\n" for name, text in self.files.items()]
        return "\n".join([*parts, f"# submitted by\n{shlex.join(self.launcher.command(self.job))}"])


def prepare_submission(options: SubmitOptions, command: Command) -> Submission:
    """Checks everything, and renders.

    Raises:
        ConfigError: Every problem of the options, the site, the config, and what the scheduler can't be given.
    """
    problems, site = [], SiteConfig()
    try:
        site = load_site(options.site)
    except ConfigError as error:
        problems += [f"{options.site}: {p}" for p in error.problems]
    launcher = build_launcher(options.backend, site)
    jobs: list[Job] = []
    machines = Machines(
        nodes=max(options.nodes, 1),
        gpus_per_node=max(options.gpus_per_node, 0),
        ranks_per_node=max(options.ranks_per_node or options.gpus_per_node, 1),
        array=options.array,
    )

    def more(payload: Payload) -> list[str]:
        jobs[:] = [_job(options, command, machines, payload, site)]
        found = _option_problems(options, name=jobs[0].name, run_dir=payload.run_dir)
        return found + (launcher.problems(jobs[0]) if not problems else [])

    try:
        payload = load_payload(command, machines, more=more)
    except ConfigError as error:
        if not jobs:  # the config can't even be read
            problems += _option_problems(options, name=options.name or command.kind, run_dir=Path.cwd())
        raise ConfigError([*problems, *error.problems]) from error
    if problems:
        raise ConfigError(problems)
    return Submission(
        backend=options.backend,
        launcher=launcher,
        job=jobs[0],
        files={CONFIG_NAME: payload.config_text, **launcher.render(jobs[0])} if payload.config_text else launcher.render(jobs[0]),
        records=_records(options, payload),
        warnings=payload.warnings,
    )


def _option_problems(options: SubmitOptions, *, name: str, run_dir: Path) -> list[str]:
    return job_problems(
        name=name,
        run_dir=run_dir,
        nodes=options.nodes,
        gpus_per_node=options.gpus_per_node,
        ranks_per_node=options.ranks_per_node,
        time_limit=options.time,
        max_requeues=options.max_requeues,
        array=options.array,
    )


def _records(options: SubmitOptions, payload: Payload) -> Path:
    return payload.run_dir if options.records is None else options.records.absolute()


def _job(options: SubmitOptions, command: Command, machines: Machines, payload: Payload, site: SiteConfig) -> Job:
    name, folder = options.name or payload.name, new_folder(_records(options, payload))
    return Job(
        id=f"{name}-{uuid.uuid4().hex[:8]}",
        name=name,
        kind=command.kind,
        argv=payload.argv(folder),
        nodes=machines.nodes,
        gpus_per_node=machines.gpus_per_node,
        ranks_per_node=machines.ranks_per_node,
        time_limit_s=None if options.time is None else time_limit_s(options.time),
        max_requeues=options.max_requeues,
        run_dir=payload.run_dir,
        folder=folder,
        config=None if payload.config_text is None else folder / CONFIG_NAME,
        config_text=payload.config_text or "",
        site=site,
        array=options.array,
        rounds=payload.rounds,
    )


def submit(submission: Submission) -> Record:
    """Writes a submission down, asks the scheduler once, and writes down what it answers.

    Raises:
        ConfigError: A submission of this run is not over, or is being made.
        LaunchError: The scheduler refused, or can't be reached: nothing is submitted.
        UnsureError: It gave no answer: the next call asks it for this submission first.
    """
    job, launcher = submission.job, submission.launcher
    with alone(submission.records):
        if new_folder(submission.records) != job.folder:
            raise ConfigError(f"{job.folder} was taken by another submission meanwhile; start the same command again")
        _refuse_second(submission.records)
        for name, text in submission.files.items():
            write_text(job.folder / name, text)
        record = Record(
            backend=submission.backend,
            job=job,
            job_ids=None,
            git=git_state(Path(opensora_dist.__file__).parent),
            time=datetime.now(UTC).isoformat(timespec="seconds"),
        )
        write_record(record)
        try:
            return note_answer(job.folder, launcher.submit(job))
        except UnsureError as error:
            said = f"{error}\nWhether {job.id} was submitted isn't known. The same command again asks for it first, and submits no second one"
            raise UnsureError(said) from error
        except LaunchError:
            write_record(replace(record, job_ids=()))
            raise


@contextmanager
def alone(records: Path) -> Iterator[None]:
    """Nobody else submits a run meanwhile. Raises ConfigError where somebody does."""
    busy = ConfigError(f"another submission in {records} is being made; wait for it, or choose another run.dir")
    with exclusive_lock(records / LAUNCH_DIR / ".lock", busy=busy):
        yield


def held(record: Record) -> Record:
    """The record with every job of it that the scheduler holds, whatever was noted.

    A job that goes on without unfit nodes may have come to the scheduler and not into the record, where the one that asked for it ended.

    Raises:
        LaunchError: The scheduler can't be asked; or it doesn't know of what may still be on its way.
    """
    if record.job_ids == ():  # refused, or never arrived
        return record
    found = build_launcher(record.backend, record.job.site).find(record.job)
    if record.job_ids is None:
        _not_late(record, found)
    return replace(record, job_ids=tuple(dict.fromkeys((*(record.job_ids or ()), *found))))


def _settled(record: Record) -> Record:
    """The record with an answer, which is noted: where it was left without one, the scheduler is asked. Raises as ``held``."""
    if record.job_ids is not None:
        return record
    folder = record.job.folder
    job_ids = build_launcher(record.backend, record.job.site).settle(record.job)
    _not_late(record, job_ids)
    said = f"holds it as {', '.join(job_ids)}" if job_ids else "never got it"
    _log.warning("%s was left without an answer; the scheduler %s", folder, said)
    return note_answer(folder, job_ids)


def _not_late(record: Record, found: Sequence[str]) -> None:
    """Raises LaunchError where nothing was found of a submission without an answer that may still arrive."""
    age_s = (datetime.now(UTC) - datetime.fromisoformat(record.time)).total_seconds()
    if not found and age_s < _LATE_S:
        raise LaunchError(
            f"{record.job.folder} was submitted {age_s:.0f} s ago without an answer, and the scheduler doesn't know of it; what is on its way "
            f"may still arrive: try again in {_LATE_S - age_s:.0f} s"
        )


def _refuse_second(records: Path) -> None:
    """Only the newest may still be going: each one before it was over when the next was made.

    Raises:
        ConfigError: It is not over.
        LaunchError: The scheduler can't be asked.
    """
    made = read_records(records)
    record = _settled(made[-1]) if made else None
    going = [] if record is None else [s for s in statuses(record) if not s.phase.over]
    if record is not None and going:
        said = ", ".join(f"{s.job_id} ({s.phase})" for s in going)
        raise ConfigError(
            f"{records} is submitted already, as {record.backend} job {said}; two would write one run directory: wait for it, end it with "
            f"`opensora-dist cancel {shlex.quote(str(records))}`, or choose another run.dir"
        )


def statuses(record: Record) -> list[Status]:
    """Of all jobs that are ``held``. Raises LaunchError."""
    job_ids = held(record).job_ids
    return build_launcher(record.backend, record.job.site).status(job_ids) if job_ids else []
