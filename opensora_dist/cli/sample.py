"""``opensora-dist sample``."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from opensora_dist.cli.arguments import add_sampling_arguments, start_ranks
from opensora_dist.core.errors import ConfigError
from opensora_dist.core.io import read_utf8


def add_parser(verbs: Any) -> None:
    """Adds the verb."""
    parser = verbs.add_parser(
        "sample", help="draw videos from a checkpoint", description="Draw videos from a checkpoint, as mp4."
    )
    add_sampling_arguments(parser)
    parser.add_argument("--prompt", action="append", default=[], metavar="TEXT", help="a caption; may be given again")
    parser.add_argument("--prompt-file", type=Path, metavar="FILE", help="a file with one caption per line")
    parser.add_argument("--count", type=int, default=1, metavar="N", help="videos per caption (default 1)")
    parser.add_argument("--out", type=Path, metavar="DIR", help="where to (default: samples/manual in the run)")
    parser.set_defaults(run=_run)


def _run(args: argparse.Namespace) -> int:
    from opensora_dist.cli.arguments import sampling_options
    from opensora_dist.recipes.sample import sample

    prompts = list(args.prompt)
    if args.prompt_file is not None:
        if not args.prompt_file.is_file():
            raise ConfigError(
                f"--prompt-file={str(args.prompt_file)!r} is not a file; give a text file with one caption per line"
            )
        prompts += [line.strip() for line in read_utf8(args.prompt_file).splitlines() if line.strip()]
    if args.count < 1:
        raise ConfigError(f"--count={args.count} must be at least 1")
    options = sampling_options(args)
    if (code := start_ranks(args)) is not None:
        return code
    files = sample(args.checkpoint, prompts=prompts, out=args.out, count=args.count, **options)
    for path in (*files.videos, files.contact_sheet) if files else ():
        print(path)
    return 0
