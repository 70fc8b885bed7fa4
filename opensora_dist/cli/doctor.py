"""``opensora-dist doctor``."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from opensora_dist.core.errors import ConfigError


def add_parser(verbs: Any) -> None:
    """Adds the verb."""
    parser = verbs.add_parser(
        "doctor",
        help="look at this machine, this install and this network",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description=(
            "Look at what training needs here, and try it: packages, torch, kernels, ZeRO backends, GPUs, network, disk, limits.\n"
            "For each problem the way out is said. Exits with 0 where training can run here, with 1 where something needed is broken.\n\n"
            "  opensora-dist doctor\n"
            "  opensora-dist doctor --dir runs --expect-gpus 8 --json"
        ),
    )
    parser.add_argument(
        "--dir", type=Path, default=Path(), metavar="DIR", help="folder whose disk is measured (default: this one)"
    )
    parser.add_argument("--expect-gpus", type=int, metavar="N", help="fewer GPUs are a problem (default: any number will do)")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.set_defaults(run=_run)


def _run(args: argparse.Namespace) -> int:
    from rich.console import Console

    from opensora_dist.machine.finding import problems_of
    from opensora_dist.recipes.doctor import doctor, record, show

    problems = []
    if not args.dir.is_dir():
        problems.append(f"--dir {args.dir} is no folder; make it, or name one on the disk that runs will write to")
    if args.expect_gpus is not None and args.expect_gpus < 0:
        problems.append(f"--expect-gpus must be 0 or more, and is {args.expect_gpus}")
    if problems:
        raise ConfigError(problems)
    found = []
    with Console(stderr=True).status("looking") as status:
        for finding in doctor(args.dir, expect_gpus=args.expect_gpus):
            found.append(finding)
            status.update(f"looked at {finding.subject}, {finding.name}")
    if args.json:
        print(json.dumps(record(found), indent=2))
    else:
        show(found, console=Console())
    return 1 if problems_of(found) else 0
