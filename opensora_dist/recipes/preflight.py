"""Whether the nodes of a job are fit to train on, before it starts: each looks at itself, then all try their links, then one judges."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from opensora_dist.config.site import SiteConfig

LINKS_NAME = "links.json"


@dataclass(frozen=True, kw_only=True)
class NodeReport:
    """What one node found of itself.

    Args:
        node: Its name, as the scheduler has it.
        commit: Of the tree that it runs, with ``+`` where that has changes; None where it is in no git tree.
        packages: Versions by name.
        problems: Of this node, each with its way out.
        shared: Problems of what all nodes share (the run directory), for which no node is to blame.
        findings: All that was looked at, as JSON values.
    """

    node: str
    commit: str | None
    packages: Mapping[str, str]
    problems: tuple[str, ...]
    shared: tuple[str, ...]
    findings: tuple[Mapping[str, Any], ...]


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """Which nodes are unfit.

    Args:
        unfit: Reasons by node, each with its way out.
        shared: Problems for which no node is to blame.
        blamed: Whether leaving the unfit out, and asking for others, can help.
    """

    unfit: Mapping[str, tuple[str, ...]]
    shared: tuple[str, ...]
    blamed: bool

    @property
    def code(self) -> int:
        """Exit code of ``node verdict``: 0 all fit, 30 the unfit are to be left out, 31 no node can be blamed."""
        if not self.unfit and not self.shared:
            return 0
        return 30 if self.blamed else 31


def preflight(site: SiteConfig, *, node: str, run_dir: Path, gpus: int, folder: Path) -> NodeReport:
    """Looks at this node, and writes ``folder/<node>.json``.

    Args:
        node: Its name, as the scheduler has it.
        run_dir: Where the run will write.
        gpus: How many there must be.
        folder: ``<submission>/preflight/<attempt>``.
    """
    raise NotImplementedError


def links(site: SiteConfig, *, node: str, folder: Path, device: str) -> int:
    """One rank's part of a short all-reduce, all-to-all and exchange between every two nodes; rank 0 writes ``folder/links.json``.

    Collective. Ranks come from RANK, WORLD_SIZE, LOCAL_RANK, or where those aren't set from Slurm's SLURM_PROCID, SLURM_NTASKS,
    SLURM_LOCALID; they meet at MASTER_ADDR:MASTER_PORT. One rank per GPU, or one per node on CPUs. Start it without torchrun where
    that is possible: a node that can't be reached is then named, and torchrun would only wait for it.

    Args:
        node: This rank's, as the scheduler has it.
        folder: Shared by all nodes.
        device: ``cpu``, ``cuda`` or ``auto``.
    Returns:
        0; 1 where a floor isn't met, a node can't be reached or contact was lost. What it means, ``verdict`` says.
    """
    raise NotImplementedError


def verdict(folder: Path, nodes: Sequence[str], *, commit: str | None) -> Verdict:
    """What the reports of ``preflight`` and ``links`` say of the nodes of a job. Reads files alone.

    Args:
        folder: ``<submission>/preflight/<attempt>``.
        nodes: All of the job, in its order.
        commit: Of the submission (``NodeReport.commit`` has its form): where nodes differ and neither side is the larger, it is right.
    """
    raise NotImplementedError
