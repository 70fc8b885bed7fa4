"""Slurm: one batch script per job, and sbatch, squeue, scancel."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from opensora_dist.config.site import SiteConfig
from opensora_dist.launch.base import Status
from opensora_dist.launch.job import Job, time_limit_text
from opensora_dist.launch.templates import fill

SCRIPT_NAME = "job.sbatch"


class SlurmLauncher:
    """A ``Launcher``."""

    name = "slurm"

    def __init__(self, site: SiteConfig) -> None:
        self._site = site

    def problems(self, job: Job) -> list[str]:
        return []

    def render(self, job: Job) -> dict[str, str]:
        return {SCRIPT_NAME: fill("slurm/run.sbatch.j2", job=job, site=job.site, options=_options(job))}

    def command(self, job: Job) -> list[str]:
        return ["sbatch", "--parsable", str(job.folder / SCRIPT_NAME)]

    def submit(self, job: Job) -> list[str]:
        return [self._run(self.command(job)).strip().split(";")[0]]

    def find(self, job: Job) -> list[str]:
        raise NotImplementedError

    def status(self, job_ids: Sequence[str]) -> list[Status]:
        raise NotImplementedError

    def logs(self, job: Job, job_ids: Sequence[str], *, follow: bool) -> list[str] | Path:
        raise NotImplementedError

    def cancel(self, job_ids: Sequence[str]) -> None:
        self._run(["scancel", *job_ids])

    def _run(self, command: Sequence[str]) -> str:
        raise NotImplementedError


def _options(job: Job) -> list[str]:
    """Of sbatch, but those that every job has."""
    slurm, options = job.site.slurm, []
    if job.time_limit_s is not None:
        options.append(f"--time={time_limit_text(job.time_limit_s)}")
    return options + slurm.options
