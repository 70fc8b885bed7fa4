"""``opensora-dist evaluate``."""

from __future__ import annotations

import argparse
import json
import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

from opensora_dist.cli.arguments import add_sampling_arguments, start_ranks
from opensora_dist.core.errors import ConfigError
from opensora_dist.core.extras import require_extra


def add_parser(verbs: Any) -> None:
    """Adds the verb."""
    parser = verbs.add_parser(
        "evaluate",
        help="score a checkpoint on toy prompts it has not seen",
        description="Draw toy captions that no toy data set contains, and score by classical vision whether colour, shape, size and "
        "direction are those of the caption, and whether there is one whole object.",
    )
    add_sampling_arguments(parser)
    parser.add_argument("--count", type=int, default=36, metavar="N", help="captions (default 36)")
    parser.add_argument("--repeats", type=int, default=1, metavar="R", help="videos per caption (default 1)")
    parser.add_argument("--moves", type=int, nargs="+", default=[1, 2], metavar="M", help="movements per caption (default 1 2)")
    parser.add_argument("--out", type=Path, metavar="DIR", help="where evaluation.json and evaluation.png go (default: the run)")
    parser.add_argument("--json", action="store_true", help="print the rates as JSON")
    parser.set_defaults(run=_run)


def _run(args: argparse.Namespace) -> int:
    require_extra("cv2", extra="prepare", wanted_by="`evaluate`, which scores videos with OpenCV,")
    from opensora_dist.cli.arguments import sampling_options
    from opensora_dist.observe.progress import Bar
    from opensora_dist.recipes.evaluate import evaluate

    problems = [f"--{n}={getattr(args, n)} must be at least 1" for n in ("count", "repeats") if getattr(args, n) < 1]
    if problems:
        raise ConfigError(problems)
    options = sampling_options(args)
    if (code := start_ranks(args)) is not None:
        return code
    with Bar("videos", total=args.count * args.repeats, enabled=os.environ.get("RANK", "0") == "0") as bar:
        found = evaluate(
            args.checkpoint,
            count=args.count,
            num_moves=tuple(args.moves),
            repeats=args.repeats,
            out=args.out,
            on_progress=bar.update,
            **options,
        )
    if found is None:
        return 0
    if args.json:
        print(json.dumps(asdict(found.summary)))
        return 0
    rates = {name: value for name, value in asdict(found.summary).items() if name != "videos"}
    print(f"of {found.summary.videos} videos: " + ", ".join(f"{name} {100 * value:.0f}%" for name, value in rates.items()))
    print(found.result)
    print(found.contact_sheet)
    return 0
