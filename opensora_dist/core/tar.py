"""What a tar holds and where, without taking anything out of it: members are read by offset, never extracted by name."""

from __future__ import annotations

import os
import re
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import BinaryIO

from opensora_dist.core.errors import DataError

_KEY = re.compile(r"^((?:.*/|)[^./][^/.]*)\.([^/]+)$", re.DOTALL)


@dataclass(frozen=True, kw_only=True)
class Member:
    """One entry of a tar.

    Args:
        offset, num_bytes: Where its content lies.
        refused: Why it must not be used: it is a link or a device, or its name leads elsewhere; None for a file as it should be.
    """

    name: str
    offset: int
    num_bytes: int
    refused: str | None = None


def scan_tar(file: BinaryIO, *, label: str) -> Iterator[Member]:
    """The members of an uncompressed tar in their order, folders left out. Only headers are read.

    Unlike tarfile's own loop, which takes a damaged header for the end of the archive.

    Args:
        file: Seekable.
        label: What errors call it.
    Raises:
        DataError: No tar, or damaged from some place on; what comes before is given first.
    """
    num_bytes = file.seek(0, os.SEEK_END)
    file.seek(0)
    try:
        with tarfile.TarFile(fileobj=file, mode="r", encoding="utf-8") as tar:
            while (info := tar.next()) is not None:
                tar.members.clear()  # it would keep all of them
                if info.offset_data + info.size > num_bytes:
                    raise tarfile.ReadError(f"it ends in the middle of {info.name!r}")
                if not info.isdir():
                    yield Member(name=info.name, offset=info.offset_data, num_bytes=info.size, refused=_refused(info))
            end = tar.offset
    except (tarfile.TarError, OSError, ValueError) as error:
        raise DataError(f"{label}: damaged, or not an uncompressed tar ({error}); fetch or write it again") from error
    file.seek(end)
    if file.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
        what = "ends" if file.tell() == end else "a damaged header"
        raise DataError(f"{label}: {what} at byte {end:,}, where a member or the end mark should be; fetch or write it again")


def split_name(name: str) -> tuple[str, str] | None:
    """WebDataset's key and extension of a member: what comes before the first dot of the last part, and after; None without both."""
    match = _KEY.match(name)
    return (match[1], match[2]) if match else None


def _refused(info: tarfile.TarInfo) -> str | None:
    path = PurePosixPath(info.name)
    if path.is_absolute() or ".." in path.parts or "\0" in info.name:
        return "its name leads out of the folder"
    if not info.isreg() or info.issparse():
        return "not a plain file"
    return None
