"""``opensora-dist cancel``: ends what was submitted of a run."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any


def add_parser(verbs: Any) -> None:
    """Adds the verb."""
    parser = verbs.add_parser(
        "cancel",
        help="end what was submitted of a run",
        description="Cancel the newest submission of a run, with everything that would follow it. Its checkpoints stay; submit goes on from them.",
    )
    parser.add_argument("run_dir", type=Path, metavar="RUN_DIR", help="the run directory (or that of --records)")
    parser.set_defaults(run=_run)


def _run(args: argparse.Namespace) -> int:
    from opensora_dist.recipes.submitted import cancel

    cancelled = cancel(args.run_dir)
    print(f"cancelled {', '.join(cancelled)}" if cancelled else "nothing to cancel: it is over")
    return 0
