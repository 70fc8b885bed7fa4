"""What lies where in a tar, read from its headers alone. Damage is an error that names file and offset, never an early end.

Formats: USTAR, GNU (long names), PAX (path, size). A tar library would do, but for three things that matter here: every header's
checksum is verified, a file that ends without tar's end mark is refused, and nothing is ever extracted by name.
Source: POSIX.1-2001, pax; GNU tar manual, "Basic Tar Format".
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import PurePosixPath

from opensora_dist.core.errors import DataError

_BLOCK = 512
_ZEROS = bytes(_BLOCK)
_REFUSED = {
    "1": "a hard link",
    "2": "a symbolic link",
    "3": "a character device",
    "4": "a block device",
    "6": "a pipe",
    "K": "a link with a long target",
    "S": "a sparse file",
    "M": "a part of a file that goes on in another volume",
}
_FILES = ("0", "\0", "7")
_FOLDER, _GNU_NAME, _PAX, _PAX_GLOBAL = "5", "L", "x", "g"
_LONGEST_META = 1 << 20


class TarError(DataError):
    """A tar is damaged, or holds what this project doesn't read.

    Args:
        shown: The file.
        offset: Byte in it where the header or payload begins that is wrong.
        reason: What is wrong.
    """

    def __init__(self, shown: str, offset: int, reason: str) -> None:
        super().__init__(f"{shown}: at offset {offset}: {reason}")
        self.offset = offset


@dataclass(frozen=True)
class Member:
    """A file in a tar: its name, where its bytes begin and how many they are."""

    name: str
    offset: int
    size: int


def scan_tar(fd: int, *, shown: str) -> Iterator[Member]:
    """The files in a tar, in order. Payloads are not read; folders are passed over.

    Args:
        fd: The open file; its position is neither used nor moved.
        shown: What an error calls it.
    Raises:
        TarError: At the first header or payload that isn't whole, or whose kind or name is refused: links, devices, sparse files,
            absolute names and names with "..". Files before it have been yielded.
    """
    end, at = os.fstat(fd).st_size, 0
    said: dict[str, str] = {}  # by extended headers, about the next member
    while True:
        header = os.pread(fd, _BLOCK, at)
        if len(header) < _BLOCK:
            raise TarError(shown, at, f"the file ends after {end:,} bytes without tar's end mark; it was cut short")
        if header == _ZEROS:
            _check_end(fd, at, end, shown=shown)
            return
        _check_sum(header, at, shown=shown)
        kind = chr(header[156])
        size = _number(header[124:136], at, shown=shown)
        if "size" in said and kind in _FILES:
            size = _decimal(said["size"], at, shown=shown)
        payload = at + _BLOCK
        after = payload + (size + _BLOCK - 1) // _BLOCK * _BLOCK
        if kind in (_PAX, _PAX_GLOBAL, _GNU_NAME):
            found = _extended(fd, kind, payload, size, end=end, shown=shown)
            if kind != _PAX_GLOBAL:
                said |= found
            at = after
            continue
        name = said.get("path") or _short_name(header, at, shown=shown)
        said = {}
        _check_kind(kind, name, at, shown=shown)
        if payload + size > end:
            raise TarError(
                shown, at, f"member {name!r} has {size:,} bytes, the file ends after {max(0, end - payload):,} of them"
            )
        if kind in _FILES:
            yield Member(_safe_name(name, at, shown=shown), payload, size)
        at = after


def _check_end(fd: int, at: int, end: int, *, shown: str) -> None:
    """Two blocks of zeros, and nothing but zeros after them: more would be members that every reader passes over in silence."""
    if os.pread(fd, _BLOCK, at + _BLOCK) != _ZEROS:
        raise TarError(shown, at, "one block of zeros where tar's end mark has two; it is damaged or was cut short")
    for start in range(at, end, 1 << 20):
        if os.pread(fd, 1 << 20, start).strip(b"\0"):
            raise TarError(shown, at, "more data follows tar's end mark, which readers never see; were tars joined with cat?")


def _check_sum(header: bytes, at: int, *, shown: str) -> None:
    if at == 0 and header[:2] == b"\x1f\x8b":
        raise TarError(shown, at, "it is compressed, so that nothing in it can be read by offset; unpack it once (gunzip)")
    stated = _number(header[148:156], at, shown=shown)
    plain = sum(header) - sum(header[148:156]) + 8 * ord(" ")
    if stated != plain and stated != plain - 256 * sum(
        byte > 127 for byte in header[:148] + header[156:]
    ):  # old tars: signed bytes
        raise TarError(shown, at, f"a header's checksum is {plain:o}, it says {stated:o}; it is damaged")


def _number(field: bytes, at: int, *, shown: str) -> int:
    """Octal digits, or GNU's form for large numbers: binary, with the first bit set."""
    if field[0] & 0x80:
        return int.from_bytes(field, "big") & ((1 << (8 * len(field) - 1)) - 1)
    digits = field.split(b"\0")[0].strip()
    try:
        return int(digits or b"0", 8)
    except ValueError as error:
        raise TarError(shown, at, f"a header holds {digits!r} where an octal number belongs; it is damaged") from error


def _decimal(text: str, at: int, *, shown: str) -> int:
    if not text.isdecimal():
        raise TarError(shown, at, f"an extended header says size {text!r}; it is damaged")
    return int(text)


def _short_name(header: bytes, at: int, *, shown: str) -> str:
    name = _text(header[:100].split(b"\0")[0], at, shown=shown)
    prefix = header[345:500].split(b"\0")[0] if header[257:263] == b"ustar\0" else b""
    return f"{_text(prefix, at, shown=shown)}/{name}" if prefix else name


def _extended(fd: int, kind: str, offset: int, size: int, *, end: int, shown: str) -> dict[str, str]:
    """What an extended header says about the next member: ``path``, ``size``."""
    if size > _LONGEST_META or offset + size > end:
        raise TarError(shown, offset - _BLOCK, f"an extended header of {size:,} bytes; it is damaged, or the file was cut short")
    content = os.pread(fd, size, offset)
    if kind == _GNU_NAME:
        return {"path": _text(content.split(b"\0")[0], offset, shown=shown)}
    found = {}
    while content:
        length, space, _ = content.partition(b" ")
        if not space or not length.isdigit() or not len(length) + 2 < int(length) <= len(content):
            raise TarError(shown, offset, "a PAX header whose records don't fit their lengths; it is damaged")
        key, _, value = content[len(length) + 1 : int(length) - 1].partition(b"=")
        content = content[int(length) :]
        if key.startswith(b"GNU.sparse"):
            raise TarError(shown, offset, "it holds a sparse file, which is not stored as it is read; pack it without --sparse")
        if key in (b"path", b"size"):
            found[key.decode()] = _text(value, offset, shown=shown)
    return found


def _check_kind(kind: str, name: str, at: int, *, shown: str) -> None:
    if kind in _FILES or kind == _FOLDER:
        return
    what = _REFUSED.get(kind, f"of an unknown kind ({kind!r})")
    raise TarError(shown, at, f"member {name!r} is {what}; only plain files are read: pack the tar without it")


def _safe_name(name: str, at: int, *, shown: str) -> str:
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or "\0" in name or not path.name:
        raise TarError(
            shown, at, f"member {name!r} points out of the tar (an absolute name, or one with '..'); pack it with plain names"
        )
    return str(path)


def _text(raw: bytes, at: int, *, shown: str) -> str:
    try:
        return raw.decode()
    except UnicodeDecodeError as error:
        raise TarError(shown, at, f"a name that is not UTF-8 ({raw!r})") from error
