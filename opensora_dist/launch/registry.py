"""Launchers by name."""

from __future__ import annotations

from opensora_dist.config.site import SiteConfig
from opensora_dist.launch.base import Launcher
from opensora_dist.launch.k8s import KubernetesLauncher
from opensora_dist.launch.sky import SkyLauncher
from opensora_dist.launch.slurm import SlurmLauncher

BACKENDS = ("slurm", "k8s", "sky")


def build_launcher(name: str, site: SiteConfig) -> Launcher:
    """One of ``BACKENDS``."""
    made: dict[str, type[SlurmLauncher] | type[KubernetesLauncher] | type[SkyLauncher]] = {
        "slurm": SlurmLauncher,
        "k8s": KubernetesLauncher,
        "sky": SkyLauncher,
    }
    return made[name](site)
