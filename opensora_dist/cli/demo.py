"""``opensora-dist demo``."""

from __future__ import annotations

import argparse
from dataclasses import asdict
from pathlib import Path
from typing import Any

from opensora_dist.core.extras import require_extra


def add_parser(verbs: Any) -> None:
    """Adds the verb."""
    parser = verbs.add_parser(
        "demo",
        help="everything once: toy videos, shards, training, a sampled video, a report",
        description="Make toy videos, prepare them, train on them with two ranks, draw videos, score them, and write a report; "
        "minutes on two CPU cores, with nothing downloaded. A second call goes on where the first was cut off.",
    )
    parser.add_argument(
        "out", nargs="?", type=Path, default=Path("demo"), metavar="OUT", help="folder for it all (default: demo)"
    )
    parser.add_argument("--steps", type=int, help="optimizer steps, for a quicker look or a better model")
    parser.set_defaults(run=_run)


def _run(args: argparse.Namespace) -> int:
    require_extra("cv2", extra="prepare", wanted_by="`demo`, which resizes and scores videos with OpenCV,")
    from rich.console import Console

    from opensora_dist.recipes.demo import demo

    console = Console(stderr=True)
    result = demo(args.out, steps=args.steps, say=lambda text: console.print(f"[bold]{text}[/bold]"))
    rates = {name: value for name, value in asdict(result.evaluation.summary).items() if name != "videos"}
    video = result.samples.videos[0]
    print(f"\ndone in {result.seconds / 60:.1f} minutes; of {result.evaluation.summary.videos} unseen captions:", end=" ")
    print(", ".join(f"{name} {100 * value:.0f}%" for name, value in rates.items()))
    print(f"video          {video}")
    print(f"contact sheet  {result.samples.contact_sheet}")
    print(f"report         {result.report}")
    print("\nwhat next")
    print(f'  opensora-dist sample {result.run_dir} --prompt "a large yellow cross moves up"')
    print("  opensora-dist train --help                 every key of a config, with its default")
    print("  opensora-dist data prepare input.path=MY_VIDEOS output.path=shards   your own clips")
    return 0
