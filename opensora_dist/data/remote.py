"""Where a data set is, on this machine or elsewhere: its index is brought here, its shards are fetched when they are read."""

from __future__ import annotations

import os
import re
import shutil
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from opensora_dist.config.data_rules import layout_problem
from opensora_dist.config.load import expand
from opensora_dist.config.train import CacheConfig
from opensora_dist.core.errors import ConfigError, DataError
from opensora_dist.core.index import INDEX_NAME, ShardRow, read_header
from opensora_dist.core.io import hash_bytes
from opensora_dist.core.urls import PIPE, expand_braces, is_remote, plain_name, redact, secret_in
from opensora_dist.data.cache import ShardCache, Wanted
from opensora_dist.data.foreign import LAYOUT_NAME, parse_layout
from opensora_dist.data.foreign_index import Tar, index_foreign, short_names
from opensora_dist.data.origins import Origin, UrlOrigin, child, file_system, origin_in, origin_of
from opensora_dist.data.shards import LocalShards, RemoteShards, ShardSource
from opensora_dist.data.transport import FetchError, Patience, retried

PATIENCE = Patience()
_OLD_S = 30 * 86400.0


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
    for field, said in (("data.path", secret_in(url)), ("data.layout", layout_problem(layout or ""))):
        if said is not None:
            raise ConfigError(f"{field}={said}")
    if url.startswith(PIPE) and not allow_pipe:
        raise ConfigError(
            f"data.path={redact(url)!r} runs a command of this machine; set data.allow_pipe=true if you trust whoever wrote this config"
        )
    patience = replace(PATIENCE, total_s=cache.patience_s)
    shards = ShardCache(expand(cache.path), max_bytes=int(cache.max_gib * 2**30), patience=patience)
    try:
        if not is_remote(url):
            return _local(expand(url.removeprefix("file://")), shards, layout)
        if holds_index(url, patience):
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
    text, shown = _layout(str(top / LAYOUT_NAME), layout, cache.patience, tars=f"{tars[0]} and {len(tars) - 1} more")
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
    urls = _tar_urls(url, cache.patience)
    beside = None if url.startswith(PIPE) else child(_folder_of(url), LAYOUT_NAME)
    text, shown = _layout(beside, layout, cache.patience, tars=f"{redact(urls[0])} and {len(urls) - 1} more")
    home = cache.root / hash_bytes(url.encode())
    origins = dict(zip(short_names(urls), map(origin_of, urls), strict=True))
    with ThreadPoolExecutor(max_workers=8) as asking:
        answers = asking.map(lambda o: retried(o.version, shown=o.shown, patience=cache.patience) or "", origins.values())
        versions = dict(zip(origins, answers, strict=True))
    paths = {
        # a name is of the config here, where it may hold $NAME and whatever a store takes
        name: home
        / f"{re.sub('[^A-Za-z0-9._=+-]', '-', name.removesuffix('.tar'))}.{hash_bytes(f'{name} {version}'.encode())}.tar"
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


def _layout(beside: str | None, named: str | None, patience: Patience, *, tars: str) -> tuple[str, str]:
    """The text of ``dataset.yaml``, and what messages call it."""
    if (where := named or beside) is None:
        raise ConfigError(
            f"{tars}: nothing lies beside the output of a command; say what the tars hold with data.layout=FILE.yaml"
        )
    where = where if is_remote(where) else str(expand(where))
    origin = origin_of(where) if is_remote(where) else None
    try:
        read = Path(where).read_bytes if origin is None else lambda: b"".join(origin.read(0))
        return retried(read, shown=redact(where), patience=patience).decode(), redact(where)
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


def _tar_urls(url: str, patience: Patience) -> list[str]:
    if url.startswith(PIPE) or url.partition("?")[0].endswith(".tar"):
        return expand_braces(url)
    fs, path = file_system(url)
    names: list[str] = retried(lambda: fs.ls(path, detail=False), shown=redact(url), patience=patience)
    tars = sorted({name.partition("?")[0].rpartition("/")[2] for name in names})
    if found := [child(url, plain_name(name, where=redact(url))) for name in tars if name.endswith(".tar")]:
        return found
    raise DataError(f"{redact(url)}: holds neither {INDEX_NAME} nor any .tar; correct data.path")


def holds_index(url: str, patience: Patience) -> bool:
    """Whether ``url`` is a folder with an index, or a command with a place for names; not so for tars that others made.

    Raises:
        FetchError: It can't be asked.
    """
    if url.startswith(PIPE):
        return "{}" in url
    if url.partition("?")[0].endswith(".tar"):
        return False
    index = UrlOrigin(child(url, INDEX_NAME))
    try:
        retried(index.version, shown=index.shown, patience=patience)
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
            path = home / _kept_as(row, where=redact(url))
            wanted.append(_wanted(path, origin_in(url, row.name), num_bytes=row.num_bytes, xxh3=row.xxh3))
        return RemoteShards(cache, wanted, ahead=ahead)

    folder = _fetch_index(origin_in(url, INDEX_NAME), cache, home)
    header = read_header(folder)
    name = plain_name(header.hashes_name, where=f"the index of {redact(url)}")
    if "/" in name:
        raise DataError(f"{redact(url)}: its index names its hashes {name!r}, which is not a plain file name")
    hashes = _wanted(folder / name, origin_in(url, name), num_bytes=8 * header.num_hashes, xxh3=header.hashes_xxh3)
    _have(cache, hashes)
    return Located(folder=folder, remote=True, open_shards=open_shards)


def _fetch_index(origin: Origin, cache: ShardCache, home: Path) -> Path:
    """The folder of the index as it is now: each version has its own, so that who reads an older one goes on."""
    version = retried(origin.version, shown=origin.shown, patience=cache.patience)
    wanted = replace(_wanted(home / f"index-{version}" / INDEX_NAME, origin), noted=True)
    if version is None:  # only the content tells
        content = retried(lambda: b"".join(origin.read(0)), shown=origin.shown, patience=cache.patience)
        xxh3 = hash_bytes(content)
        path = home / f"index-{xxh3}" / INDEX_NAME
        wanted = Wanted(path=path, shown=origin.shown, read=lambda start: iter([content[start:]]), xxh3=xxh3)
    _have(cache, wanted)
    _drop_old(home, keep=wanted.path.parent)
    return wanted.path.parent


def _have(cache: ShardCache, wanted: Wanted) -> None:
    """Brings a file here that is opened by its name and not compared with anything when it is read; a rotted one is fetched anew."""
    cache.discard(wanted)
    os.close(cache.open(wanted))


def _drop_old(home: Path, *, keep: Path) -> None:
    """Removes versions of an index that no process opened for a month."""
    for old in home.glob(f"index-*/{INDEX_NAME}"):
        with suppress(FileNotFoundError):  # another process was faster
            if old.parent != keep and time.time() - old.stat().st_mtime > _OLD_S:
                shutil.rmtree(old.parent, ignore_errors=True)


def _wanted(path: Path, origin: Origin, *, num_bytes: int | None = None, xxh3: str | None = None) -> Wanted:
    return Wanted(path=path, shown=origin.shown, read=origin.read, num_bytes=num_bytes, xxh3=xxh3)


def _kept_as(row: ShardRow, *, where: str) -> str:
    """The path of a shard in the cache, of names that an index made elsewhere gives.

    Raises:
        DataError: They would lead elsewhere, or have a meaning to a store or a command.
    """
    for name in (row.name, row.xxh3):
        plain_name(name, where=f"the index of {where}")
    if not row.name.endswith(".tar") or "/" in row.xxh3:
        raise DataError(f"the index of {where} lists a shard {row.name!r} with xxh3 {row.xxh3!r}; a shard's name ends in .tar")
    return f"{row.name.removesuffix('.tar')}.{row.xxh3}.tar"
