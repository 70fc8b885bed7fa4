"""One JSON object per line: always valid JSON, and readable after a process died in the middle of a line."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from opensora_dist.core.errors import DataError

Record = dict[str, Any]


def to_line(record: Mapping[str, Any]) -> str:
    """``record`` as one line. JSON has no NaN or infinity: such numbers become null and are named in ``"nonfinite"``."""
    bad = sorted(name for name, value in record.items() if isinstance(value, float) and not math.isfinite(value))
    clean = {name: None if name in bad else value for name, value in record.items()}
    if bad:
        clean["nonfinite"] = bad
    return json.dumps(clean, allow_nan=False) + "\n"


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
