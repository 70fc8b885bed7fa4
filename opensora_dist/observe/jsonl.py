"""One JSON object per line: always valid JSON, and readable after a process died in the middle of a line."""

from __future__ import annotations

import errno
import json
import math
import os
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from opensora_dist.core.errors import DataError
from opensora_dist.core.logging import get_logger

_log = get_logger(__name__)

Record = dict[str, Any]


def to_line(record: Mapping[str, Any]) -> str:
    """``record`` as one line. JSON has no NaN or infinity: such numbers become null and are named in ``"nonfinite"``."""
    bad = sorted(name for name, value in record.items() if isinstance(value, float) and not math.isfinite(value))
    clean = {name: None if name in bad else value for name, value in record.items()}
    if bad:
        clean["nonfinite"] = bad
    return json.dumps(clean, allow_nan=False) + "\n"


class LineFile:
    """Lines added to the end of a file, by any thread. While its disk is full they wait in memory, and nothing fails.

    Raises:
        OSError: Any other trouble than a full disk.
    """

    def __init__(self, path: Path) -> None:
        self._path, self._waiting, self._full = Path(path), b"", False
        self._lock = threading.Lock()
        self._handle = open(path, "ab", buffering=0)  # noqa: SIM115 - open as long as the run

    def write(self, line: str) -> None:
        """Keeps a line for the next ``flush``."""
        with self._lock:
            self._waiting += line.encode()

    def flush(self) -> None:
        """Hands what waits to the system, as far as there is room."""
        try:
            with self._lock:
                while self._waiting:
                    self._waiting = self._waiting[self._handle.write(self._waiting) :]
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            if not self._full:
                _log.error(
                    "%s: %s; its lines wait in memory, and are lost if the run ends before there is room", self._path, error
                )
            self._full = True
        else:
            if self._full:
                _log.warning("%s: there is room again, and every line is written", self._path)
            self._full = False

    def sync(self) -> None:
        """``flush``, down to the disk."""
        self.flush()
        if not self._full:
            os.fsync(self._handle.fileno())

    def close(self) -> None:
        """Flushes and closes, and says what is lost; a second call does nothing."""
        if not self._handle.closed:
            self.flush()
            self._handle.close()
            if self._waiting:
                _log.error("%s: the disk is still full; %d lines are lost", self._path, self._waiting.count(b"\n"))


def read_records(path: Path) -> list[Record]:
    """All records of a file, none if it is absent. A last line that was cut off is left out.

    Raises:
        DataError: A line before the last is no JSON object.
    """
    path = Path(path)
    if not path.is_file():
        return []
    lines = path.read_bytes().split(b"\n")
    records: list[Record] = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
            if not isinstance(record, dict):
                raise ValueError(f"expected a JSON object, got {type(record).__name__}")
        except ValueError as error:  # json's and unicode's errors are ValueErrors
            if any(rest.strip() for rest in lines[number:]):
                raise DataError(f"{path}, line {number}: {error}; repair the line, or move the file away") from error
            break
        records.append(record)
    return records


def drop_torn_line(path: Path) -> None:
    """Cuts off what follows the last newline, so that appending doesn't glue a new record to half of an old one."""
    path = Path(path)
    if not path.is_file():
        return
    with open(path, "rb+") as handle:
        data = handle.read()
        end = data.rfind(b"\n") + 1
        if end < len(data):
            handle.truncate(end)
