"""``opensora-dist logs``: what a submitted run says."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any


def add_parser(verbs: Any) -> None:
    """Adds the verb."""
    parser = verbs.add_parser(
        "logs",
        help="show what a submitted run says",
        description="Show the newest log of the newest submission of a run: of its first rank, or of its launcher where no rank has begun.",
    )
    parser.add_argument("run_dir", type=Path, metavar="RUN_DIR", help="the run directory (or that of --records)")
    parser.add_argument("-f", "--follow", action="store_true", help="go on as it grows, until interrupted")
    parser.set_defaults(run=_run)


def _run(args: argparse.Namespace) -> int:
    from opensora_dist.recipes.submitted import show_logs

    return show_logs(args.run_dir, follow=args.follow)
