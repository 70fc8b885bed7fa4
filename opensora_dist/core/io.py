"""Files that are whole or absent: atomic writes, durable renames, content hashes."""

from __future__ import annotations

import json
import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import xxhash

_CHUNK_BYTES = 1 << 20


def fsync_dir(path: Path) -> None:
    """Makes renames and creations inside ``path`` survive a power cut."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Yields a temporary path beside ``path``; on success it is fsynced and renamed over ``path``, else removed.

    The temporary name keeps the suffix, so that libraries which choose a container by suffix still do.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.stem}.partial-{uuid.uuid4().hex[:8]}{path.suffix}")
    try:
        yield partial
        fd = os.open(partial, os.O_RDONLY)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)
        os.replace(partial, path)
        fsync_dir(path.parent)
    finally:
        partial.unlink(missing_ok=True)


@contextmanager
def atomic_file(path: Path) -> Iterator[BinaryIO]:
    """A binary file that appears under ``path`` only when the block ended without an error."""
    with atomic_path(path) as partial, open(partial, "wb") as handle:
        yield handle
        handle.flush()


def write_text(path: Path, text: str) -> None:
    """Writes ``text`` atomically."""
    with atomic_file(path) as handle:
        handle.write(text.encode())


def write_json(path: Path, value: Any) -> None:
    """Writes ``value`` atomically as indented JSON; NaN and infinity are refused, since JSON has neither."""
    write_text(path, json.dumps(value, indent=2, sort_keys=True, allow_nan=False) + "\n")


def read_json(path: Path) -> Any:
    """Reads a JSON file."""
    return json.loads(Path(path).read_text())


def hash_bytes(data: bytes | bytearray | memoryview) -> str:
    """xxh3-64 of a buffer, as 16 hex digits."""
    return xxhash.xxh3_64_hexdigest(data)


def hash_file(path: Path) -> str:
    """xxh3-64 of a file's content, as 16 hex digits."""
    digest = xxhash.xxh3_64()
    with open(path, "rb") as handle:
        while chunk := handle.read(_CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()
