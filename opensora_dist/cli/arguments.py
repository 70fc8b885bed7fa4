"""The arguments every verb with a config takes: one YAML file, which may be left out, and ``section.key=value`` overrides."""

from __future__ import annotations

import argparse
import re
from pathlib import Path

_OVERRIDE = re.compile(r"[A-Za-z_][\w.]*=")


def add_config_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds ``[CONFIG] [section.key=value ...]``."""
    parser.add_argument(
        "config",
        nargs="*",
        metavar="CONFIG | section.key=value",
        help="a YAML file (`extends: OTHER.yaml` in it names a parent), then overrides, in order; their values are YAML",
    )


def config_of(args: argparse.Namespace) -> Path | None:
    """The file, or None where the first argument is an override already."""
    return Path(args.config[0]) if args.config and not _OVERRIDE.match(args.config[0]) else None


def overrides_of(args: argparse.Namespace) -> list[str]:
    """Everything after the file."""
    return list(args.config if config_of(args) is None else args.config[1:])
