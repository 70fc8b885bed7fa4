"""What stages have found so far: an append-only store of JSON values, addressed by what they follow from.

A value's key is a hash of everything it depends on: the input, the stage's part of the config, the stage's version. So a changed config
finds what is still true, and nothing has to be declared stale.

Every process writes a segment of its own, ``.prepare/stages/<name>-<pid>-<random>.jsonl``, so that workers, array tasks and machines share
a folder without locks. A line holds one or several records and is written at once: what is put together is found together or not at all,
and a line torn by a kill is ignored. Lines reach the operating system as they are put, so that a killed process loses none of them, and
the disk every ``SYNC_EVERY_S`` and at the end, so that a power cut costs that much work and no more.
"""

from __future__ import annotations

import json
import os
import time
import uuid
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import xxhash

from opensora_dist.core.io import atomic_file

SYNC_EVERY_S = 30.0
_SEGMENTS_KEPT = 8  # beyond so many, they are written into one


def address(*parts: Any) -> str:
    """The key of what follows from ``parts``, plain JSON values: 32 hex digits."""
    return xxhash.xxh3_128_hexdigest(json.dumps(parts, sort_keys=True, separators=(",", ":")).encode())


class StageStore:
    """All records of a folder, in memory, and a segment for new ones. The last record of a key counts.

    Args:
        folder: ``.prepare/stages`` of an output folder; made where it is missing.
        name: What the segment's name begins with.
    """

    def __init__(self, folder: Path, *, name: str = "main") -> None:
        self._folder, self._name = folder, name
        folder.mkdir(parents=True, exist_ok=True)
        self._records: dict[str, dict[str, Any]] = {}  # by stage, then key
        for segment in sorted(folder.glob("*.jsonl"), key=lambda path: (path.stat().st_mtime_ns, path.name)):
            for stage, key, value in _read_segment(segment):
                self._records.setdefault(stage, {})[key] = value
        self._file: BinaryIO | None = None
        self._synced_s = time.monotonic()

    def __enter__(self) -> StageStore:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def get(self, stage: str, key: str) -> Any:
        """The value, or None where there is none."""
        return self._records.get(stage, {}).get(key)

    def put(self, stage: str, key: str, value: Any) -> None:
        """Records one value, a plain JSON one other than None."""
        self.put_all([(stage, key, value)])

    def put_all(self, records: Iterable[tuple[str, str, Any]]) -> None:
        """Records (stage, key, value) triples, all or none of which outlive a kill. Of None as value, the record is forgotten."""
        records = list(records)
        if not records:
            return
        if self._file is None:  # a process that has nothing to say leaves no file
            self._file = open(self._folder / f"{self._name}-{os.getpid()}-{uuid.uuid4().hex[:8]}.jsonl", "ab", buffering=0)  # noqa: SIM115
        line = memoryview(_line(records))
        while line:
            line = line[self._file.write(line) :]
        for stage, key, value in records:
            self._records.setdefault(stage, {})[key] = value
        if time.monotonic() - self._synced_s > SYNC_EVERY_S:
            os.fsync(self._file.fileno())
            self._synced_s = time.monotonic()

    def compact(self) -> None:
        """Writes many segments into one. Only for a process that has the folder to itself."""
        segments = sorted(self._folder.glob("*.jsonl"))
        if len(segments) <= _SEGMENTS_KEPT:
            return
        self.close()
        with atomic_file(self._folder / "base.jsonl") as handle:
            for stage, records in self._records.items():
                handle.writelines(_line([(stage, key, value)]) for key, value in records.items() if value is not None)
        for segment in segments:  # killed here, it leaves records twice, which are equal
            if segment.name != "base.jsonl":
                segment.unlink()

    def close(self) -> None:
        """Makes the segment durable; a later ``put`` begins another."""
        if self._file is not None:
            os.fsync(self._file.fileno())
            self._file.close()
            self._file = None


def _line(records: list[tuple[str, str, Any]]) -> bytes:
    return json.dumps(records, separators=(",", ":"), allow_nan=False).encode() + b"\n"


def _read_segment(path: Path) -> Iterable[tuple[str, str, Any]]:
    with open(path, "rb") as handle:
        for line in handle:
            try:
                yield from json.loads(line)
            except ValueError:  # torn by a kill, or by a power cut
                continue
