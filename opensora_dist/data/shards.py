"""The shards of a data set, by number, as file descriptors: files of this machine, or fetched into its cache."""

from __future__ import annotations

import os
import threading
import time
from bisect import bisect_right
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from opensora_dist.core.index import ShardRow
from opensora_dist.core.logging import get_logger
from opensora_dist.data.cache import ShardCache, Wanted
from opensora_dist.data.transport import FetchError

_log = get_logger(__name__)
_FAILED_S = (
    300.0  # a shard that could not be had is not asked for again so soon: each of its samples would wait through all attempts
)
_FETCHERS = 4  # threads that fetch ahead


class ShardSource(Protocol):
    """The shards of one data set, by number. Any thread may use it."""

    def open(self, number: int) -> int:
        """A descriptor to read shard ``number`` with; the caller closes it.

        Raises:
            OSError: It is not there, or can't be brought here.
        """

    def path_of(self, number: int) -> str:
        """What messages call the shard: its path or URL, without secrets."""

    def prefetch(self, numbers: Sequence[int]) -> None:
        """The shards that are read next, in that order; replaces what was said before. Returns at once."""

    def discard(self, number: int) -> bool:
        """Gives up this machine's copy of a shard whose bytes were read and are wrong.

        Returns:
            Whether to open and read it once more: what is there now, or is fetched by the next ``open``, was compared with the index.
            False where there is no other than what was read, as of files of this machine.
        """

    def close(self) -> None:
        """Ends what runs beside."""


class LocalShards:
    """Shards that are files of this machine."""

    def __init__(self, paths: Sequence[Path | str]) -> None:
        self._paths = tuple(paths)

    @classmethod
    def beside(cls, folder: Path, rows: Sequence[ShardRow]) -> LocalShards:
        """Those of an index, in its folder. Of ten thousand, a ``Path`` each would take a tenth of a second."""
        return cls([os.path.join(folder, row.name) for row in rows])

    def open(self, number: int) -> int:
        return os.open(self._paths[number], os.O_RDONLY | os.O_CLOEXEC)

    def path_of(self, number: int) -> str:
        return str(self._paths[number])

    def prefetch(self, numbers: Sequence[int]) -> None:
        """Nothing to do: the kernel reads ahead."""

    def discard(self, number: int) -> bool:
        return False

    def close(self) -> None:
        """Nothing to end."""


class RemoteShards:
    """Shards that are fetched into the cache of this machine.

    Args:
        cache: The cache.
        wanted: The shards, in the order of the index.
        ahead: How many shards ``prefetch`` fetches ahead.
    """

    def __init__(self, cache: ShardCache, wanted: Sequence[Wanted], *, ahead: int) -> None:
        self._cache = cache
        self._wanted = tuple(wanted)
        if (total := sum(w.num_bytes or 0 for w in self._wanted)) > cache.max_bytes:
            _log.info(
                "%s and %d more shards have %.1f GiB, data.cache.max_gib is %g: shards are fetched more than once; data.shuffle_shards "
                "keeps those few that are read at a time",
                self._wanted[0].shown,
                len(self._wanted) - 1,
                total / 2**30,
                cache.max_bytes / 2**30,
            )
        self._ahead = ahead
        self._failed: dict[int, tuple[str, float]] = {}  # what was said, and until when
        self._queue: deque[int] = deque()
        self._running: set[int] = set()
        self._changed = threading.Condition()
        self._stop = threading.Event()  # of what runs now; replaced when it is set, so that a closed source can be used again
        self._threads: list[threading.Thread] = []

    def open(self, number: int) -> int:
        return self._open(number, self._stop)

    def _open(self, number: int, stop: threading.Event) -> int:
        said, until = self._failed.get(number, ("", 0.0))
        if time.monotonic() < until:
            raise FetchError(said)
        try:
            fd = self._cache.open(self._wanted[number], stopped=stop.is_set)
        except FetchError as error:
            if not stop.is_set():
                self._failed[number] = (str(error), time.monotonic() + _FAILED_S)
            raise
        self._failed.pop(number, None)
        return fd

    def path_of(self, number: int) -> str:
        return self._wanted[number].shown

    def prefetch(self, numbers: Sequence[int]) -> None:
        first = list(dict.fromkeys(numbers))[: self._ahead]
        with self._changed:
            self._queue = deque(n for n in first if n not in self._running and n not in self._failed)
            for _ in range(len(self._threads), min(self._ahead, _FETCHERS, len(self._queue))):
                self._threads.append(
                    threading.Thread(target=self._fetch_ahead, args=(self._stop,), name="prefetch-shards", daemon=True)
                )
                self._threads[-1].start()
            self._changed.notify_all()

    def discard(self, number: int) -> bool:
        return self._cache.discard(self._wanted[number])

    def close(self) -> None:
        with self._changed:
            self._stop.set()
            self._stop = threading.Event()
            self._queue.clear()
            threads, self._threads = self._threads, []
            self._changed.notify_all()
        for thread in threads:
            thread.join(timeout=5.0)  # one that waits for a store ends by the transport's time limit

    def _fetch_ahead(self, stop: threading.Event) -> None:
        while True:
            with self._changed:
                while not self._queue and not stop.is_set():
                    self._changed.wait()
                if stop.is_set():
                    return
                number = self._queue.popleft()
                self._running.add(number)
            try:
                if not self._cache.has(self._wanted[number]):
                    os.close(self._open(number, stop))
            except OSError as error:  # who reads the shard is told; here it would only stop the others
                _log.debug("prefetch: %s", error)
            finally:
                with self._changed:
                    self._running.discard(number)


class JoinedShards:
    """The shards of several data sets, numbered through.

    Args:
        sources: Those of each.
        starts: Number of the first shard of each; one more at the end.
    """

    def __init__(self, sources: Sequence[ShardSource], starts: Sequence[int]) -> None:
        self._sources, self._starts = tuple(sources), tuple(starts)

    def open(self, number: int) -> int:
        source, inside = self._find(number)
        return source.open(inside)

    def path_of(self, number: int) -> str:
        source, inside = self._find(number)
        return source.path_of(inside)

    def prefetch(self, numbers: Sequence[int]) -> None:
        for source, start, stop in zip(self._sources, self._starts, self._starts[1:]):
            source.prefetch([n - start for n in numbers if start <= n < stop])

    def discard(self, number: int) -> bool:
        source, inside = self._find(number)
        return source.discard(inside)

    def close(self) -> None:
        for source in self._sources:
            source.close()

    def _find(self, number: int) -> tuple[ShardSource, int]:
        which = bisect_right(self._starts, number) - 1
        return self._sources[which], number - self._starts[which]
