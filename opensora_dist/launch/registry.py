"""Launchers by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from opensora_dist.config.site import SiteConfig
from opensora_dist.launch.base import Launcher
from opensora_dist.launch.k8s import KubernetesLauncher
from opensora_dist.launch.sky import SkyLauncher
from opensora_dist.launch.slurm import SlurmLauncher

LAUNCHERS: Mapping[str, Callable[[SiteConfig], Launcher]] = {
    "slurm": SlurmLauncher,
    "k8s": KubernetesLauncher,
    "sky": SkyLauncher,
}


def build_launcher(name: str, site: SiteConfig) -> Launcher:
    """One of ``base.BACKENDS``."""
    return LAUNCHERS[name](site)
