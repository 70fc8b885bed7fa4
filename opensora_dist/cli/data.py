"""``opensora-dist data``: making and preparing data sets."""

from __future__ import annotations

import argparse
import json
import re
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from opensora_dist.cli.arguments import add_config_arguments, config_of, overrides_of
from opensora_dist.config.describe import describe
from opensora_dist.config.prepare import PrepareConfig
from opensora_dist.core.errors import ConfigError

_DROPS_SHOWN = 20
_FINDINGS_SHOWN = 20


def add_parser(verbs: Any) -> None:
    """Adds the verb and its own verbs."""
    parser = verbs.add_parser(
        "data",
        help="make toy clips; prepare videos; check and count what came of it",
        description="Make, prepare, check and count data sets.",
    )
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    _add_toy(actions)
    _add_prepare(actions)
    _add_check(actions)
    _add_stats(actions)


def _add_toy(actions: Any) -> None:
    toy = actions.add_parser(
        "toy",
        help="write captioned clips of coloured shapes that move",
        description="Write H.264 clips of coloured shapes moving over textured backgrounds, exact captions, and ground truth in "
        "metadata.parquet. Clip i depends on the seed and i alone; a call that was cut off goes on where it was.",
    )
    toy.add_argument("out", type=Path, metavar="OUT", help="a folder of its own")
    toy.add_argument("--clips", type=int, default=64, metavar="N", help="number of clips (default 64)")
    toy.add_argument("--seed", type=int, default=0, metavar="S", help="chooses the clips (default 0)")
    toy.add_argument("--sizes", nargs="+", metavar="HxW", help="frame sizes to draw from")
    toy.add_argument("--lengths", nargs="+", type=int, metavar="T", help="numbers of frames to draw from")
    toy.add_argument("--moves", nargs="+", type=int, metavar="M", help="movements per clip to draw from")
    toy.add_argument("--texture", type=float, metavar="X", help="contrast of the background, 0 to 1")
    toy.add_argument("--levels", type=float, nargs=2, metavar=("LOW", "HIGH"), help="mean grey of the background, 0 to 255")
    toy.set_defaults(run=_run_toy)


def _add_prepare(actions: Any) -> None:
    prepare = actions.add_parser(
        "prepare",
        help="turn captioned videos into shards of latents",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description=(
            "Find shots, cut, score, filter, caption, clean and encode a folder of videos and images into WebDataset shards of latents and\n"
            "text vectors, with one Parquet index. Run the same command again after an interruption, or with other thresholds: only what\n"
            "isn't known yet is done.\n\n"
            "  opensora-dist data prepare input.path=videos output.path=shards clip.buckets='[[16, 256, 256]]'\n"
            "  opensora-dist data prepare CONFIG --part 3/16    # one job of an array; the same command without --part makes the shards"
        ),
        epilog="Config keys, with their defaults:\n\n" + describe(PrepareConfig).replace("%", "%%"),
    )
    add_config_arguments(prepare)
    prepare.add_argument(
        "--part",
        metavar="K/N",
        help="take the Kth of N parts of the sources up to encoded clips; any number of parts run at once",
    )
    prepare.add_argument("--json", action="store_true", help="print the report as JSON")
    prepare.set_defaults(run=_run_prepare)


def _add_check(actions: Any) -> None:
    check = actions.add_parser(
        "check",
        help="read every byte of a data set",
        description="Compare every shard of a data set with its index: sizes, hashes, the structure of the tars, where each array lies, "
        "what it is and whether it is finite; and the index with itself. A damaged shard doesn't keep the others from being seen. Exit "
        "code 1 where anything is wrong; empty captions and statistics that are off are warnings.",
    )
    check.add_argument("path", metavar="PATH", help="a prepared folder, or as data.path: a URL, or tars that others made")
    check.add_argument(
        "--config",
        type=Path,
        metavar="TRAIN.yaml",
        dest="train_config",
        help="a training config, whose data section says how PATH is read",
    )
    check.add_argument("--workers", type=int, metavar="N", help="processes (default: one per core)")
    check.add_argument("--json", action="store_true", help="print as JSON")
    check.set_defaults(run=_run_check)


def _add_stats(actions: Any) -> None:
    stats = actions.add_parser(
        "stats",
        help="say what is in a data set, what was left out and why, and what a training makes of it",
        description="Count buckets, sizes, tokens and captions of a data set, scores and reasons of the clips that its preparation looked "
        "at, and, with a training config, what each bucket yields: samples used and steps per epoch, what is left out and why. No shard is "
        "read. Exit code 1 where there is no sample, or the config can't train on it at all.",
    )
    stats.add_argument(
        "path", nargs="?", metavar="PATH", help="a prepared folder, or as data.path; default: the data of the config"
    )
    stats.add_argument("--config", type=Path, metavar="TRAIN.yaml", dest="train_config", help="a training config")
    stats.add_argument(
        "--set", nargs="+", default=[], metavar="section.key=value", dest="overrides", help="of the training config"
    )
    stats.add_argument("--html", type=Path, metavar="OUT", help="write one self-contained page, with pictures")
    stats.add_argument("--json", action="store_true", help="print as JSON")
    stats.set_defaults(run=_run_stats)


def _run_toy(args: argparse.Namespace) -> int:
    from opensora_dist.observe.progress import Bar
    from opensora_dist.prepare.toy.generate import generate
    from opensora_dist.prepare.toy.render import ToyOptions

    asked: dict[str, Any] = {}
    if args.sizes:
        asked["sizes"] = tuple(_size(text) for text in args.sizes)
    for name in ("lengths", "moves", "levels"):
        if getattr(args, name):
            asked[name] = tuple(getattr(args, name))
    if args.texture is not None:
        asked["texture"] = args.texture
    with Bar("toy clips", total=args.clips) as bar:
        report = generate(
            args.out, clips=args.clips, seed=args.seed, options=ToyOptions(**asked), on_progress=lambda done, _: bar.update(done)
        )
    print(f"{report.rendered} clips written, {report.kept} kept: {report.metadata}")
    return 0


def _size(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"(\d+)x(\d+)", text)
    if not match:
        raise ConfigError(f"--sizes {text!r} is not HEIGHTxWIDTH; write e.g. 64x96")
    return int(match[1]), int(match[2])


def _run_prepare(args: argparse.Namespace) -> int:
    from opensora_dist.recipes.prepare import prepare_dataset, prepare_dataset_part

    if args.part is not None:
        part = prepare_dataset_part(config_of(args), part=parse_part(args.part), overrides=overrides_of(args))
        rest = (
            "the same parts again, once all are scored: duplicates are known then"
            if part.waits
            else "no --part, once all are done"
        )
        said = f"part {part.part}/{part.parts}: {part.sources} sources, {part.clips} clips worked on; next: {rest}"
        print(json.dumps(asdict(part)) if args.json else said)
        return 0
    report = prepare_dataset(config_of(args), overrides=overrides_of(args))
    if args.json:
        print(json.dumps(asdict(report)))
        return 0
    print(f"{report.samples} samples in {report.shards} shards, {report.clips_per_s:.1f} clips/s")
    for bucket, count in report.buckets.items():
        print(f"  {bucket}: {count}")
    if report.cut_captions:
        print(f"{report.cut_captions} captions were longer than text.max_tokens and have been cut")
    for stage, reasons in report.reasons.items():
        for reason, count in reasons.items():
            print(f"dropped by {stage}: {count} x {reason}")
    for drop in report.dropped[:_DROPS_SHOWN]:
        where = "" if drop.start_s is None else f" at {drop.start_s:.2f} s"
        print(f"dropped {drop.source}{where}: {drop.reason}")
    if report.num_dropped > _DROPS_SHOWN:
        print(f"... and {report.num_dropped - _DROPS_SHOWN} more, all in clips.parquet beside the shards")
    return 0


def parse_part(text: str) -> tuple[int, int]:
    """``3/16`` to (3, 16).

    Raises:
        ConfigError: It is no part of anything.
    """
    match = re.fullmatch(r"(\d+)/(\d+)", text)
    if not match or not 1 <= int(match[1]) <= int(match[2]):
        raise ConfigError(f"--part {text!r} is not K/N; write e.g. 3/16, K from 1 to N")
    return int(match[1]), int(match[2])


def _run_check(args: argparse.Namespace) -> int:
    from opensora_dist.recipes.data_check import check_data

    if args.workers is not None and args.workers < 1:
        raise ConfigError(f"--workers={args.workers} must be at least 1")
    check = check_data(args.path, config=args.train_config, workers=args.workers)
    if args.json:
        print(json.dumps(asdict(check)))
    else:
        for warning in check.warnings[:_FINDINGS_SHOWN]:
            print(f"warning: {warning}")
        if len(check.warnings) > _FINDINGS_SHOWN:
            print(f"... and {len(check.warnings) - _FINDINGS_SHOWN} warnings more; --json lists all")
        for problem in check.problems:
            print(problem)
        print(
            f"{check.samples:,} samples in {check.shards:,} shards, {check.num_bytes:,} bytes: {'damaged' if check.problems else 'whole'}"
        )
    if check.problems:
        print(f"error: {len(check.problems)} problems in {check.path}", file=sys.stderr)
    return 1 if check.problems else 0


def _run_stats(args: argparse.Namespace) -> int:
    from opensora_dist.recipes.data_stats import data_stats, in_words, write_page

    stats, index = data_stats(args.path, config=args.train_config, overrides=args.overrides)
    if args.html is not None:
        write_page(args.html, stats, index)
    print(json.dumps(asdict(stats)) if args.json else "\n".join(in_words(stats)))
    if args.html is not None and not args.json:
        print(args.html)
    problem = stats.training.problem if stats.training else None
    if not stats.samples:
        problem = f"{stats.path} has no sample: its preparation left out everything, for the reasons above"
    if problem:
        print(f"error: {problem}", file=sys.stderr)
    return 1 if problem else 0
