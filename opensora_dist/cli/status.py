"""``opensora-dist status``."""

from __future__ import annotations

import argparse
from typing import Any


def add_parser(verbs: Any) -> None:
    """Adds the verb."""
    parser = verbs.add_parser("status", help="not written yet")
    parser.set_defaults(run=_run)


def _run(args: argparse.Namespace) -> int:
    raise NotImplementedError
