"""``events.jsonl``: what happened to a run, when (started, resumed, saved, skipped, stopped, failed)."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from opensora_dist.core.layout import EVENTS_NAME
from opensora_dist.observe.jsonl import LineFile, drop_torn_line, to_line


class EventLog:
    """Appends events, each on the disk's side of the process before ``log`` returns. One process of a run has one: rank 0.

    Args:
        run_dir: The run directory; made if absent.
    """

    def __init__(self, run_dir: Path) -> None:
        path = Path(run_dir) / EVENTS_NAME
        path.parent.mkdir(parents=True, exist_ok=True)
        drop_torn_line(path)
        self._lines = LineFile(path)

    def log(self, event: str, fields: Mapping[str, Any] | None = None) -> None:
        """Writes ``{"time": ISO 8601 UTC, "event": event, **fields}``.

        Args:
            event: A word ("start", "checkpoint", "resume").
            fields: JSON values; a field called ``parameters`` or ``step`` is shown in the report.
        """
        self._lines.write(_line(event, fields or {}))
        self._lines.flush()

    def close(self) -> None:
        """Closes the file; a second call does nothing."""
        self._lines.close()


def append_event(run_dir: Path, event: str, fields: Mapping[str, Any]) -> None:
    """One event, from a process beside the one that has the ``EventLog``: nothing is repaired, since that one may be writing."""
    with open(Path(run_dir) / EVENTS_NAME, "a", encoding="utf-8") as handle:
        handle.write(_line(event, fields))


def _line(event: str, fields: Mapping[str, Any]) -> str:
    assert not {"time", "event"} & fields.keys(), fields
    return to_line({"time": datetime.now(UTC).isoformat(timespec="milliseconds"), "event": event, **fields})
