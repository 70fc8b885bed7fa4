"""Which videos a folder holds, and what is said about each."""

from __future__ import annotations

import os
from collections import Counter
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq

from opensora_dist.core.errors import DataError

VIDEO_SUFFIXES = frozenset({".avi", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".webm"})
_TABLES = ("metadata.parquet", "metadata.csv")
_WAYS = (
    "supply captions in metadata.parquet or metadata.csv with columns path,text (paths relative to the folder), "
    "or in a .txt file beside each video (clip.mp4, clip.txt)"
)


@dataclass(frozen=True, kw_only=True)
class Source:
    """One video file.

    Args:
        path: The file.
        name: Its path relative to the scanned folder, with "/": its identity.
        caption: None where nobody said anything about it; an empty caption is one.
        num_bytes, mtime_ns: What tells a changed file from the same one; -1 where a table lists a file that isn't there.
    """

    path: Path
    name: str
    caption: str | None
    num_bytes: int
    mtime_ns: int


def scan_sources(folder: Path) -> list[Source]:
    """The videos of a folder with their captions, sorted by name.

    A table decides which files count where there is one; else every video file below the folder does.

    Raises:
        DataError: No such folder, no videos, no captions, or a table that can't be used.
    """
    if not folder.is_dir():
        raise DataError(f"input.path={str(folder)!r}: no such folder; give the folder that holds the videos")
    tables = [folder / name for name in _TABLES if (folder / name).is_file()]
    if len(tables) > 1:
        raise DataError(f"{folder}: both {' and '.join(_TABLES)} are there, and they may disagree; keep one")
    captions = _read_table(tables[0]) if tables else _read_text_files(folder)
    if not captions:
        where = f"{tables[0]} lists no video" if tables else f"no video in {folder} ({', '.join(sorted(VIDEO_SUFFIXES))})"
        raise DataError(f"input.path={str(folder)!r}: {where}")
    if all(caption is None for caption in captions.values()):
        raise DataError(f"input.path={str(folder)!r}: none of {len(captions)} videos has a caption; {_WAYS}")
    return [_source(folder, name, captions[name]) for name in sorted(captions)]


def _source(folder: Path, name: str, caption: str | None) -> Source:
    path = folder / name
    try:
        stat = path.stat()
    except OSError:  # decoding will say what is the matter with it
        return Source(path=path, name=name, caption=caption, num_bytes=-1, mtime_ns=-1)
    return Source(path=path, name=name, caption=caption, num_bytes=stat.st_size, mtime_ns=stat.st_mtime_ns)


def _read_text_files(folder: Path) -> dict[str, str | None]:
    """Name to caption of every video below ``folder``."""
    captions: dict[str, str | None] = {}
    for parent, _, files in os.walk(folder):
        for file in files:
            path = Path(parent, file)
            if path.suffix.lower() not in VIDEO_SUFFIXES or file.startswith("."):
                continue
            name = path.relative_to(folder).as_posix()
            if not _is_utf8(name):
                raise DataError(f"{str(path)!a}: the name is not UTF-8, so no index can hold it; rename the file")
            captions[name] = _read_caption(path.with_suffix(".txt"))
    return captions


def _is_utf8(name: str) -> bool:
    try:
        name.encode()
    except UnicodeEncodeError:  # bytes that os.walk could not decode
        return False
    return True


def _read_caption(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8").strip()
    except FileNotFoundError:
        return None
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 text ({error}); save it as UTF-8") from error


def _read_table(path: Path) -> dict[str, str | None]:
    """Name to caption of every row; a null text is no caption.

    Raises:
        DataError: Unreadable, a column missing or of another type, a path empty, outside the folder or there twice.
    """
    try:
        if path.suffix == ".parquet":
            table = pq.read_table(path)
        else:
            table = pa.csv.read_csv(
                path,
                parse_options=pa.csv.ParseOptions(newlines_in_values=True),
                convert_options=pa.csv.ConvertOptions(column_types={"path": pa.string(), "text": pa.string()}),
            )
    except (pa.ArrowInvalid, OSError) as error:
        raise DataError(f"{path}: can't be read ({error}); expected columns path,text") from error
    for column in ("path", "text"):
        if table.schema.names.count(column) != 1:
            raise DataError(f"{path}: needs one column {column!r}, has {table.schema.names}; expected columns path,text")
        if not _is_text(table.schema.field(column).type):
            raise DataError(f"{path}: column {column!r} holds {table.schema.field(column).type}, expected text")
    names = [_checked_name(path, row, value) for row, value in enumerate(table.column("path").to_pylist(), start=1)]
    if twice := [name for name, count in Counter(names).items() if count > 1]:
        shown = ", ".join(twice[:5]) + (", ..." if len(twice) > 5 else "")
        raise DataError(f"{path}: {len(twice)} paths are listed more than once ({shown}); keep one row per video")
    texts: list[str | None] = table.column("text").to_pylist()
    return {name: None if text is None else text.strip() for name, text in zip(names, texts, strict=True)}


def _is_text(kind: pa.DataType) -> bool:
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_null(kind))


def _checked_name(table: Path, row: int, value: str | None) -> str:
    """A path of the table in normal form ("./a//b.mp4" is "a/b.mp4")."""
    name = PurePosixPath(value or "")
    if not value or name.is_absolute() or ".." in name.parts or "\0" in value:
        raise DataError(f"{table}: row {row} has path {value!r}; it must name a file inside {table.parent}, relative to it")
    return str(name)
