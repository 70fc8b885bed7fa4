"""What the project promises of runs that meet trouble, and the table in docs/reliability.md that tests of these promises fill.

A test takes the fixture ``promise`` and says ``promise(KILL).measured("training again 9.1 s after the kill")``. The table is made from
one run of all such tests: ``OPENSORA_RELIABILITY_TABLE=docs/reliability.md pytest -m promise``.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

KILL = "kill -9 any rank"
HANG = "a hang"
STALL = "checkpoint stall"
KILL_IN_SAVE = "killed during a save, at every phase"
DAMAGE = "bit flip, truncation, missing file"
RESUME = "resume = never stopped"
ELSEWHERE = "another world size or backend"
SIGNAL = "SIGTERM, SIGUSR1"
NONFINITE = "non-finite loss or gradient"
DRIFT = "replicas drift apart"
STRAGGLER = "straggler"
BAD_SAMPLE = "corrupt or missing shard, short read"
DISK_FULL = "disk full during a save"

TARGETS = {
    KILL: "training again within 180 s, at most one checkpoint interval lost",
    HANG: "found within max(90 s, 3 x p99 step); stacks of every rank written, rank and collective named",
    STALL: "at most 5 s or 2% of the interval",
    KILL_IN_SAVE: "no state that can't load; the last good one is used",
    DAMAGE: "found before loading, previous one used, said",
    RESUME: "bitwise: parameters, optimizer, batch digests, loss",
    ELSEWHERE: "no sample lost or seen twice; tensors equal",
    SIGNAL: "flag in the handler, agreed at the step's edge, saved, marker written, exit 0",
    NONFINITE: "skipped on all ranks, moments untouched, batch named, stop after K in a row",
    DRIFT: "parameter hash compared every N steps",
    STRAGGLER: "a rank 1.2x slower than the median over 20 steps is named",
    BAD_SAMPLE: "quarantined, counted, reported; no rank hangs",
    DISK_FULL: "old checkpoints intact, run goes on, loud",
}

_BEGIN, _END = "<!-- table of promises: made by tests/promises.py -->", "<!-- end of the table -->"
_HEADER = "| promise | target | measured | test |\n| --- | --- | --- | --- |\n"


@dataclass(frozen=True)
class Kept:
    """One promise that one test has shown."""

    promise: str
    measured: str
    test: str


def rewrite(page: Path, kept: Iterable[Kept]) -> list[str]:
    """Puts the table made of ``kept`` between the marks of ``page``; returns the promises that nothing showed, which have no row.

    Cases of one parametrised test share a row.
    """
    rows: dict[tuple[str, str], list[str]] = {}
    for k in kept:
        said = rows.setdefault((k.promise, k.test.partition("[")[0]), [])
        if k.measured not in said:
            said.append(k.measured)
    lines = [
        f"| {promise} | {target} | {'; '.join(said).replace('|', '/')} | `{test}` |\n"
        for promise, target in TARGETS.items()
        for (of, test), said in rows.items()
        if of == promise
    ]
    before, _, rest = page.read_text().partition(_BEGIN)
    _, _, after = rest.partition(_END)
    page.write_text(f"{before}{_BEGIN}\n\n{_HEADER}{''.join(lines)}\n{_END}{after}")
    return [promise for promise in TARGETS if not any(of == promise for of, _ in rows)]


def table(page: Path) -> list[Kept]:
    """The rows of the table in ``page``."""
    inside = page.read_text().partition(_BEGIN)[2].partition(_END)[0]
    rows = [
        [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in inside.splitlines() if line.startswith("| ")
    ]
    return [Kept(promise=row[0], measured=row[2], test=row[3].strip("`")) for row in rows[2:]]
