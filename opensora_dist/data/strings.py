"""The texts of a data set, which stay in its file: a row group is decoded when one of its samples is asked for.

They are for messages, pages and checks. The way of a sample into training asks for none.
"""

from __future__ import annotations

import threading
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import SupportsIndex, overload

import pyarrow as pa
import pyarrow.parquet as pq

_GROUPS_KEPT = 8


@dataclass(frozen=True, kw_only=True)
class StringsOf:
    """The texts of one data set of several.

    Args:
        path: Its index.
        num_samples: How many it has.
        prefix: What is put before each.
    """

    path: Path
    num_samples: int
    prefix: str = ""


class Strings(Sequence[str]):
    """One text column over the rows of one or several indexes. Threads may share it.

    Args:
        parts: The data sets, in the order of their rows.
        column: Its name.
    """

    def __init__(self, parts: Sequence[StringsOf], column: str) -> None:
        self._parts, self._column = tuple(parts), column
        self._starts = list(accumulate((p.num_samples for p in parts), initial=0))
        self._groups: OrderedDict[tuple[int, int], pa.Array] = OrderedDict()
        self._files: dict[int, tuple[pq.ParquetFile, list[int]]] = {}
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return self._starts[-1]

    @overload
    def __getitem__(self, row: SupportsIndex) -> str: ...
    @overload
    def __getitem__(self, row: slice) -> list[str]: ...
    def __getitem__(self, row: SupportsIndex | slice) -> str | list[str]:
        if isinstance(row, slice):
            return [self[i] for i in range(*row.indices(len(self)))]
        number = int(row)
        if not 0 <= number < len(self):
            raise IndexError(f"row {number} of {len(self)}")
        part = bisect_right(self._starts, number) - 1
        with self._lock:
            starts = self._file(part)[1]
            inside = number - self._starts[part]
            group = bisect_right(starts, inside) - 1
            return self._parts[part].prefix + str(self._group(part, group)[inside - starts[group]])

    def __iter__(self) -> Iterator[str]:
        for i, part in enumerate(self._parts):
            for group in range(len(self._file(i)[1]) - 1):
                with self._lock:
                    values = self._group(i, group)
                yield from (part.prefix + str(value) for value in values)

    def pick(self, rows: Sequence[int]) -> Picked:
        """Those of some rows, read when they are looked at."""
        return Picked(self, rows)

    def _file(self, part: int) -> tuple[pq.ParquetFile, list[int]]:
        """Of a part, and the rows at which its row groups start."""
        if part not in self._files:
            file = pq.ParquetFile(self._parts[part].path)
            sizes = (file.metadata.row_group(i).num_rows for i in range(file.num_row_groups))
            self._files[part] = file, list(accumulate(sizes, initial=0))
        return self._files[part]

    def _group(self, part: int, group: int) -> pa.Array:
        if (part, group) not in self._groups:
            table = self._file(part)[0].read_row_group(group, columns=[self._column])
            self._groups[part, group] = table.column(0).combine_chunks()
            if len(self._groups) > _GROUPS_KEPT:
                self._groups.popitem(last=False)
        self._groups.move_to_end((part, group))
        return self._groups[part, group]


class Picked(Sequence[str]):
    """Texts of some rows. Most batches are trained on without anyone looking at their keys, and a row group is decoded for each."""

    def __init__(self, strings: Strings, rows: Sequence[int]) -> None:
        self._strings, self._rows = strings, tuple(rows)

    def __len__(self) -> int:
        return len(self._rows)

    @overload
    def __getitem__(self, number: int) -> str: ...
    @overload
    def __getitem__(self, number: slice) -> list[str]: ...
    def __getitem__(self, number: int | slice) -> str | list[str]:
        if isinstance(number, slice):
            return [self._strings[row] for row in self._rows[number]]
        return self._strings[self._rows[number]]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and tuple(self) == tuple(other)

    def __hash__(self) -> int:
        return hash(tuple(self))

    def __repr__(self) -> str:
        return repr(tuple(self))
