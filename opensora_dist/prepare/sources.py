"""Which videos and images a folder holds, and what is said about each."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
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
from opensora_dist.prepare.clean import storable

_SUFFIXES = VIDEO_SUFFIXES | IMAGE_SUFFIXES
_TAR = ".tar"
_TABLES = ("metadata.parquet", "metadata.csv")
_STATE_DIR = ".prepare"  # of a folder that a preparation writes
_WAYS = (
    "supply captions in metadata.parquet or metadata.csv with columns path,text (paths relative to the folder), "
    "or in a .txt file beside each (clip.mp4, clip.txt), in tars in a .txt or .json member of the same key"
)


@dataclass(frozen=True, kw_only=True)
class Source:
    """One video or image, or what stands where some should be and can't be used.

    Args:
        path: The file, or the tar that holds it.
        name: Its path relative to the scanned folder, with "/", a tar's name being that of a folder: its identity.
        caption: None where nobody said anything about it; an empty caption is one.
        num_bytes, mtime_ns: What tells a changed file from the same one; -1 where a table lists a file that isn't there.
        kind: An image is a clip of one frame.
        member: Its name in a tar; None for a file of its own.
        offset: Where its bytes begin in the tar.
        problem: Why it can't be used whatever it holds; then it isn't opened.
    """

    path: Path
    name: str
    caption: str | None
    num_bytes: int
    mtime_ns: int
    kind: Literal["video", "image"] = "video"
    member: str | None = None
    offset: int = 0
    problem: str | None = None

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

    A table decides which files count where there is one; else every video and image file below the folder does, and those in tars, but for
    hidden folders and those that a preparation writes. Links are followed, each folder is read once. Of a video and an image that differ
    in their suffix alone the video counts. What can't be used is a source with a problem, so that it stops nothing else.

    Raises:
        DataError: No such folder, nothing in it, or a table that can't be read.
    """
    if not folder.is_dir():
        raise DataError(f"input.path={str(folder)!r}: no such folder; give the folder that holds the videos or images")
    tables = [folder / name for name in _TABLES if (folder / name).is_file()]
    if len(tables) > 1:
        raise DataError(f"{folder}: both {' and '.join(_TABLES)} are there, and they may disagree; keep one")
    if tables:
        sources = _read_table(folder, tables[0])
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
    usable = [source for source in sources if source.problem is None]
    if usable and all(source.caption is None for source in usable):
        raise DataError(
            f"input.path={str(folder)!r}: none of {len(usable)} videos and images has a caption; {_WAYS}; or have a model write them "
            "(caption.model)"
        )


def find_source(folder: Path, name: str) -> Source | None:
    """The source of that name, as ``scan_sources`` would give it but for its caption; None where it is gone."""
    if (folder / name).is_file():
        return _source(folder, name, None)
    tar, mark, _ = name.partition(f"{_TAR}/")
    if not mark or not (folder / f"{tar}{_TAR}").is_file():
        return None
    return next((s for s in _read_tar(folder / f"{tar}{_TAR}", f"{tar}{_TAR}") if s.name == name), None)


def _source(folder: Path, name: str, caption: str | None, problem: str | None = None) -> Source:
    path = folder / name
    try:
        stat = path.stat()
        num_bytes, mtime_ns = stat.st_size, stat.st_mtime_ns
    except OSError:  # decoding will say what is the matter with it
        num_bytes, mtime_ns = -1, -1
    kind = _kind(name)
    return Source(path=path, name=name, caption=caption, num_bytes=num_bytes, mtime_ns=mtime_ns, kind=kind, problem=problem)


def _unusable(path: Path, name: str, problem: str) -> Source:
    return Source(path=path, name=name, caption=None, num_bytes=-1, mtime_ns=-1, problem=problem)


def _kind(name: str) -> Literal["video", "image"]:
    return "image" if Path(name).suffix.lower() in IMAGE_SUFFIXES else "video"


def _read_folder(folder: Path) -> list[Source]:
    """Every video and image below ``folder``."""
    sources: list[Source] = []
    for parent, files in _folders(folder):
        paths = [Path(parent, file) for file in files if not file.startswith(".")]
        videos = {path.stem for path in paths if path.suffix.lower() in VIDEO_SUFFIXES}
        for path in paths:
            suffix = path.suffix.lower()
            if suffix not in (*_SUFFIXES, _TAR) or (suffix in IMAGE_SUFFIXES and path.stem in videos):
                continue
            name = path.relative_to(folder).as_posix()
            if not _is_utf8(name):
                shown = name.encode("utf-8", "backslashreplace").decode()
                sources.append(_unusable(path, shown, "its name is not UTF-8, so no index can hold it; rename the file"))
            elif suffix == _TAR:
                sources += _read_tar(path, name)
            else:
                sources.append(_source(folder, name, *_read_caption(path.with_suffix(".txt"))))
    return sources


def _folders(folder: Path) -> Iterator[tuple[str, list[str]]]:
    """Each folder with its files, once: under its own name where it lies below ``folder``, else under that of the first link to it."""
    seen, roots = set[tuple[int, int]](), [str(folder)]
    while roots:
        links: list[str] = []
        for root in sorted(roots):
            for parent, folders, files in os.walk(root):
                stat = os.stat(parent)
                written = parent != str(folder) and _STATE_DIR in folders
                if written or (stat.st_dev, stat.st_ino) in seen:
                    folders.clear()
                    continue
                seen.add((stat.st_dev, stat.st_ino))
                folders[:] = [name for name in folders if not name.startswith(".")]
                links += [path for name in folders if os.path.islink(path := os.path.join(parent, name))]
                yield parent, files
        roots = links


def _read_tar(path: Path, name: str) -> list[Source]:
    """The videos and images of a WebDataset tar, one per key, a video before an image. Nothing else of it is read than captions.

    Of a tar that is damaged, or holds what must not be used, what comes before that, and the tar itself as a source with a problem.
    """
    try:
        file = open(path, "rb", buffering=0)  # noqa: SIM115  # closed below
    except OSError as error:
        return [_unusable(path, name, f"the tar can't be opened: {error.strerror}; mend it, or take it out of input.path")]
    groups: dict[str, dict[str, Member]] = {}
    sources: list[Source] = []
    with file:
        try:
            for member in scan_tar(file.fileno(), shown=str(path)):
                key, extension = split_name(member.name) or (member.name, "")
                groups.setdefault(key, {}).setdefault(f".{extension.rpartition('.')[2].lower()}", member)
        except (TarError, OSError) as error:
            if groups:
                groups.popitem()  # its caption may lie behind the damage
            said = f"the tar can't be used from here on: {str(error).removeprefix(f'{path}: ')}"
            sources.append(_unusable(path, name, f"{said}. Fetch or pack it again, or take it out of input.path"))
        changed_ns = os.fstat(file.fileno()).st_mtime_ns
        for members in groups.values():
            media = next(
                (members[suffix] for kind in (VIDEO_SUFFIXES, IMAGE_SUFFIXES) for suffix in members if suffix in kind), None
            )
            if media is None:
                continue
            caption, problem = _member_caption(file.fileno(), members)
            sources.append(
                Source(
                    path=path,
                    name=f"{name}/{media.name}",
                    caption=caption,
                    num_bytes=media.size,
                    mtime_ns=changed_ns,
                    kind=_kind(media.name),
                    member=media.name,
                    offset=media.offset,
                    problem=problem,
                )
            )
    return sources


def _member_caption(fd: int, members: Mapping[str, Member]) -> tuple[str | None, str | None]:
    """What a sample's .txt says, or ``caption`` or ``text`` of its .json; and why that can't be read."""
    for suffix in (".txt", ".json"):
        if suffix not in members:
            continue
        member = members[suffix]
        try:
            content = os.pread(fd, member.size, member.offset)
            if suffix == ".txt":
                return content.decode("utf-8").strip(), None
            about = json.loads(content)
        except (ValueError, RecursionError, OSError) as error:  # ValueError: what decoding of UTF-8 and of JSON raise
            return None, f"its {suffix} is not UTF-8 {suffix[1:]}: {member.name}, {error}; pack the tar again without it"
        said = [about[field] for field in ("caption", "text") if isinstance(about, dict) and isinstance(about.get(field), str)]
        if said:
            return storable(str(said[0])).strip(), None
    return None, None


def _is_utf8(name: str) -> bool:
    try:
        name.encode()
    except UnicodeEncodeError:  # bytes that os.walk could not decode
        return False
    return True


def _read_caption(path: Path) -> tuple[str | None, str | None]:
    """What a .txt says, and why it can't be read."""
    try:
        return path.read_text(encoding="utf-8").strip(), None
    except FileNotFoundError:
        return None, None
    except UnicodeDecodeError as error:
        return None, f"its .txt is not UTF-8 text: {error}; save it as UTF-8"
    except OSError as error:
        return None, f"its .txt can't be read: {error.strerror}; put a text file there, or take it away"


def _read_table(folder: Path, path: Path) -> list[Source]:
    """A source per row; a null text is no caption. Rows that can't be used are sources with a problem.

    Raises:
        DataError: Unreadable, a column missing or of another type.
    """
    try:
        table, broken = (pq.read_table(path), list[Source]()) if path.suffix == ".parquet" else _read_csv(path)
    except (pa.ArrowInvalid, OSError) as error:
        raise DataError(f"{path}: can't be read ({error}); expected columns path,text") from error
    for column in ("path", "text"):
        if table.schema.names.count(column) != 1:
            raise DataError(f"{path}: needs one column {column!r}, has {table.schema.names}; expected columns path,text")
        if not _is_text(table.schema.field(column).type):
            raise DataError(f"{path}: column {column!r} holds {table.schema.field(column).type}, expected text")
    # Arrow doesn't look at what strings hold, and Python fails at the first that isn't UTF-8.
    names, texts = (table.column(name).cast(pa.large_string()).cast(pa.large_binary()).to_pylist() for name in ("path", "text"))
    sources: dict[str, Source] = {}
    times = Counter[str]()
    for row, (raw, text) in enumerate(zip(names, texts, strict=True), start=1):
        try:
            name = _checked_name(raw)
        except ValueError as error:
            broken.append(_unusable(path, f"{path.name}, row {row}", f"its path can't be used: {error}"))
            continue
        times[name] += 1
        try:
            sources[name] = _source(folder, name, None if text is None else text.decode("utf-8").strip())
        except UnicodeDecodeError as error:
            sources[name] = _source(
                folder, name, None, f"its text in {path.name} is not UTF-8: row {row}, {error}; save it as UTF-8"
            )
    for name in (name for name, count in times.items() if count > 1):
        sources[name] = _source(folder, name, None, f"{path.name} lists it more than once: {times[name]} rows; keep one")
    return [*sources.values(), *broken]


def _read_csv(path: Path) -> tuple[pa.Table, list[Source]]:
    """All columns as text, and the rows that have more or fewer of them."""
    broken: list[Source] = []

    def skip(row: pa.csv.InvalidRow) -> str:
        problem = f"a row with another number of columns: {row.actual_columns}, expected {row.expected_columns}; put quotes around commas"
        broken.append(_unusable(path, f"{path.name}, line {row.number}", problem))
        return "skip"

    parse = pa.csv.ParseOptions(newlines_in_values=True, invalid_row_handler=skip)
    with open(path, "rb") as file:  # guessed, a type of a column that isn't asked for could fail in the last row
        names = pa.csv.open_csv(
            file, parse_options=pa.csv.ParseOptions(newlines_in_values=True, invalid_row_handler=lambda _: "skip")
        )
        convert = pa.csv.ConvertOptions(column_types={name: pa.string() for name in names.schema.names}, check_utf8=False)
    return pa.csv.read_csv(
        path, read_options=pa.csv.ReadOptions(use_threads=False), parse_options=parse, convert_options=convert
    ), broken


def _is_text(kind: pa.DataType) -> bool:
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_null(kind))


def _checked_name(raw: bytes | None) -> str:
    """A path of the table in normal form ("./a//b.mp4" is "a/b.mp4").

    Raises:
        ValueError: It is none, not UTF-8, or leads out of the folder.
    """
    value = (raw or b"").decode("utf-8")
    name = PurePosixPath(value)
    if not value or name.is_absolute() or ".." in name.parts or "\0" in value:
        raise ValueError(f"{value!r} must name a file inside the folder, relative to it")
    return str(name)
