"""What the reports of a preflight say of each node: unfit, or fit; or that something is wrong for which no node can be blamed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from opensora_dist.core.io import read_json
from opensora_dist.machine.blame import cut_off, slow_nodes
from opensora_dist.recipes.preflight import LINKS_NAME, NO_HEAD, RANKS_DIR

_Reasons = dict[str, list[str]]

# What of others' best link a node's best one has at most, to be blamed: for a floor that is missed, and where none is.
_SLOW_SHARE: Final = 0.5
_MUCH_SLOWER_SHARE: Final = 0.25


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


def verdict(folder: Path, nodes: Sequence[str], *, commit: str | None) -> Verdict:
    """What the reports of ``preflight`` and ``links`` say of the nodes of a job. Reads files alone.

    Nodes that are all unfit, where there are several, are taken for a mistake in the site's file or in the install: others would be
    found unfit, too.

    Args:
        folder: ``<submission>/preflight/<attempt>``.
        nodes: All of the job, in its order.
        commit: Of the submission (``NodeReport.commit`` has its form): where nodes differ and neither side is the larger, it is right.
    """
    unfit: _Reasons = {node: [] for node in nodes}
    shared: list[str] = []
    reports = {node: read_json(folder / f"{node}.json") for node in nodes if (folder / f"{node}.json").is_file()}
    for node in nodes:
        if node not in reports:
            unfit[node].append("did not finish looking at itself; look at the job's log, and whether the node is alive")
            continue
        unfit[node] += reports[node]["problems"]
        shared += [problem for problem in reports[node]["shared"] if problem not in shared]
    _compare_versions(reports, unfit, shared, commit=commit)
    _judge_links(folder, nodes, unfit, shared)
    named = {node: tuple(reasons) for node, reasons in unfit.items() if reasons}
    all_of_several = len(nodes) > 1 and len(named) == len(nodes)
    return Verdict(unfit=named, shared=tuple(shared), blamed=bool(named) and not shared and not all_of_several)


def _compare_versions(reports: Mapping[str, Any], unfit: _Reasons, shared: list[str], *, commit: str | None) -> None:
    """All nodes have to run the same: the few that don't are unfit."""
    # A commit that isn't known, as where git did not answer in time, is no other commit.
    commits = {node: report["commit"] for node, report in reports.items() if report["commit"] is not None}
    _compare("commit", commits, unfit, shared, right=commit)
    for package in sorted({name for report in reports.values() for name in report["packages"]}):
        versions = {node: report["packages"].get(package) for node, report in reports.items()}
        _compare(package, versions, unfit, shared, right=None)


def _compare(what: str, found: Mapping[str, str | None], unfit: _Reasons, shared: list[str], *, right: str | None) -> None:
    counts = Counter(found.values()).most_common()
    if len(counts) < 2:
        return
    usual = counts[0][0]
    if counts[0][1] == counts[1][1]:
        if right not in found.values():
            said = ", ".join(f"{node} {value or 'none'}" for node, value in found.items())
            shared.append(f"nodes differ in {what} ({said}); install the same on all of them")
            return
        usual = right
    for node, value in found.items():
        if value != usual:
            unfit[node].append(f"has {what} {value or 'none'}, and others {usual or 'none'}; install the same on all nodes")


def _judge_links(folder: Path, nodes: Sequence[str], unfit: _Reasons, shared: list[str]) -> None:
    ranks = [read_json(path) for path in sorted((folder / RANKS_DIR).glob("rank-*.json"))]
    if not ranks:  # one node alone has no links to try, or a problem was found before
        return
    blamed = {node: len(reasons) for node, reasons in unfit.items()}
    _judge_ranks(ranks, nodes, unfit)
    path = folder / LINKS_NAME
    if path.is_file():
        apart = {rank["node"] for rank in ranks if rank["ended"] == NO_HEAD}
        _judge_found(read_json(path), [node for node in nodes if node not in apart], unfit, shared)
    if {node: len(reasons) for node, reasons in unfit.items()} == blamed and not shared:
        failed = [rank for rank in ranks if rank["ended"] != "done"]
        if failed or not path.is_file():
            said = next((rank["said"] for rank in failed if rank["said"]), "no rank says why")
            shared.append(f"the links could not be tried: {said}; look at the job's log")


def _judge_ranks(ranks: Sequence[Mapping[str, Any]], nodes: Sequence[str], unfit: _Reasons) -> None:
    """What ranks said of themselves; or did not, where others did."""
    by_end: dict[str | None, list[str]] = {}
    for rank in ranks:
        by_end.setdefault(rank["ended"], []).append(rank["node"])
    began = {rank["node"] for rank in ranks}
    alone = by_end.get(NO_HEAD, [])
    head, others = nodes[0], set(nodes[1:])
    if len(others) > 1 and others <= set(alone):
        unfit[head].append("no other node reaches it; look at its network, or a firewall")
    elif len(others) > 1:
        for node in dict.fromkeys(alone):
            unfit[node].append(f"does not reach {head}, and others do; look at its network, or a firewall")
    for node in nodes:
        if node not in began:
            unfit[node].append("started no rank to try the links; look at the job's log, and whether the node is alive")
    for rank in ranks:
        if rank["ended"] == "error":
            unfit[rank["node"]].append(f"failed while links were tried: {rank['said']}; look at its GPUs and its log")
    if len(by_end) > 1:
        for node in dict.fromkeys(by_end.get(None, [])):
            unfit[node].append("ended, or hung, while links were tried; look at the job's log, and whether the node is alive")


def _judge_found(found: Mapping[str, Any], nodes: Sequence[str], unfit: _Reasons, shared: list[str]) -> None:
    """What rank 0 saw of all; of ``nodes`` is known no more than whether their ranks came."""
    most = max(found["nodes"].values())
    if sum(found["nodes"].values()) < found["world"]:
        for node in nodes:
            if (came := found["nodes"].get(node, 0)) < most and not unfit[node]:
                unfit[node].append(f"{came} of its {most} ranks came to try the links; look at the job's log")
    for node in found["hidden"]:
        unfit[node].append(
            "tells others an address of the loopback, where they don't find it; set network.interface in the site's file, or put its "
            "address beside its name in /etc/hosts or DNS"
        )
    for node in found["silent"]:
        unfit[node].append("fell silent while links were tried; look at the job's log, and whether the node is alive")
    pairs = [(a, b) for a, b in found["unreachable"]]
    cut = cut_off(pairs)
    for node in cut:
        unfit[node].append("is not reached by other nodes, or does not reach them; look at its network, or a firewall")
    if pairs and not cut:
        shared.append(
            f"these don't reach each other: {', '.join(f'{a} and {b}' for a, b in pairs)}; look at the network between them"
        )
    rates = {(a, b): rate for a, b, rate in found["pairs"]}
    if found["problems"]:
        slow = slow_nodes(rates, share=_SLOW_SHARE)
        for node in slow:
            unfit[node] += found["problems"]
        if not slow:
            shared += found["problems"]
    else:
        for node, part in slow_nodes(rates, share=_MUCH_SLOWER_SHARE).items():
            unfit[node].append(
                f"its best link is {1 / part:.0f} times slower than others' (more than {1 / _MUCH_SLOWER_SHARE:g} times is too slow, "
                "whatever the floors of preflight are); look at its cable, its port and network.hcas"
            )
