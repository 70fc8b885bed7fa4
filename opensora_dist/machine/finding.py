"""What was looked at, and what was found: the one shape that ``doctor`` shows and ``preflight`` decides by."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any


class Level(StrEnum):
    """How much it matters."""

    OK = "ok"
    NOTE = "note"  # something optional isn't here
    WARNING = "warning"  # training runs, but slower than it could, or not everywhere
    PROBLEM = "problem"  # training can't run here, or its result can't be trusted


@dataclass(frozen=True, kw_only=True)
class Finding:
    """
    Args:
        subject: Heading under which it is shown: ``gpus``, ``network``, ...
        name: What was looked at.
        level: How much it matters.
        said: What was found, with its unit.
        remedy: The way out; None where nothing is to be done.
        values: Numbers and names behind it, as JSON values.
    """

    subject: str
    name: str
    level: Level
    said: str
    remedy: str | None = None
    values: Mapping[str, Any] | None = None

    def __str__(self) -> str:
        remedy = "" if self.remedy is None else f"; {self.remedy}"
        return f"{self.subject}, {self.name}: {self.said}{remedy}"


@dataclass(frozen=True)
class Subject:
    """Makes findings of one subject.

    Args:
        name: ``Finding.subject``.
    """

    name: str

    def finding(
        self, name: str, level: Level, said: str, remedy: str | None = None, *, values: Mapping[str, Any] | None = None
    ) -> Finding:
        """Arguments as ``Finding`` has them."""
        return Finding(subject=self.name, name=name, level=level, said=said, remedy=remedy, values=values)


def problems_of(findings: Iterable[Finding]) -> tuple[str, ...]:
    """What keeps a training from running, each with its way out."""
    return tuple(str(f) for f in findings if f.level is Level.PROBLEM)
