"""Things taken several at a time."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import islice
from typing import TypeVar

T = TypeVar("T")


def batched(items: Iterable[T], size: int) -> Iterator[tuple[T, ...]]:
    """``itertools.batched`` of Python 3.12: tuples of ``size`` items, the last as short as it has to be."""
    rest = iter(items)
    while batch := tuple(islice(rest, size)):
        yield batch
