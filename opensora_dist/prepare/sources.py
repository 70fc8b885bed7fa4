"""Which videos and images a folder holds, and what is said about each."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import BinaryIO, Literal, cast

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq

from opensora_dist.core.errors import DataError
from opensora_dist.core.io import FileWindow
from opensora_dist.core.tar import Member, TarError, scan_tar, split_name
from opensora_dist.core.types import Thw
from opensora_dist.core.video import IMAGE_SUFFIXES, VIDEO_SUFFIXES

_SUFFIXES = VIDEO_SUFFIXES | IMAGE_SUFFIXES
_TAR = ".tar"
_TABLES = ("metadata.parquet", "metadata.csv")
_WAYS = (
    "supply captions in metadata.parquet or metadata.csv with columns path,text (paths relative to the folder), "
    "or in a .txt file beside each (clip.mp4, clip.txt), in tars in a .txt or .json member of the same key"
)


@dataclass(frozen=True, kw_only=True)
class Source:
    """One video or image.

    Args:
        path: The file, or the tar that holds it.
        name: Its path relative to the scanned folder, with "/", a tar's name being that of a folder: its identity.
        caption: None where nobody said anything about it; an empty caption is one.
        num_bytes, mtime_ns: What tells a changed file from the same one; -1 where a table lists a file that isn't there.
        kind: An image is a clip of one frame.
        member: Its name in a tar; None for a file of its own.
        offset: Where its bytes begin in the tar.
    """

    path: Path
    name: str
    caption: str | None
    num_bytes: int
    mtime_ns: int
    kind: Literal["video", "image"] = "video"
    member: str | None = None
    offset: int = 0

    @property
    def label(self) -> str:
        """What errors of ``iter_frames(source.open())`` begin with."""
        return str(self.path) if self.member is None else f"{self.path}/{self.member}"

    def open(self) -> Path | BinaryIO:
        """What ``core.video.iter_frames`` decodes: the path, or a seekable file, which is closed as it is let go of."""
        if self.member is None:
            return self.path
        window = FileWindow(self.path, offset=self.offset, num_bytes=self.num_bytes, name=self.label)
        return cast(BinaryIO, window)


def image_problem(source: Source, buckets: Iterable[Thw]) -> str | None:
    """Why an image gives no sample whatever it shows, or None."""
    if source.kind == "video" or any(bucket.t == 1 for bucket in buckets):
        return None
    return "an image, and no bucket has one frame; add [1, height, width] to clip.buckets"


def scan_sources(folder: Path) -> list[Source]:
    """The videos and images of a folder with their captions, sorted by name.

    A table decides which files count where there is one; else every video and image file below the folder does, and those in tars.

    Raises:
        DataError: No such folder, nothing in it, or a table or tar that can't be used.
    """
    if not folder.is_dir():
        raise DataError(f"input.path={str(folder)!r}: no such folder; give the folder that holds the videos or images")
    tables = [folder / name for name in _TABLES if (folder / name).is_file()]
    if len(tables) > 1:
        raise DataError(f"{folder}: both {' and '.join(_TABLES)} are there, and they may disagree; keep one")
    if tables:
        sources = [_source(folder, name, caption) for name, caption in _read_table(tables[0]).items()]
    else:
        sources = _read_folder(folder)
    if not sources:
        where = (
            f"{tables[0]} lists no video or image"
            if tables
            else f"no video or image in {folder} ({', '.join(sorted(_SUFFIXES))}, or in a {_TAR})"
        )
        raise DataError(f"input.path={str(folder)!r}: {where}")
    return sorted(sources, key=lambda source: source.name)


def require_captions(sources: Sequence[Source], *, folder: Path) -> None:
    """Refuses a folder in which nothing is said about anything, where no model will say something.

    Raises:
        DataError: With the ways to supply captions.
    """
    if all(source.caption is None for source in sources):
        raise DataError(
            f"input.path={str(folder)!r}: none of {len(sources)} videos and images has a caption; {_WAYS}; or have a model write them "
            "(caption.model)"
        )


def find_source(folder: Path, name: str) -> Source | None:
    """The source of that name, as ``scan_sources`` would give it but for its caption; None where it is gone.

    Raises:
        DataError: The tar it lies in can't be read.
    """
    if (folder / name).is_file():
        return _source(folder, name, None)
    tar, mark, _ = name.partition(f"{_TAR}/")
    if not mark or not (folder / f"{tar}{_TAR}").is_file():
        return None
    return next((s for s in _read_tar(folder / f"{tar}{_TAR}", f"{tar}{_TAR}") if s.name == name), None)


def _source(folder: Path, name: str, caption: str | None) -> Source:
    path = folder / name
    try:
        stat = path.stat()
        num_bytes, mtime_ns = stat.st_size, stat.st_mtime_ns
    except OSError:  # decoding will say what is the matter with it
        num_bytes, mtime_ns = -1, -1
    return Source(path=path, name=name, caption=caption, num_bytes=num_bytes, mtime_ns=mtime_ns, kind=_kind(name))


def _kind(name: str) -> Literal["video", "image"]:
    return "image" if Path(name).suffix.lower() in IMAGE_SUFFIXES else "video"


def _read_folder(folder: Path) -> list[Source]:
    """Every video and image below ``folder``."""
    sources: list[Source] = []
    for parent, _, files in os.walk(folder):
        for file in files:
            path = Path(parent, file)
            suffix = path.suffix.lower()
            if suffix not in (*_SUFFIXES, _TAR) or file.startswith("."):
                continue
            name = path.relative_to(folder).as_posix()
            if not _is_utf8(name):
                raise DataError(f"{str(path)!a}: the name is not UTF-8, so no index can hold it; rename the file")
            if suffix == _TAR:
                sources += _read_tar(path, name)
            else:
                sources.append(_source(folder, name, _read_caption(path.with_suffix(".txt"))))
    return sources


def _read_tar(path: Path, name: str) -> list[Source]:
    """The videos and images of a WebDataset tar, one per key, a video before an image. Nothing else of it is read than captions.

    Raises:
        DataError: It is damaged, or holds what must not be used.
    """
    groups: dict[str, dict[str, Member]] = {}
    with open(path, "rb", buffering=0) as file:
        try:
            for member in scan_tar(file.fileno(), shown=str(path)):
                key, extension = split_name(member.name) or (member.name, "")
                groups.setdefault(key, {}).setdefault(f".{extension.rpartition('.')[2].lower()}", member)
        except TarError as error:
            raise DataError(f"{error}. Fetch or pack it again, or take it out of input.path") from error
        changed_ns = os.fstat(file.fileno()).st_mtime_ns
        sources = []
        for members in groups.values():
            media = next(
                (members[suffix] for kind in (VIDEO_SUFFIXES, IMAGE_SUFFIXES) for suffix in members if suffix in kind), None
            )
            if media is None:
                continue
            sources.append(
                Source(
                    path=path,
                    name=f"{name}/{media.name}",
                    caption=_member_caption(file.fileno(), members, path),
                    num_bytes=media.size,
                    mtime_ns=changed_ns,
                    kind=_kind(media.name),
                    member=media.name,
                    offset=media.offset,
                )
            )
    return sources


def _member_caption(fd: int, members: Mapping[str, Member], path: Path) -> str | None:
    """What a sample's .txt says, or ``caption`` or ``text`` of its .json."""
    for suffix in (".txt", ".json"):
        if suffix not in members:
            continue
        member = members[suffix]
        content = os.pread(fd, member.size, member.offset)
        try:
            if suffix == ".txt":
                return content.decode("utf-8").strip()
            about = json.loads(content)
        except ValueError as error:  # what decoding of UTF-8 and of JSON raise
            raise DataError(f"{path}/{member.name}: not UTF-8 {suffix[1:]} ({error}); pack the tar again without it") from error
        said = [about[field] for field in ("caption", "text") if isinstance(about, dict) and isinstance(about.get(field), str)]
        if said:
            return str(said[0]).strip()
    return None


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
