"""How each rank ended, in a file that outlives it, for who decides whether to start the run again.

A launcher sees exit codes, and torchrun's is 1 whatever happened. But a mistake in the code comes again at every start, and a node that is
gone does not: so each rank says of itself which it was. A rank that says nothing was killed.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum
from pathlib import Path
from typing import Final

ENDINGS_VARIABLE: Final = "OPENSORA_ENDINGS"
"""Names the folder; where it isn't set, nothing is noted."""


class Ending(StrEnum):
    """Why a rank ended."""

    DONE = "done"
    STOPPED = "stopped"  # saved, as asked
    CONFIG = "config"  # it would fail again, at once
    ERROR = "error"  # it would fail again
    LOST = "lost contact"  # of another rank, which ended first or can't be reached
    HANG = "hang"  # ended by the watchdog
    DEVICE = "device"  # a GPU or its driver failed
    KILLED = "killed"  # said nothing


def note_ending(ending: Ending, said: str) -> None:
    """Writes this rank's, once; the first counts."""
    raise NotImplementedError


def read_endings(folder: Path, *, world: int) -> Mapping[int, tuple[Ending, str]]:
    """Of every rank; ``KILLED`` of those that said nothing."""
    raise NotImplementedError
