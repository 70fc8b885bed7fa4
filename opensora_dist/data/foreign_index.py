"""The index of foreign tars: made on first use by one process, found again by all, made again for tars that changed.

It lies in the cache's folder and never beside the tars, since a folder that has an index is one that we prepared.
"""

from __future__ import annotations

import json
import os
import time
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import xxhash

from opensora_dist.core.errors import DataError
from opensora_dist.core.index import INDEX_NAME, ShardRow, write_index
from opensora_dist.core.io import hash_bytes, read_json, write_json, write_text
from opensora_dist.core.logging import get_logger
from opensora_dist.core.urls import PIPE
from opensora_dist.data.foreign import Findings, Layout, index_tar, settle_clips
from opensora_dist.data.locks import make_folder, turn
from opensora_dist.data.transport import FetchError

_log = get_logger(__name__)
_FORMAT = 2  # of what is kept of each tar; another number makes old ones worthless
_STALL_S = 600.0
_SAY_S = 5.0
_THREADS = 4
_SHOWN = 5


@dataclass(frozen=True, kw_only=True)
class Tar:
    """A tar that is to be indexed.

    Args:
        name: What the index calls it: unique, relative, ends in .tar.
        shown: What messages call it.
        version: Changes when its content does; empty where nothing tells.
        open: Gives a descriptor, which is closed here.
        forget: Called when it is damaged: a copy that was fetched is worth nothing.
    """

    name: str
    shown: str
    version: str
    open: Callable[[], int]
    forget: Callable[[], None] = lambda: None


def index_foreign(tars: Sequence[Tar], *, layout: Layout, home: Path) -> Path:
    """The folder of an index of ``tars``, made where there is none.

    Args:
        home: Where indexes of these tars are kept, and what was found in each tar: an interrupted indexing goes on where it was.
    Raises:
        DataError: Tars that are damaged or hold code, all of them named; or none holds a sample.
    """
    about = [_FORMAT, layout.model_dump(mode="json")]
    folder = home / f"index-{hash_bytes(json.dumps([about, [(t.name, t.version) for t in tars]]).encode())}"
    if (folder / INDEX_NAME).is_file():
        return folder
    make_folder(home)
    pulse = home / ".pulse"
    late = f"{home}: another process indexes these tars and did nothing for {_STALL_S:.0f} s; end it, and what it has found so far is kept"
    with turn(home / ".lock", progress=_Watch(home).look, late=late, stall_s=_STALL_S):
        if not (folder / INDEX_NAME).is_file():
            _make(tars, layout=layout, about=about, home=home, folder=folder, pulse=pulse)
    return folder


def short_names(places: Sequence[str]) -> list[str]:
    """Names of tars within their data set: what differs in their paths, URLs or commands, from the last folder they share on."""
    paths = [_word(place).partition("?")[0].replace("://", "/") for place in places]
    parts = [path.split("/") for path in paths]
    shared = 0
    for level in zip(*(folders[:-1] for folders in parts)):
        if len(set(level)) > 1:
            break
        shared += 1
    names = ["/".join(folders[shared:]) for folders in parts]
    names = [name if name.endswith(".tar") else f"{name}.tar" for name in names]
    if len(set(names)) < len(names):  # commands that differ in something else
        names = [f"{number:06d}-{name.replace('/', '-')}" for number, name in enumerate(names)]
    return names


def _make(tars: Sequence[Tar], *, layout: Layout, about: list[Any], home: Path, folder: Path, pulse: Path) -> None:
    kept: list[tuple[ShardRow, Findings]] = []
    failed: list[str] = []
    said = time.monotonic()

    def look(tar: Tar) -> tuple[ShardRow, Findings] | str:
        try:
            return _look(tar, layout=layout, about=about, home=home, pulse=pulse)
        except (DataError, FetchError) as error:
            tar.forget()
            return str(error)

    with ThreadPoolExecutor(max_workers=_THREADS) as pool:  # fetching, reading and hashing wait for no interpreter
        for number, found in enumerate(pool.map(look, tars), 1):
            if isinstance(found, str):
                failed.append(found)
            else:
                kept.append(found)
            told = f"{number} of {len(tars)} tars, {sum(len(f.rows) for _, f in kept)} samples"
            pulse.write_text(told)
            if time.monotonic() - said > _SAY_S or number == len(tars):
                said = time.monotonic()
                _log.info("indexing %s: %s", home, told)
    if failed:
        shown = "\n  ".join(failed[:_SHOWN])
        raise DataError(
            f"{len(failed)} of {len(tars)} tars can't be used{f', the first {_SHOWN} of them' if len(failed) > _SHOWN else ''}:\n  {shown}\n"
            "Copy or pack these again, or leave them out of data.path; what was found in the others is kept"
        )
    _tell(tars, [found for _, found in kept], folder=folder)
    rows, changed = settle_clips([row for _, found in kept for row in found.rows], layout)
    if changed:
        _log.warning(
            "%d samples have a clip of their own that belongs to other latents in another sample; it is by the codec's factors",
            changed,
        )
    shapes = Counter((row.clip_t, row.clip_h, row.clip_w) for row in rows)
    spec = layout.model_dump(mode="json", exclude={"axes"}) | {"buckets": [list(shape) for shape, _ in shapes.most_common()]}
    write_index(folder, rows=rows, shards=[shard for shard, found in kept if found.rows], spec=spec)


def _look(tar: Tar, *, layout: Layout, about: list[Any], home: Path, pulse: Path) -> tuple[ShardRow, Findings]:
    """What is in a tar: looked up where it was read before, else read."""
    note = home / "tars" / f"{hash_bytes(json.dumps([about, tar.name, tar.version]).encode())}.json"
    if note.is_file():
        value = read_json(note)
        return ShardRow(**value["shard"]), Findings.from_json(value["found"])
    fd = tar.open()
    try:
        found = index_tar(fd, name=tar.name, shown=tar.shown, layout=layout, beat=pulse.touch)
        shard = ShardRow(name=tar.name, num_bytes=os.fstat(fd).st_size, num_samples=len(found.rows), xxh3=_hash(fd, pulse.touch))
    finally:
        os.close(fd)
    write_text(note, json.dumps({"shard": asdict(shard), "found": found.to_json()}))
    return shard, found


def _tell(tars: Sequence[Tar], found: Sequence[Findings], *, folder: Path) -> None:
    """What was left out and why: once, in a warning, and whole in a file beside the index."""
    dropped: dict[str, list[str]] = {}
    ignored: Counter[str] = Counter()
    for findings in found:
        ignored.update(findings.ignored)
        for reason, keys in findings.dropped.items():
            dropped.setdefault(reason, []).extend(keys)
    total = sum(len(f.rows) for f in found)
    reasons = "; ".join(f"{len(keys)}: {reason} (first {keys[0]})" for reason, keys in dropped.items())
    if total == 0:
        raise DataError(
            f"{tars[0].shown} and {len(tars) - 1} more: hold no sample that can be trained on; {reasons or 'no member has a key'}"
        )
    write_json(folder / "left_out.json", {"samples": total, "dropped": dropped, "ignored": dict(ignored)})
    if dropped:
        count = sum(map(len, dropped.values()))
        _log.warning(
            "%d samples are left out of %d: %s. All of them are in %s", count, total + count, reasons, folder / "left_out.json"
        )
    if ignored:
        _log.warning("members that mean nothing here are passed over: %s", ", ".join(f"{n} {end}" for end, n in ignored.items()))


def _hash(fd: int, beat: Callable[[], None]) -> str:
    digest, at = xxhash.xxh3_64(), 0
    while piece := os.pread(fd, 8 << 20, at):
        digest.update(piece)
        at += len(piece)
        beat()
    return digest.hexdigest()


class _Watch:
    """What a process sees that waits for another's index; it says so, as the other may be one whose log nobody sees."""

    def __init__(self, home: Path) -> None:
        self._home, self._said = home, time.monotonic()

    def look(self) -> float:
        """When the other last got on: read a sample, or received bytes."""
        times, pulse = [0.0], self._home / ".pulse"
        for path in (pulse, *self._home.glob("**/.*.partial-*")):
            with suppress(FileNotFoundError):
                times.append(path.stat().st_mtime)
        if time.monotonic() - self._said > _SAY_S:
            self._said = time.monotonic()
            _log.info("another process indexes %s: %s", self._home, pulse.read_text() if pulse.exists() else "begins")
        return max(times)


def _word(place: str) -> str:
    """Of a command the word that names a tar."""
    if not place.startswith(PIPE):
        return place
    words = place.removeprefix(PIPE).split()
    return next((word for word in words if word.partition("?")[0].endswith(".tar")), words[-1])
