"""Handing a run to a scheduler: everything is checked and written down first, and nothing is submitted twice."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from opensora_dist.core.errors import ConfigError
from opensora_dist.core.io import exclusive_lock
from opensora_dist.core.logging import get_logger
from opensora_dist.launch.base import Launcher
from opensora_dist.launch.job import Job
from opensora_dist.launch.records import LAUNCH_DIR, Record
from opensora_dist.launch.registry import build_launcher

_log = get_logger(__name__)


@dataclass(frozen=True, kw_only=True)
class SubmitOptions:
    """What ``opensora-dist submit`` was asked for; fields as the options of the command."""

    backend: str
    nodes: int
    gpus_per_node: int
    ranks_per_node: int | None
    time: str | None
    max_requeues: int
    name: str | None
    site: Path | None
    array: int | None
    dry_run: bool


def submit(options: SubmitOptions, argv: Sequence[str]) -> Record | None:
    """Submits ``opensora-dist ARGV``; None for a dry run, which prints what would be submitted.

    Raises:
        ConfigError: Every problem of the options, the site and the config.
        LaunchError: The scheduler refused, or can't be reached: nothing is submitted.
    """
    job = _job(options, argv)
    launcher = build_launcher(options.backend, job.site)
    if problems := launcher.problems(job):
        raise ConfigError(problems)
    files = launcher.render(job)
    if options.dry_run:
        for name, text in files.items():
            print(f"# {job.folder / name}\n{text}")
        print("# submitted by\n" + " ".join(launcher.command(job)))
        return None
    job.run_dir.mkdir(parents=True, exist_ok=True)
    busy = ConfigError(f"another submission of {job.run_dir} is being made; wait for it, or choose another run.dir")
    with exclusive_lock(job.run_dir / LAUNCH_DIR / ".lock", busy=busy):
        _refuse_second(options.backend, job)
        return _submit(options.backend, launcher, job, files)


def _submit(backend: str, launcher: Launcher, job: Job, files: dict[str, str]) -> Record:
    raise NotImplementedError


def _refuse_second(backend: str, job: Job) -> None:
    """
    Raises:
        ConfigError: A submission of this run is not over.
    """


def _job(options: SubmitOptions, argv: Sequence[str]) -> Job:
    raise NotImplementedError
