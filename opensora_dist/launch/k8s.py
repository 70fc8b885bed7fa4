"""Kubernetes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from opensora_dist.config.site import SiteConfig
from opensora_dist.launch.base import Status
from opensora_dist.launch.job import Job


class KubernetesLauncher:
    """A ``Launcher``."""

    name = "k8s"

    def __init__(self, site: SiteConfig) -> None:
        self._site = site

    def problems(self, job: Job) -> list[str]:
        raise NotImplementedError

    def render(self, job: Job) -> dict[str, str]:
        raise NotImplementedError

    def command(self, job: Job) -> list[str]:
        raise NotImplementedError

    def submit(self, job: Job) -> list[str]:
        raise NotImplementedError

    def find(self, job: Job) -> list[str]:
        raise NotImplementedError

    def status(self, job_ids: Sequence[str]) -> list[Status]:
        raise NotImplementedError

    def logs(self, job: Job, job_ids: Sequence[str], *, follow: bool) -> list[str] | Path:
        raise NotImplementedError

    def cancel(self, job_ids: Sequence[str]) -> None:
        raise NotImplementedError
