"""``opensora-dist status``: where what was submitted of a run stands."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any


def add_parser(verbs: Any) -> None:
    """Adds the verb."""
    parser = verbs.add_parser(
        "status",
        help="say where what was submitted of a run stands",
        description="Ask the scheduler for the newest submission of a run, and say how its starts ended so far.",
    )
    parser.add_argument("run_dir", type=Path, metavar="RUN_DIR", help="the run directory (or that of --records)")
    parser.add_argument("--json", action="store_true", help="print as JSON")
    parser.set_defaults(run=_run)


def _run(args: argparse.Namespace) -> int:
    from opensora_dist.recipes.submitted import newest, statuses

    record = newest(args.run_dir)
    found = statuses(record)
    if args.json:
        print(json.dumps({"folder": str(record.job.folder), "backend": record.backend, "jobs": [asdict(s) for s in found]}))
        return 0
    print(f"{record.job.folder}: {record.job.name}, {record.job.nodes} nodes, submitted to {record.backend} at {record.time}")
    for status in found:
        print(f"  {status.job_id}: {status.phase} ({status.said})")
    if not found:
        print("  refused, or never arrived; submit it again")
    return 0
