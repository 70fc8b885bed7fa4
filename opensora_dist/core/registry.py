"""Closed registries: a config names an entry, never a class path."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable
from typing import Generic, TypeVar

from opensora_dist.core.errors import ConfigError

T = TypeVar("T")


def nearest(name: str, known: Iterable[str]) -> str:
    """``"; did you mean 'x'?"`` for the closest known name, or an empty string."""
    match = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f"; did you mean '{match[0]}'?" if match else ""


class Registry(Generic[T]):
    """Names to entries of one kind.

    Args:
        field: The config field that chooses an entry, for messages ("objective.name").
    """

    def __init__(self, field: str) -> None:
        self.field = field
        self._entries: dict[str, T] = {}

    def register(self, name: str) -> Callable[[T], T]:
        """Decorator that adds an entry; a second entry of the same name is a mistake of ours."""

        def add(entry: T) -> T:
            assert name not in self._entries, f"{self.field}={name} is registered twice"
            self._entries[name] = entry
            return entry

        return add

    def get(self, name: str) -> T:
        """The entry called ``name``.

        Raises:
            ConfigError: There is no such entry; the message lists those that exist.
        """
        if name not in self._entries:
            known = ", ".join(sorted(self._entries))
            raise ConfigError(f"{self.field}={name!r} is not known; use one of: {known}{nearest(name, self._entries)}")
        return self._entries[name]

    def names(self) -> list[str]:
        """All names, sorted."""
        return sorted(self._entries)
