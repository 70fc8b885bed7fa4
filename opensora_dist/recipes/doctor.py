"""What this machine, this install and this network are fit for: every check of ``machine``, by subject."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final

from rich.console import Console
from rich.table import Table
from rich.text import Text

import opensora_dist
from opensora_dist.config.site import PreflightSite
from opensora_dist.machine.children import findings_of_child
from opensora_dist.machine.disk import folder_findings
from opensora_dist.machine.finding import Finding, Level, Subject, problems_of
from opensora_dist.machine.gpus import gpu_findings
from opensora_dist.machine.limits import limit_findings, shared_memory_finding
from opensora_dist.machine.network import loopback_finding, network_findings
from opensora_dist.machine.packages import package_findings
from opensora_dist.observe.environment import git_state

KERNELS_TIMEOUT_S: Final = 180.0  # a cold disk, and several GPUs; it takes seconds
_OPTIONAL_TIMEOUT_S: Final = 180.0
_WIDE: Final = 160  # columns of a file
_COLUMNS: Final = 4
_PACKAGES: Final = Subject("packages")
_STYLES: Final = {Level.OK: "green", Level.NOTE: "dim", Level.WARNING: "yellow", Level.PROBLEM: "bold red"}


def doctor(folder: Path, *, expect_gpus: int | None) -> Iterator[Finding]:
    """Looks at everything; findings come as they are made.

    Args:
        folder: Whose disk is measured; it exists.
        expect_gpus: How many there must be; None: any number will do.
    """
    least = PreflightSite()
    yield from package_findings()
    yield source_finding()
    gpus = gpu_findings(expect=expect_gpus, clock_share=least.clock_share)
    yield from gpus
    yield from kernel_findings(num_gpus=usable_gpus(gpus, expect=expect_gpus), clock_share=least.clock_share)
    yield from optional_findings()
    yield from network_findings()
    yield loopback_finding()
    yield from folder_findings(folder, least_gib=least.free_disk_gib, level=Level.WARNING)
    yield shared_memory_finding(least_gib=least.shared_memory_gib, level=Level.WARNING)
    yield from limit_findings()


def source_finding() -> Finding:
    """The commit that runs."""
    state = git_state(Path(opensora_dist.__file__).parent)
    if state is None:
        return _PACKAGES.finding("source", Level.OK, f"{opensora_dist.__version__}, in no git tree")
    said = f"commit {state['commit'][:12]}" + (", with changes" if state["changed"] else "")
    return _PACKAGES.finding("source", Level.OK, said, values=state)


def usable_gpus(findings: Sequence[Finding], *, expect: int | None) -> int:
    """How many GPUs torch has to see: of those that the driver knows of, by what ``gpu_findings`` found, as many as were asked for.

    Args:
        expect: By number; None: by CUDA_VISIBLE_DEVICES, which the driver's tools don't heed, and where it says nothing, all.
    """
    count = sum(int((f.values or {}).get("count", 0)) for f in findings if f.subject == "gpus")
    if expect is None and (chosen := os.environ.get("CUDA_VISIBLE_DEVICES")):
        expect = len(chosen.split(","))
    return count if expect is None else min(count, expect)


def kernel_findings(*, num_gpus: int, clock_share: float, timeout_s: float = KERNELS_TIMEOUT_S) -> list[Finding]:
    """torch, ranks, kernels and GPUs, tried in a process of their own. Arguments as ``machine.kernels.main`` has them."""
    return findings_of_child("opensora_dist.machine.kernels", str(num_gpus), str(clock_share), timeout_s=timeout_s)


def optional_findings() -> list[Finding]:
    """Packages that training can do without, tried in another process: one that crashes is a warning."""
    return findings_of_child(
        "opensora_dist.machine.optional",
        timeout_s=_OPTIONAL_TIMEOUT_S,
        level=Level.WARNING,
        remedy="install again what it names, or remove it; what would have come after it was not looked at",
    )


def show(findings: Sequence[Finding], *, console: Console) -> None:
    """One table, by subject, then the problems and warnings with their ways out; no word is cut off, on a terminal or in a file."""
    if not console.is_terminal:
        console.width = max(console.width, _WIDE)
    table = Table(show_header=False, show_edge=False, pad_edge=False)
    for _ in range(_COLUMNS):
        table.add_column(overflow="fold")
    last, subjects = "", list(dict.fromkeys(finding.subject for finding in findings))
    for finding in sorted(findings, key=lambda finding: subjects.index(finding.subject)):
        if finding.subject != last and last:
            table.add_section()
        subject = finding.subject if finding.subject != last else ""
        style = _STYLES[finding.level]
        table.add_row(Text(subject, style="bold"), Text(finding.level, style=style), Text(finding.name), Text(finding.said))
        last = finding.subject
    console.print(table)
    counts = []
    for level in (Level.PROBLEM, Level.WARNING):
        these = [finding for finding in findings if finding.level is level]
        counts.append(f"{len(these)} {level}{'' if len(these) == 1 else 's'}")
        for finding in these:
            said = f"{finding.subject}, {finding.name}: {finding.said}"
            console.print(Text(f"\n{level}: ", style=_STYLES[level]) + Text(said), soft_wrap=not console.is_terminal)
            if finding.remedy is not None:
                console.print(Text(f"  -> {finding.remedy}"), soft_wrap=not console.is_terminal)
    fit = "training can't run here as it is" if problems_of(findings) else "training can run here"
    console.print(Text(f"\n{fit}: {', '.join(counts)}", style="bold"))


def record(findings: Sequence[Finding]) -> dict[str, Any]:
    """For ``--json``."""
    return {"fit": not problems_of(findings), "findings": [asdict(finding) for finding in findings]}
