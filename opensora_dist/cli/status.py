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
    from opensora_dist.recipes.submit import statuses
    from opensora_dist.recipes.submitted import attempts, newest

    record = newest(args.run_dir)
    jobs, starts = statuses(record), attempts(record)
    if args.json:
        shown = {"folder": str(record.job.folder), "backend": record.backend, "submitted": record.time}
        print(json.dumps({**shown, "jobs": [asdict(s) for s in jobs], "attempts": [{"task": t, **asdict(a)} for t, a in starts]}))
        return 0
    print(f"{record.job.folder}: {record.job.name}, {record.job.nodes} nodes, submitted to {record.backend} at {record.time}")
    for job in jobs:
        print(f"  job {job.job_id}: {job.phase} ({job.said})")
    if not jobs:
        print("  refused, or never arrived; submit it again")
    for task, attempt in starts:
        what = f"  attempt {attempt.name}" + ("" if task is None else f", task {task}")
        if attempt.outcome is None:
            print(f"{what}: began at step {attempt.began}")
        else:
            print(f"{what}: step {attempt.began} to {attempt.ended}; {attempt.outcome.next}, {attempt.outcome.why}")
    return 0
