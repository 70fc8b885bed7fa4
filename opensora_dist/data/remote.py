"""Where a data set's shards are, on this machine or elsewhere: found once, then read by number through file descriptors."""

from __future__ import annotations

import os
import threading
import time
from bisect import bisect_right
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Protocol

from opensora_dist.config.load import expand
from opensora_dist.config.train import CacheConfig
from opensora_dist.core.errors import ConfigError, DataError
from opensora_dist.core.index import INDEX_NAME, ShardRow, read_header
from opensora_dist.core.io import hash_bytes
from opensora_dist.core.logging import get_logger
from opensora_dist.core.urls import PIPE, expand_braces, is_remote, redact, secret_in
from opensora_dist.data.cache import ShardCache, Wanted
from opensora_dist.data.foreign import LAYOUT_NAME, parse_layout
from opensora_dist.data.foreign_index import Tar, index_foreign, short_names
from opensora_dist.data.origins import Origin, UrlOrigin, child, file_system, origin_of
from opensora_dist.data.transport import FetchError, Patience, retried

_log = get_logger(__name__)
_FAILED_S = (
    300.0  # a shard that could not be had is not asked for again so soon: each of its samples would wait through all attempts
)
PATIENCE = Patience()
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
        self._failed: dict[int, tuple[FetchError, float]] = {}
        self._queue: deque[int] = deque()
        self._running: set[int] = set()
        self._changed = threading.Condition()
        self._stop = threading.Event()  # of what runs now; replaced when it is set, so that a closed source can be used again
        self._threads: list[threading.Thread] = []

    def open(self, number: int) -> int:
        return self._open(number, self._stop)

    def _open(self, number: int, stop: threading.Event) -> int:
        error, until = self._failed.get(number, (None, 0.0))
        if error is not None and time.monotonic() < until:
            raise error
        try:
            fd = self._cache.open(self._wanted[number], stopped=stop.is_set)
        except FetchError as error:
            if not stop.is_set():
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
    for field, value in (("data.path", url), ("data.layout", layout or "")):
        if (said := secret_in(value)) is not None:
            raise ConfigError(f"{field}={said}")
    if url.startswith(PIPE) and not allow_pipe:
        raise ConfigError(
            f"data.path={redact(url)!r} runs a command of this machine; set data.allow_pipe=true if you trust whoever wrote this config"
        )
    shards = ShardCache(expand(cache.path), max_bytes=int(cache.max_gib * 2**30), patience=PATIENCE)
    try:
        if not is_remote(url):
            return _local(expand(url.removeprefix("file://")), shards, layout)
        if _is_prepared(url):
            return _prepared(url, shards, ahead=cache.prefetch_shards)
        return _foreign(url, shards, layout, ahead=cache.prefetch_shards)
    except FetchError as error:
        raise DataError(str(error)) from error


def _local(path: Path, cache: ShardCache, layout: str | None) -> Located:
    pattern = str(path)
    unfinished = (path / ".prepare").exists()  # of our own preparation: whoever opens the index says so
    tars = (
        sorted(path.glob("*.tar")) if path.is_dir() else [Path(name) for name in expand_braces(pattern) if name.endswith(".tar")]
    )
    if (path / INDEX_NAME).exists() or unfinished or not tars:
        return Located(folder=path, remote=False, open_shards=partial(LocalShards.beside, path))
    if gone := [tar for tar in tars if not tar.is_file()]:
        raise DataError(
            f"{gone[0]}: no such file, and {len(gone) - 1} more of {len(tars)} that {pattern} names; correct data.path"
        )
    top = path if path.is_dir() else path.parent
    text, shown = _layout(str(top / LAYOUT_NAME), layout, tars=f"{tars[0]} and {len(tars) - 1} more")
    places = dict(zip(short_names([str(tar) for tar in tars]), tars, strict=True))
    found = [
        Tar(
            name=name,
            shown=str(tar),
            version=f"{tar.stat().st_size}-{tar.stat().st_mtime_ns}",
            open=partial(os.open, tar, os.O_RDONLY),
        )
        for name, tar in places.items()
    ]
    folder = index_foreign(
        found, layout=parse_layout(text, shown=shown), home=cache.root / hash_bytes(str(path.absolute()).encode())
    )
    return Located(folder=folder, remote=False, open_shards=lambda rows: LocalShards([places[row.name] for row in rows]))


def _foreign(url: str, cache: ShardCache, layout: str | None, *, ahead: int) -> Located:
    """Tars elsewhere. Each is fetched, to be indexed; what doesn't fit into the cache is fetched again when it is read."""
    urls = _tar_urls(url)
    beside = None if url.startswith(PIPE) else child(_folder_of(url), LAYOUT_NAME)
    text, shown = _layout(beside, layout, tars=f"{redact(urls[0])} and {len(urls) - 1} more")
    home = cache.root / hash_bytes(url.encode())
    origins = dict(zip(short_names(urls), map(origin_of, urls), strict=True))
    with ThreadPoolExecutor(max_workers=8) as asking:
        answers = asking.map(lambda o: retried(o.version, shown=o.shown, patience=PATIENCE) or "", origins.values())
        versions = dict(zip(origins, answers, strict=True))
    paths = {
        name: home / f"{_safe(name).removesuffix('.tar')}.{hash_bytes(version.encode())}.tar"
        for name, version in versions.items()
    }
    tars = [
        Tar(
            name=name,
            shown=o.shown,
            version=versions[name],
            open=partial(cache.open, _wanted(paths[name], o)),
            forget=partial(paths[name].unlink, missing_ok=True),
        )
        for name, o in origins.items()
    ]
    folder = index_foreign(tars, layout=parse_layout(text, shown=shown), home=home)

    def open_shards(rows: Sequence[ShardRow]) -> ShardSource:
        wanted = [_wanted(paths[row.name], origins[row.name], num_bytes=row.num_bytes, xxh3=row.xxh3) for row in rows]
        return RemoteShards(cache, wanted, ahead=ahead)

    return Located(folder=folder, remote=True, open_shards=open_shards)


def _layout(beside: str | None, named: str | None, *, tars: str) -> tuple[str, str]:
    """The text of ``dataset.yaml``, and what messages call it."""
    if (where := named or beside) is None:
        raise ConfigError(
            f"{tars}: nothing lies beside the output of a command; say what the tars hold with data.layout=FILE.yaml"
        )
    where = where if is_remote(where) else str(expand(where))
    origin = origin_of(where) if is_remote(where) else None
    try:
        read = Path(where).read_bytes if origin is None else lambda: b"".join(origin.read(0))
        return retried(read, shown=redact(where), patience=PATIENCE).decode(), redact(where)
    except FetchError as error:
        if not error.missing:
            raise
        raise DataError(
            f"{tars}: there is no {INDEX_NAME}, so these are tars made by others, and {redact(where)}, which says what they hold, is "
            "missing; write one (docs/remote.md shows it whole), name it with data.layout, or prepare the data set with `opensora-dist data prepare`"
        ) from error


def _folder_of(url: str) -> str:
    """Of a pattern the folder its tars lie in; a query string stays."""
    path, question, query = url.partition("?")
    return f"{path[: path.rindex('/')]}{question}{query}" if path.endswith(".tar") else url


def _tar_urls(url: str) -> list[str]:
    if url.startswith(PIPE) or url.partition("?")[0].endswith(".tar"):
        return expand_braces(url)
    fs, path = file_system(url)
    names: list[str] = retried(lambda: fs.ls(path, detail=False), shown=redact(url), patience=PATIENCE)
    tars = sorted({name.partition("?")[0].rpartition("/")[2] for name in names})
    if found := [child(url, name) for name in tars if name.endswith(".tar")]:
        return found
    raise DataError(f"{redact(url)}: holds neither {INDEX_NAME} nor any .tar; correct data.path")


def _is_prepared(url: str) -> bool:
    """Whether ``url`` is a folder with an index, or a command with a place for names."""
    if url.startswith(PIPE):
        return "{}" in url
    if url.partition("?")[0].endswith(".tar"):
        return False
    index = UrlOrigin(child(url, INDEX_NAME))
    try:
        retried(index.version, shown=index.shown, patience=PATIENCE)
    except FetchError as error:
        if not error.missing:
            raise
        return False
    return True


def _prepared(url: str, cache: ShardCache, *, ahead: int) -> Located:
    home = cache.root / hash_bytes(url.encode())

    def open_shards(rows: Sequence[ShardRow]) -> ShardSource:
        wanted = []
        for row in rows:  # by content, so that the shards of a data set that is prepared anew don't pass for the old ones
            path = home / f"{_safe(row.name).removesuffix('.tar')}.{row.xxh3}.tar"
            wanted.append(_wanted(path, origin_of(child(url, row.name)), num_bytes=row.num_bytes, xxh3=row.xxh3))
        return RemoteShards(cache, wanted, ahead=ahead)

    folder = _fetch_index(origin_of(child(url, INDEX_NAME)), cache, home)
    header = read_header(folder)
    if header.hashes_name != Path(header.hashes_name).name:
        raise DataError(f"{redact(url)}: its index names its hashes {header.hashes_name!r}, which is not a plain file name")
    hashes = _wanted(
        folder / header.hashes_name,
        origin_of(child(url, header.hashes_name)),
        num_bytes=8 * header.num_hashes,
        xxh3=header.hashes_xxh3,
    )
    os.close(cache.open(hashes))
    return Located(folder=folder, remote=True, open_shards=open_shards)


def _fetch_index(origin: Origin, cache: ShardCache, home: Path) -> Path:
    """The folder of the index as it is now: each version has its own, so that who reads an older one goes on."""
    version = retried(origin.version, shown=origin.shown, patience=PATIENCE)
    wanted = _wanted(home / f"index-{version}" / INDEX_NAME, origin)
    if version is None:  # only the content tells
        content = retried(lambda: b"".join(origin.read(0)), shown=origin.shown, patience=PATIENCE)
        path = home / f"index-{hash_bytes(content)}" / INDEX_NAME
        wanted = Wanted(path=path, shown=origin.shown, read=lambda start: iter([content[start:]]))
    os.close(cache.open(wanted))
    return wanted.path.parent


def _wanted(path: Path, origin: Origin, *, num_bytes: int | None = None, xxh3: str | None = None) -> Wanted:
    return Wanted(path=path, shown=origin.shown, read=origin.read, num_bytes=num_bytes, xxh3=xxh3)


def _safe(name: str) -> str:
    """A shard's name, which comes from an index made elsewhere and becomes a path here."""
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or not name.endswith(".tar"):
        raise DataError(f"the index names a shard {name!r}; a shard's name ends in .tar and stays in the data set's folder")
    return name
