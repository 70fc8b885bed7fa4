"""``opensora-dist ckpt``: what a run has saved."""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from opensora_dist.recipes.ckpt import Listed, Listing

_WHERE = "a run directory, its checkpoints folder, or one step folder"


def add_parser(verbs: Any) -> None:
    """Adds the verb and its own verbs."""
    parser = verbs.add_parser("ckpt", help="list, verify and export checkpoints", description="Checkpoints of a run.")
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    ls = actions.add_parser(
        "ls",
        help="list them",
        description="List a run's checkpoints, newest first: who wrote them, and whether the files that their manifests name are there "
        "in full length. `ckpt verify` reads every byte.",
    )
    ls.add_argument("path", type=Path, metavar="RUN", help=_WHERE)
    ls.add_argument("--json", action="store_true", help="print as JSON")
    ls.set_defaults(run=_run_ls)
    verify = actions.add_parser(
        "verify",
        help="read every byte of them",
        description="Compare size and hash of every file with the manifests. Exit code 1 where anything differs.",
    )
    verify.add_argument("path", type=Path, metavar="RUN|STEP", help=_WHERE)
    verify.add_argument("--json", action="store_true", help="print as JSON")
    verify.set_defaults(run=_run_verify)
    export = actions.add_parser(
        "export",
        help="write one file of weights",
        description="Write the weights of a checkpoint, the newest that verifies where a run is named, as one safetensors under "
        "Open-Sora's names. model.init_from.format=open_sora reads it back.",
    )
    export.add_argument("path", type=Path, metavar="RUN|STEP", help=_WHERE)
    export.add_argument("-o", "--out", type=Path, required=True, metavar="FILE.safetensors", help="replaced where it exists")
    export.add_argument("--weights", choices=["ema", "raw"], default="ema", help="averaged (default) or raw weights")
    export.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32", help="default float32")
    export.add_argument("--json", action="store_true", help="print as JSON")
    export.set_defaults(run=_run_export)


def _run_ls(args: argparse.Namespace) -> int:
    from opensora_dist.recipes.ckpt import list_run

    listing = list_run(args.path, every_byte=False)
    if args.json:
        print(_json(listing))
    else:
        _print(listing)
    return 0


def _run_verify(args: argparse.Namespace) -> int:
    from opensora_dist.recipes.ckpt import list_run

    listing = list_run(args.path, every_byte=True)
    damaged = [c for c in listing.checkpoints if c.problems]
    if args.json:
        print(_json(listing))
    else:
        for c in listing.checkpoints:
            print(f"{c.path}: {'damaged' if c.problems else 'verified'}")
            for problem in c.problems:
                print(f"  {problem}")
    if damaged:
        print(f"error: {len(damaged)} of {len(listing.checkpoints)} checkpoints are damaged", file=sys.stderr)
    return 1 if damaged else 0


def _run_export(args: argparse.Namespace) -> int:
    from opensora_dist.recipes.ckpt import export

    done = export(args.path, args.out, weights=args.weights, dtype=args.dtype)
    if args.json:
        print(json.dumps(asdict(done), default=str))
        return 0
    print(f"{done.path}: {done.tensors} tensors, {done.num_bytes:,} bytes, {args.weights} weights of step {done.step}")
    for difference in done.differences:
        print(f"not Open-Sora 1.0's: {difference}")
    return 0


def _print(listing: Listing) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console()
    if not console.is_terminal:
        console = Console(width=200, file=console.file)
    table = Table(title=str(listing.root))
    for column in ("step", "saved (UTC)", "MB", "written by", "files", ""):
        table.add_column(column, justify="right" if column in ("step", "MB") else "left")
    for c in listing.checkpoints:
        files = "; ".join(c.problems) if c.problems else "complete"
        size = "" if c.num_bytes is None else f"{c.num_bytes / 1e6:,.1f}"
        table.add_row(str(c.step), (c.created or "").replace("+00:00", ""), size, _who(c), files, "latest" if c.latest else "")
    console.print(table)
    if listing.unfinished:
        print(f"{listing.unfinished} saves were cut off; the next save removes what is left of them")


def _who(listed: Listed) -> str:
    layout = listed.layout
    backend = f"{layout.get('backend', 'native')} stage {layout['zero_stage']}, " if "zero_stage" in layout else ""
    return f"{backend}{layout.get('mesh', '')}"


def _json(listing: Listing) -> str:
    return json.dumps(asdict(listing), default=str)
