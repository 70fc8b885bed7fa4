"""``opensora-dist train``."""

from __future__ import annotations

import argparse
from typing import Any

from opensora_dist.cli.arguments import add_config_arguments, config_of, overrides_of
from opensora_dist.config.describe import describe
from opensora_dist.config.train import TrainConfig


def add_parser(verbs: Any) -> None:
    """Adds the verb."""
    parser = verbs.add_parser(
        "train",
        help="train a model",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description=(
            "Train a model. Starts its own ranks (parallel.nproc) where torchrun has not; the same command again resumes.\n\n"
            "  opensora-dist train configs/train/toy.yaml data.path=data/toy-shards run.steps=500\n"
            "  torchrun --nproc-per-node 8 -m opensora_dist train CONFIG"
        ),
        epilog="Config keys, with their defaults:\n\n" + describe(TrainConfig).replace("%", "%%"),
    )
    add_config_arguments(parser)
    parser.set_defaults(run=_run)


def _run(args: argparse.Namespace) -> int:
    from opensora_dist.recipes.train import train

    return train(config_of(args), overrides=overrides_of(args))
