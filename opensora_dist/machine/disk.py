"""A folder's file system: free space, and what it writes and reads past the page cache.

Run as ``python -m opensora_dist.machine.disk FOLDER LEAST_GIB LEVEL``, in a process of its own (``children``): a server that is gone
leaves whoever asks for its files waiting within the kernel.
"""

from __future__ import annotations

import errno
import mmap
import os
import shutil
import sys
import time
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from opensora_dist.machine.children import Teller, findings_of_child
from opensora_dist.machine.finding import Finding, Level, Subject

_SUBJECT: Final = Subject("disk")
FREE_SPACE: Final = "free space"
_FOLDER_S: Final = 60.0  # a slow disk syncs 128 MiB in less
_BLOCK = 4 << 20
_BLOCKS = 32
_LIMIT_S = 2.0  # of each direction: a slow disk has been measured by then
_SLOW_BYTES_PER_S = 50e6


@dataclass(frozen=True, kw_only=True)
class DiskSpeed:
    """
    Args:
        write_bytes_per_s, read_bytes_per_s: One file, 4 MiB at a time.
        write_way, read_way: How the page cache was kept out of it.
        num_bytes: How much was written.
    """

    write_bytes_per_s: float
    read_bytes_per_s: float
    write_way: str
    read_way: str
    num_bytes: int


def measure_disk(folder: Path) -> DiskSpeed:
    """Writes up to 128 MiB into a file of ``folder`` and reads it again, for at most about 2 s each; nothing is left.

    Raises:
        OSError: It can't be written or read.
    """
    try:
        return _measure(folder, direct=hasattr(os, "O_DIRECT"))
    except OSError as error:
        if error.errno not in (
            errno.EINVAL,
            errno.EOPNOTSUPP,
        ):  # as some file systems say to direct I/O, when opened or when written
            raise
        return _measure(folder, direct=False)


def _measure(folder: Path, *, direct: bool) -> DiskSpeed:
    path = folder / f".opensora-disk-{uuid.uuid4().hex}"
    flag = os.O_DIRECT if direct else 0
    # Direct I/O wants addresses that are multiples of the device's block: anonymous memory begins at a page.
    with mmap.mmap(-1, _BLOCK) as block:
        block.write(os.urandom(4096) * (_BLOCK // 4096))  # so that a file system that compresses zeros away has something to do
        try:
            written, write_s = _write(path, block, flag=flag)
            read, read_s = _read(path, block, flag=flag)
        finally:
            path.unlink(missing_ok=True)
    return DiskSpeed(
        write_bytes_per_s=written / write_s,
        read_bytes_per_s=read / read_s,
        write_way="O_DIRECT and fdatasync" if direct else "fdatasync",
        read_way="O_DIRECT" if direct else "after posix_fadvise, which a file system may ignore",
        num_bytes=written,
    )


def _write(path: Path, block: mmap.mmap, *, flag: int) -> tuple[int, float]:
    """Bytes and seconds."""
    began, written = time.perf_counter(), 0
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | flag, 0o600)
    try:
        for _ in range(_BLOCKS):
            written += os.write(handle, block)
            if time.perf_counter() - began > _LIMIT_S:
                break
        getattr(os, "fdatasync", os.fsync)(handle)
    finally:
        os.close(handle)
    return written, time.perf_counter() - began


def _read(path: Path, block: mmap.mmap, *, flag: int) -> tuple[int, float]:
    """Bytes and seconds."""
    handle = os.open(path, os.O_RDONLY | flag)
    try:
        if not flag and hasattr(os, "posix_fadvise"):
            os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
        began, read = time.perf_counter(), 0
        while count := os.readv(handle, [block]):
            read += count
            if time.perf_counter() - began > _LIMIT_S:
                break
    finally:
        os.close(handle)
    return read, time.perf_counter() - began


def disk_findings(folder: Path) -> list[Finding]:
    """Speed of a folder: a problem where it can't be written, a warning where it is slow."""
    try:
        speed = measure_disk(folder)
    except OSError as error:
        said = f"{folder} can't be written and read ({error.strerror or error})"
        return [
            _SUBJECT.finding(
                "speed", Level.PROBLEM, said, "check that it is there, mounted on this machine, and writable for you"
            )
        ]
    write, read = speed.write_bytes_per_s, speed.read_bytes_per_s
    said = (
        f"{folder} writes {write / 1e6:.0f} MB/s ({speed.write_way}), reads {read / 1e6:.0f} MB/s ({speed.read_way}), "
        f"{speed.num_bytes >> 20} MiB each"
    )
    slow = min(write, read) < _SLOW_BYTES_PER_S
    return [
        _SUBJECT.finding(
            "speed",
            Level.WARNING if slow else Level.OK,
            said,
            "checkpoints and shards want a faster one: a local disk, or a parallel file system" if slow else None,
            values={
                "write_bytes_per_s": write,
                "read_bytes_per_s": read,
                "write_way": speed.write_way,
                "read_way": speed.read_way,
            },
        )
    ]


def free_space_finding(folder: Path, *, least_gib: float, level: Level) -> Finding:
    """Free space of a folder that exists.

    Args:
        least_gib: What is needed.
        level: Of less.
    """
    usage = shutil.disk_usage(folder)
    free = usage.free / 2**30
    said, values = f"{folder} has {free:.1f} GiB free of {usage.total / 2**30:.1f}", {"free_gib": free}
    if free >= least_gib:
        return _SUBJECT.finding(FREE_SPACE, Level.OK, said, values=values)
    way_out = "free some space, or write elsewhere (run.dir)"
    return _SUBJECT.finding(FREE_SPACE, level, f"{said}, and {least_gib:g} are needed", way_out, values=values)


def folder_findings(folder: Path, *, least_gib: float, level: Level, timeout_s: float = _FOLDER_S) -> list[Finding]:
    """Speed of a folder, and its free space where it can be written; within ``timeout_s``, whatever its file system does.

    Args:
        least_gib: Free space that is needed.
        level: Of less.
        timeout_s: How long it may take; more is a problem.
    """
    remedy = f"see whether {folder} answers at all (`stat -f`): the server of a network file system may be gone"
    module, args = "opensora_dist.machine.disk", (str(folder), str(least_gib), level.value)
    return findings_of_child(module, *args, timeout_s=timeout_s, remedy=remedy)


def main(folder: Path, *, least_gib: float, level: Level) -> None:
    """Tells all findings. Arguments as ``folder_findings`` has them."""
    tell, found = Teller().check, list[Finding]()

    def speed() -> list[Finding]:
        found.extend(disk_findings(folder))
        return found

    tell(_SUBJECT.name, "speed", speed)
    if not any(finding.level is Level.PROBLEM for finding in found):  # else it isn't there
        tell(_SUBJECT.name, FREE_SPACE, lambda: free_space_finding(folder, least_gib=least_gib, level=level))


if __name__ == "__main__":
    main(Path(sys.argv[1]), least_gib=float(sys.argv[2]), level=Level(sys.argv[3]))
