"""``opensora-dist report``."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any


def add_parser(verbs: Any) -> None:
    """Adds the verb."""
    parser = verbs.add_parser(
        "report", help="make one HTML page of a run", description="Make one self-contained HTML page of a run."
    )
    parser.add_argument("run_dir", type=Path, metavar="RUN", help="a run directory")
    parser.set_defaults(run=_run)


def _run(args: argparse.Namespace) -> int:
    from opensora_dist.observe.report import write_report

    print(write_report(args.run_dir))
    return 0
