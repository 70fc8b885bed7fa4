"""Whether the nodes of a job are fit to train on, before it starts: each looks at itself, then all try their links, then one judges.

What is found lies in a folder that all nodes share: ``<node>.json`` of each, ``links.json`` of all, and ``links/rank-N.json``, which
says how far each rank came: a rank that is gone can't say so.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import opensora_dist
from opensora_dist.config.site import SiteConfig
from opensora_dist.core.io import write_json
from opensora_dist.core.logging import get_logger
from opensora_dist.machine.disk import FREE_SPACE, folder_findings
from opensora_dist.machine.finding import Finding, Level, problems_of
from opensora_dist.machine.gpus import gpu_findings
from opensora_dist.machine.limits import limit_findings, shared_memory_finding
from opensora_dist.machine.network import interface_finding, rdma_findings
from opensora_dist.observe.environment import git_state, package_versions
from opensora_dist.recipes.doctor import kernel_findings, usable_gpus

if TYPE_CHECKING:  # the checks of a node alone don't wait for torch
    from opensora_dist.machine.links import Rates
    from opensora_dist.machine.meeting import Start

LINKS_NAME: Final = "links.json"
RANKS_DIR: Final = "links"
NO_HEAD: Final = "no head"
_DISK_SHARE: Final = 1 / 6
_KERNELS_SHARE: Final = 0.95  # the rest is for the report
_log = get_logger(__name__)


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


def preflight(site: SiteConfig, *, node: str, run_dir: Path, gpus: int, folder: Path) -> NodeReport:
    """Looks at this node, and writes ``folder/<node>.json``.

    Args:
        node: Its name, as the scheduler has it.
        run_dir: Where the run will write.
        gpus: How many there must be; with 0, GPUs and kernels aren't looked at.
        folder: ``<submission>/preflight/<attempt>``.
    """
    began, least, found, shared = time.monotonic(), site.preflight, list[Finding](), list[Finding]()
    if gpus:
        found += gpu_findings(expect=gpus, clock_share=least.clock_share)
    if site.network.interface is not None:
        found.append(interface_finding(site.network.interface))
    found += rdma_findings(site.network.hcas if gpus else None)
    for finding in folder_findings(
        run_dir, least_gib=least.free_disk_gib, level=Level.PROBLEM, timeout_s=_DISK_SHARE * least.timeout_s
    ):
        (shared if finding.name == FREE_SPACE else found).append(finding)
    found.append(shared_memory_finding(least_gib=least.shared_memory_gib, level=Level.PROBLEM))
    found += limit_findings()
    if gpus:  # last, with all the time that is left: from a cold file system torch alone takes a minute
        left_s = max(_KERNELS_SHARE * least.timeout_s - (time.monotonic() - began), 1.0)
        usable = usable_gpus(found, expect=gpus)
        found += kernel_findings(num_gpus=usable, clock_share=least.clock_share, timeout_s=left_s)
    state = git_state(Path(opensora_dist.__file__).parent)
    report = NodeReport(
        node=node,
        commit=None if state is None else state["commit"] + "+" * state["changed"],
        packages=package_versions(),
        problems=problems_of(found),
        shared=problems_of(shared),
        findings=tuple(asdict(finding) for finding in (*found, *shared)),
    )
    write_json(folder / f"{node}.json", asdict(report))
    return report


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
    from opensora_dist.machine.meeting import NoHeadError, start_of
    from opensora_dist.parallel.failures import is_lost_contact

    start = start_of()
    mine = folder / RANKS_DIR / f"rank-{start.rank}.json"
    write_json(mine, {"node": node, "ended": None, "said": ""})
    try:
        fit = _links(site, node=node, folder=folder, device=device)
    except Exception as error:  # noqa: BLE001 - a rank that says how it failed, in a file that others read
        ended = NO_HEAD if isinstance(error, NoHeadError) else "lost contact" if is_lost_contact(error) else "error"
        said = " ".join(f"{type(error).__name__}: {error}".split())[:500]
        write_json(mine, {"node": node, "ended": ended, "said": said})
        _log.error("links: %s", said)
        return 1
    write_json(mine, {"node": node, "ended": "done", "said": ""})
    return 0 if fit else 1


def _links(site: SiteConfig, *, node: str, folder: Path, device: str) -> bool:
    """Whether all came, reach each other, and are fast enough. Collective."""
    from opensora_dist.machine.meeting import call_roll, leave, meet, start_of

    start = start_of()
    # Most of the time goes into importing torch, which takes a minute from a cold file system that all nodes ask at once.
    meeting_s, transfer_s = site.preflight.timeout_s / 2, site.preflight.timeout_s / 4
    store = meet(start, timeout_s=meeting_s)
    roll = call_roll(store, start, node=node, timeout_s=meeting_s)
    rates = (
        _rates(start, store, nodes=roll.nodes, device=device, timeout_s=transfer_s) if roll.whole and start.world > 1 else None
    )
    problems = [] if rates is None else floor_problems(site, rates)
    if start.rank == 0:
        values = {
            "world": start.world,
            "nodes": {name: len(ranks) for name, ranks in roll.nodes.items()},
            "unreachable": [list(pair) for pair in roll.unreachable],
            "hidden": roll.hidden,
            "silent": list(roll.silent),
            "all_reduce_bytes_per_s": None if rates is None else rates.all_reduce_bytes_per_s,
            "all_to_all_bytes_per_s": None if rates is None else rates.all_to_all_bytes_per_s,
            "pairs": [] if rates is None else [[*pair, rate] for pair, rate in rates.pairs.items()],
            "problems": problems,
        }
        write_json(folder / LINKS_NAME, values)
    leave(store, start, timeout_s=transfer_s if roll.whole else 1.0)
    return roll.whole and not problems


def _rates(start: Start, store: Any, *, nodes: dict[str, list[int]], device: str, timeout_s: float) -> Rates:
    """Of the group that all ranks form. Collective."""
    import torch
    import torch.distributed as dist

    from opensora_dist.machine.links import measure_links
    from opensora_dist.parallel.mesh import resolve_device
    from opensora_dist.parallel.sequence.exchange import Exchange

    os.environ["LOCAL_RANK"] = str(start.local_rank)  # which GPU is this rank's
    os.environ.setdefault("TORCH_NCCL_BLOCKING_WAIT", "1")  # or a lost rank ends this process before it could say so
    chosen = resolve_device(device)
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if chosen.type == "cuda" else "gloo",
        store=dist.PrefixStore("group", store),  # type: ignore[attr-defined]  # not in torch's __all__
        rank=start.rank,
        world_size=start.world,
        timeout=timedelta(seconds=timeout_s),
    )
    assert dist.group.WORLD is not None
    rates = measure_links(Exchange(dist.group.WORLD), device=chosen, nodes=nodes)
    dist.destroy_process_group()
    return rates


def floor_problems(site: SiteConfig, rates: Rates) -> list[str]:
    """Floors of the site that aren't met."""
    found = []
    for name in ("all_reduce", "all_to_all"):
        floor, rate = getattr(site.preflight, f"{name}_gb_per_s"), getattr(rates, f"{name}_bytes_per_s") / 1e9
        if rate < floor:
            found.append(
                f"{name.replace('_', '-')}: {rate:.3g} GB/s, and preflight.{name}_gb_per_s={floor:g}; look at cables, ports and "
                "network.hcas, or lower the floor"
            )
    return found
