"""Where a data set's shards are, on this machine or elsewhere: found once, then read by number through file descriptors."""

from __future__ import annotations

import os
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Protocol

from opensora_dist.config.train import CacheConfig
from opensora_dist.core.errors import ConfigError, DataError
from opensora_dist.core.index import INDEX_NAME, ShardRow
from opensora_dist.core.io import hash_bytes
from opensora_dist.core.logging import get_logger
from opensora_dist.core.urls import PIPE, is_remote, redact, secret_in
from opensora_dist.data.cache import FetchError, Patience, ShardCache, Wanted, retried
from opensora_dist.data.origins import Origin, child, file_system, origin_of

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

    def close(self) -> None:
        """Ends what runs beside."""


class LocalShards:
    """Shards that are files of this machine."""

    def __init__(self, paths: Sequence[Path]) -> None:
        self._paths = tuple(paths)

    def open(self, number: int) -> int:
        return os.open(self._paths[number], os.O_RDONLY | os.O_CLOEXEC)

    def path_of(self, number: int) -> str:
        return str(self._paths[number])

    def prefetch(self, numbers: Sequence[int]) -> None:
        """Nothing to do: the kernel reads ahead."""

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
        self._ahead = ahead
        self._failed: dict[int, tuple[FetchError, float]] = {}
        self._queue: deque[int] = deque()
        self._running: set[int] = set()
        self._changed = threading.Condition()
        self._closed = False
        self._threads: list[threading.Thread] = []

    def open(self, number: int) -> int:
        error, until = self._failed.get(number, (None, 0.0))
        if error is not None and time.monotonic() < until:
            raise error
        try:
            fd = self._cache.open(self._wanted[number], stopped=lambda: self._closed)
        except FetchError as error:
            self._failed[number] = (error, time.monotonic() + _FAILED_S)
            raise
        self._failed.pop(number, None)
        return fd

    def path_of(self, number: int) -> str:
        return self._wanted[number].shown

    def prefetch(self, numbers: Sequence[int]) -> None:
        first = list(dict.fromkeys(numbers))[: self._ahead]
        with self._changed:
            self._queue = deque(n for n in first if n not in self._running and n not in self._failed)
            self._changed.notify_all()
            while self._queue and len(self._threads) < min(self._ahead, _FETCHERS, len(self._queue)):
                self._threads.append(threading.Thread(target=self._fetch_ahead, name="prefetch-shards", daemon=True))
                self._threads[-1].start()

    def close(self) -> None:
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        for thread in self._threads:
            thread.join(timeout=5.0)  # it may hang in a transfer, which ends by its own time limit

    def _fetch_ahead(self) -> None:
        while True:
            with self._changed:
                while not self._queue and not self._closed:
                    self._changed.wait()
                if self._closed:
                    return
                number = self._queue.popleft()
                self._running.add(number)
            try:
                if not self._cache.has(self._wanted[number]):
                    os.close(self.open(number))
            except OSError as error:  # who reads the shard is told; here it would only stop the others
                _log.debug("prefetch: %s", error)
            finally:
                with self._changed:
                    self._running.discard(number)


@dataclass(frozen=True, kw_only=True)
class Located:
    """A data set that was found.

    Args:
        folder: Folder of this machine that its index lies in.
        remote: Shards are fetched when they are read; so whether they are there isn't known before.
        open_shards: Makes the source of the shards that the index lists.
    """

    folder: Path
    remote: bool
    open_shards: Callable[[Sequence[ShardRow]], ShardSource]


def localise(url: str, *, cache: CacheConfig, allow_pipe: bool, layout: str | None = None) -> Located:
    """Finds a data set: fetches its index, or makes one of WebDataset tars that others made.

    Args:
        url: A folder or its URL, with index.parquet or with tars; or a pattern of tars (``.../x-{000..127}.tar``, ``pipe:...``).
        layout: The file that says what foreign tars hold; default: dataset.yaml beside them.
    Raises:
        ConfigError: A pipe that isn't allowed, a secret in the URL, a missing package.
        DataError: Nothing there, or it can't be had.
    """
    if (said := secret_in(url)) is not None:
        raise ConfigError(f"data.path={said}")
    if url.startswith(PIPE) and not allow_pipe:
        raise ConfigError(
            f"data.path={redact(url)!r} runs a command of this machine; set data.allow_pipe=true if you trust whoever wrote this config"
        )
    if not is_remote(url):
        return _local(Path(os.path.expandvars(url.removeprefix("file://"))).expanduser(), cache, layout)
    shards = ShardCache(Path(os.path.expandvars(cache.path)).expanduser(), max_bytes=int(cache.max_gib * 2**30))
    if _is_prepared(url):
        return _prepared(url, shards, ahead=cache.prefetch_shards)
    raise DataError(f"{redact(url)}: no {INDEX_NAME} there")


def _local(path: Path, cache: CacheConfig, layout: str | None) -> Located:
    del cache, layout
    return Located(folder=path, remote=False, open_shards=lambda rows: LocalShards([path / row.name for row in rows]))


def _is_prepared(url: str) -> bool:
    """Whether ``url`` is a folder with an index, or a command with a place for names."""
    if url.startswith(PIPE):
        return "{}" in url
    if url.partition("?")[0].endswith(".tar"):
        return False
    fs, path = file_system(child(url, INDEX_NAME))
    return bool(retried(lambda: fs.exists(path), shown=redact(url), patience=Patience()))


def _prepared(url: str, cache: ShardCache, *, ahead: int) -> Located:
    home = cache.root / hash_bytes(url.encode())

    def open_shards(rows: Sequence[ShardRow]) -> ShardSource:
        wanted = [
            _wanted(home / _safe(row.name), origin_of(child(url, row.name)), num_bytes=row.num_bytes, xxh3=row.xxh3)
            for row in rows
        ]
        return RemoteShards(cache, wanted, ahead=ahead)

    folder = _fetch_index(origin_of(child(url, INDEX_NAME)), cache, home)
    return Located(folder=folder, remote=True, open_shards=open_shards)


def _fetch_index(origin: Origin, cache: ShardCache, home: Path) -> Path:
    """The folder of the index as it is now: each version has its own, so that who reads an older one goes on."""
    try:
        version = retried(origin.version, shown=origin.shown, patience=Patience())
        if version is None:  # only the content tells
            content = retried(lambda: b"".join(origin.read(0)), shown=origin.shown, patience=Patience())
            version = hash_bytes(content)
            wanted = Wanted(path=home / version / INDEX_NAME, shown=origin.shown, read=lambda start: iter([content[start:]]))
        else:
            wanted = _wanted(home / version / INDEX_NAME, origin)
        os.close(cache.open(wanted))
    except FetchError as error:
        raise DataError(str(error)) from error
    return wanted.path.parent


def _wanted(path: Path, origin: Origin, *, num_bytes: int | None = None, xxh3: str | None = None) -> Wanted:
    return Wanted(path=path, shown=origin.shown, read=origin.read, num_bytes=num_bytes, xxh3=xxh3)


def _safe(name: str) -> str:
    """A shard's name, which comes from an index made elsewhere and becomes a path here."""
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or not name.endswith(".tar"):
        raise DataError(f"the index names a shard {name!r}; a shard's name ends in .tar and stays in the data set's folder")
    return name
