"""``opensora-dist submit``: a training, a preparation or a benchmark, handed to a scheduler."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from opensora_dist.cli import bench, data, train
from opensora_dist.cli.arguments import config_of, overrides_of
from opensora_dist.config.describe import describe
from opensora_dist.config.site import SiteConfig, site_path
from opensora_dist.core.errors import ConfigError
from opensora_dist.launch.base import BACKENDS

if TYPE_CHECKING:  # at run time it is imported when the verb runs, so that --help is quick
    from opensora_dist.recipes.payload import Command


def add_parser(verbs: Any) -> None:
    """Adds the verb."""
    parser = verbs.add_parser(
        "submit",
        help="hand a training, a preparation or a benchmark to a cluster",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description=(
            "Check a command of this program for the machines it will have, write down what is submitted in launch/NNNN of its run\n"
            "directory, and hand it to Slurm, Kubernetes (Kubeflow Trainer) or SkyPilot. A run that is submitted already is refused.\n\n"
            "  opensora-dist submit --backend slurm --nodes 2 --gpus-per-node 8 --time 24:00:00 --site configs/site/slurm.yaml -- \\\n"
            "      train configs/train/toy.yaml data.path=data/toy-shards run.dir=runs/toy\n"
            "  opensora-dist submit --backend slurm --gpus-per-node 1 --array 16 -- data prepare CONFIG\n"
            "  opensora-dist submit ... --dry-run -- train CONFIG     # shows exactly what would be submitted, and asks nobody\n"
            "  opensora-dist status RUN_DIR; opensora-dist logs RUN_DIR -f; opensora-dist cancel RUN_DIR"
        ),
        epilog="Keys of --site, with their defaults:\n\n" + describe(SiteConfig).replace("%", "%%"),
    )
    parser.add_argument("--backend", choices=BACKENDS, required=True, help="what runs jobs there")
    parser.add_argument("--nodes", type=int, default=1, metavar="N", help="machines (default 1)")
    parser.add_argument("--gpus-per-node", type=int, required=True, metavar="G", help="GPUs of each; 0 for a run on CPUs")
    parser.add_argument("--ranks-per-node", type=int, metavar="R", help="processes of each (default: one per GPU, or 1)")
    parser.add_argument("--time", metavar="D-HH:MM:SS", help="time limit of a job, before which it saves (default: the site's)")
    parser.add_argument(
        "--max-requeues",
        type=int,
        default=3,
        metavar="K",
        help="how often it is started again at most, whatever ended it (default 3)",
    )
    parser.add_argument("--name", metavar="NAME", help="for people (default: run.name)")
    parser.add_argument(
        "--site", type=Path, metavar="FILE", help="YAML that says what the cluster wants to be told (default: $OPENSORA_SITE)"
    )
    parser.add_argument("--array", type=int, metavar="N", help="of `data prepare`: N jobs with a part each, and one that ends it")
    parser.add_argument(
        "--records",
        type=Path,
        metavar="DIR",
        help="where what is submitted is kept, for clusters whose run directory isn't on this machine (default: the run directory)",
    )
    parser.add_argument("--dry-run", action="store_true", help="print what would be submitted, and submit nothing")
    parser.add_argument(
        "command",
        nargs=argparse.REMAINDER,
        metavar="-- COMMAND",
        help="train ..., data prepare ... or bench ..., as without submit",
    )
    parser.set_defaults(run=_run)


def _run(args: argparse.Namespace) -> int:
    from opensora_dist.core.logging import get_logger
    from opensora_dist.recipes.submit import SubmitOptions, prepare_submission, submit

    command = parse_command(args.command[1:] if args.command[:1] == ["--"] else args.command)
    options = SubmitOptions(
        backend=args.backend,
        nodes=args.nodes,
        gpus_per_node=args.gpus_per_node,
        ranks_per_node=args.ranks_per_node,
        time=args.time,
        max_requeues=args.max_requeues,
        name=args.name,
        site=args.site or site_path(),
        array=args.array,
        records=args.records,
    )
    submission = prepare_submission(options, command)
    for warning in submission.warnings:
        get_logger(__name__).warning("not so on this machine, and perhaps no problem there: %s", warning)
    if args.dry_run:
        print(submission.shown())
        return 0
    record = submit(submission)
    print(f"{args.backend} job {', '.join(record.job_ids or ())}: {record.job.folder}")
    return 0


class _Parser(argparse.ArgumentParser):
    """Says what is wrong with the command that is submitted, rather than with ``submit``."""

    def error(self, message: str) -> NoReturn:
        hint = "options of `submit` come before the command" if "unrecognized" in message else f"see `{self.prog} --help`"
        raise ConfigError(f"`{self.prog}`: {message}; {hint}")


def parse_command(words: Sequence[str]) -> Command:
    """What is to be run, by the parsers of its own verbs.

    Raises:
        ConfigError: It is no command that can be submitted.
    """
    from opensora_dist.recipes.payload import Command

    if not words:
        raise ConfigError("no command is given; end with e.g. -- train configs/train/toy.yaml data.path=data/toy-shards")
    parser = _Parser(prog="opensora-dist")
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
    for verb in (train, data, bench):
        verb.add_parser(verbs)
    args = parser.parse_args(list(words))
    if args.verb == "data" and args.action != "prepare":
        raise ConfigError(f"`data {args.action}` can't be submitted; use train, data prepare or bench")
    if args.verb == "bench":
        paths = tuple(str(value) for value in vars(args).values() if isinstance(value, Path))
        return Command(kind="bench", words=tuple(words), out=args.out, paths=paths)
    part = getattr(args, "part", None)
    if part is not None:
        data.parse_part(part)
    config = config_of(args)
    return Command(
        kind="train" if args.verb == "train" else "prepare",
        words=tuple(words),
        config=config,
        overrides=tuple(overrides_of(args)),
        part=part,
    )
