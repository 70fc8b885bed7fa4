"""Shards of remote data sets on this machine's disk: whole files, the least recently used of which go first.

The folder is shared by all processes of the machine, and by all data sets. A file that is there is whole: it is written under another
name, checked, made durable and renamed. Locks are the kernel's (flock), so those of a process that died are free.

Files are given out as descriptors that hold a shared lock, so that who makes room sees what is in use and takes others. Where nothing
else is left, a file in use loses its name: on Linux descriptors stay valid, and its space is free when the last is closed.
"""

from __future__ import annotations

import errno
import fcntl
import glob
import os
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import xxhash

from opensora_dist.core.io import fsync, read_utf8, write_text
from opensora_dist.core.logging import get_logger
from opensora_dist.data.locks import flock, make_folder, turn
from opensora_dist.data.transport import FetchError, Patience, Tries, WrongContentError, transport_errors, why

_log = get_logger(__name__)
_FULL = (errno.ENOSPC, errno.EDQUOT)
_PIECE_BYTES = 8 << 20
_ABANDONED_S = 3600.0  # a partial file that nobody wrote to for so long has no writer


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """A file that is to be in the cache.

    Args:
        path: Where it is or goes, below the cache's folder.
        shown: What messages call it: its URL, without secrets.
        read: Its bytes from a position on, piece by piece. Raises what the transport raises.
        num_bytes: Its size, where known.
        xxh3: Its xxh3-64 (hex), where known.
        noted: Its hash is written beside it as it comes, so that what becomes of it here can be told.
    """

    path: Path
    shown: str
    read: Callable[[int], Iterator[bytes]]
    num_bytes: int | None = None
    xxh3: str | None = None
    noted: bool = False


class ShardCache:
    """Files of remote data sets, at most so many bytes. Any thread and process may use it.

    Args:
        root: The cache's folder.
        max_bytes: What all files may take together.
        patience: How long a fetch is tried.
    """

    def __init__(self, root: Path, *, max_bytes: int, patience: Patience) -> None:
        self.root = root
        self.max_bytes = max_bytes
        self.patience = patience
        self._told_small = False

    def has(self, wanted: Wanted) -> bool:
        """Whether a file is here, by name and size."""
        try:
            size = wanted.path.stat().st_size
        except OSError:
            return False
        return wanted.num_bytes is None or size == wanted.num_bytes

    def open(self, wanted: Wanted, *, stopped: Callable[[], bool] = lambda: False) -> int:
        """A descriptor to read a file with, fetched where it isn't here; the caller closes it.

        Args:
            stopped: Asked between pieces; a fetch for which it is true ends with an error.
        Raises:
            FetchError: It can't be had; says from where, how often it was tried and the way out.
        """
        try:
            if (fd := self._take(wanted)) is not None:
                return fd
            make_folder(wanted.path.parent)
            with self._turn(wanted, stopped):
                if (fd := self._take(wanted)) is None:
                    self._fetch(wanted, stopped)
                    fd = self._take(wanted)
        except FetchError:
            raise
        except OSError as error:
            raise FetchError(
                f"{wanted.shown}: can't be kept in {wanted.path.parent} ({error.strerror}); name a folder that can be written with "
                "data.cache.path"
            ) from error
        if fd is None:
            raise FetchError(
                f"{wanted.shown}: was fetched to {wanted.path} and is gone again; does something else clean that folder?"
            )
        return fd

    def discard(self, wanted: Wanted) -> bool:
        """Removes a file that rotted on this machine's disk, so that the next ``open`` fetches it.

        Returns:
            Whether a whole file is here or will be fetched. False where that can't be found out or done.
        """
        try:
            if _is_whole(wanted):
                return True
            with self._turn(wanted, lambda: False):  # what another process fetched meanwhile stays
                if not _is_whole(wanted):
                    _log.warning("%s: the copy in %s is damaged; it is fetched again", wanted.shown, wanted.path)
                    wanted.path.unlink(missing_ok=True)
        except OSError as error:
            _log.warning("%s: its copy can't be removed (%s)", wanted.shown, why(error))
            return False
        return True

    def _take(self, wanted: Wanted) -> int | None:
        """The file if it is here and of the right size; a shared lock says that it is in use, its time that it was used last."""
        try:
            fd = os.open(wanted.path, os.O_RDONLY | os.O_CLOEXEC)
        except (FileNotFoundError, NotADirectoryError):
            return None
        if wanted.num_bytes is not None and os.fstat(fd).st_size != wanted.num_bytes:  # of a data set that was replaced
            os.close(fd)
            return None
        flock(fd, fcntl.LOCK_SH)
        with suppress(PermissionError):  # of another user's file
            os.utime(fd)
        return fd

    def _turn(self, wanted: Wanted, stopped: Callable[[], bool]) -> AbstractContextManager[None]:
        """One process at a time fetches a file; the others wait as long as it grows."""
        return turn(
            _beside(wanted.path, "lock"),
            progress=lambda: _progress(wanted.path),
            late=f"{wanted.shown}: another process of this machine fetches it to {wanted.path} and got nothing for "
            f"{self.patience.stall_s:.0f} s; end that process, or see whether the store answers",
            stall_s=self.patience.stall_s,
            stopped=stopped,
        )

    def _fetch(self, wanted: Wanted, stopped: Callable[[], bool]) -> None:
        for left in _partials(wanted.path):  # of a fetcher that died: this one has the lock
            left.unlink(missing_ok=True)
        partial = _beside(wanted.path, f"partial-{uuid.uuid4().hex[:8]}")
        try:
            self._make_room(wanted, partial)
            with open(partial, "r+b", buffering=0) as handle:
                xxh3 = self._transfer(handle.fileno(), wanted, stopped)
                os.fsync(handle.fileno())
            if wanted.noted:
                write_text(_note(wanted.path), xxh3)
            os.replace(partial, wanted.path)
            fsync(wanted.path.parent)
        except OSError as error:
            if error.errno in _FULL:
                raise FetchError(
                    f"{wanted.shown}: no space left in {self.root}; free some there, name another disk with data.cache.path, or lower "
                    f"data.cache.max_gib (now {self.max_bytes / 2**30:g}) below what the disk holds"
                ) from error
            raise
        finally:
            partial.unlink(missing_ok=True)
        if wanted.num_bytes is None:
            with self._room_lock():
                self._evict(0, keep=wanted.path)

    def _transfer(self, fd: int, wanted: Wanted, stopped: Callable[[], bool]) -> str:
        """Attempts with growing pauses. A later one goes on where the last ended, if the hash of the whole will tell whether that fits."""
        done, digest = 0, xxhash.xxh3_64()
        most = self.max_bytes if wanted.num_bytes is None else wanted.num_bytes
        tries = Tries(self.patience, shown=wanted.shown, stopped=stopped)
        while True:
            os.utime(fd)  # whoever waits for this process sees that it still tries
            if wanted.xxh3 is None or done >= (wanted.num_bytes or 0):  # what came is not what was wanted
                done, digest = 0, xxhash.xxh3_64()
            try:
                for piece in wanted.read(done):
                    if stopped():
                        raise FetchError(f"{wanted.shown}: not fetched, as reading ended")
                    if done + len(piece) > most:
                        done = most  # so that the next attempt begins anew
                        raise WrongContentError(f"more than {most:,} bytes came, and no more are wanted")
                    _write(fd, piece, done)
                    digest.update(piece)
                    done += len(piece)
                os.truncate(fd, done)
                _verify(wanted, done, digest.hexdigest())
                return digest.hexdigest()
            except (FetchError, _DiskError):
                raise
            except transport_errors() as error:
                tries.failed(error, done=done)

    def _make_room(self, wanted: Wanted, partial: Path) -> None:
        """Makes room and takes it at once, as a file of the size that is to come: others who make room count it."""
        need = wanted.num_bytes or 0
        if need > self.max_bytes:
            raise FetchError(
                f"{wanted.shown}: has {need / 2**30:.2f} GiB, more than all of data.cache.max_gib={self.max_bytes / 2**30:g}; raise it"
            )
        with self._room_lock():
            self._evict(need, keep=wanted.path)
            with open(partial, "wb") as handle:
                handle.truncate(need)

    @contextmanager
    def _room_lock(self) -> Iterator[None]:
        with open(self.root / ".lock", "w") as handle:
            flock(handle.fileno(), fcntl.LOCK_EX)  # whoever has it only looks and unlinks
            yield

    def _evict(self, need: int, *, keep: Path) -> None:
        """Removes the files used least recently until ``need`` bytes more fit; those in use only where no others are left."""
        files = sorted(_files(self.root), key=lambda file: file.used_s)
        over = sum(file.num_bytes for file in files) + need - self.max_bytes
        files = [file for file in files if file.path != keep and not file.is_being_written]
        for file in files:
            if over <= 0:
                return
            if _unlink_if_free(file.path):
                over -= file.num_bytes
        for file in files:
            if over <= 0:
                return
            if file.path.exists():
                self._tell_small()
                file.path.unlink(missing_ok=True)
                over -= file.num_bytes

    def _tell_small(self) -> None:
        if not self._told_small:
            self._told_small = True
            _log.warning(
                "data.cache.max_gib=%g is less than the shards that readers hold open; some of these lose their place (their readers go on)",
                self.max_bytes / 2**30,
            )


class _DiskError(OSError):
    """Of this machine's disk, not of the transport."""


def _verify(wanted: Wanted, num_bytes: int, xxh3: str) -> None:
    if wanted.num_bytes is not None and num_bytes != wanted.num_bytes:
        raise EOFError(f"{num_bytes:,} bytes came, the index says {wanted.num_bytes:,}")
    if wanted.xxh3 is not None and xxh3 != wanted.xxh3:
        raise WrongContentError(f"its xxh3 is {xxh3}, the index says {wanted.xxh3}")


def _is_whole(wanted: Wanted) -> bool:
    """Whether a file has the hash that it should; one that isn't here is whole as it will be fetched, one without a hash is not."""
    if not wanted.path.exists():
        return True
    note = _note(wanted.path)
    xxh3 = read_utf8(note) if wanted.noted and note.exists() else wanted.xxh3
    if xxh3 is None:
        return False
    digest = xxhash.xxh3_64()
    with open(wanted.path, "rb", buffering=0) as handle:
        while piece := handle.read(_PIECE_BYTES):
            digest.update(piece)
    return digest.hexdigest() == xxh3


def _note(path: Path) -> Path:
    return path.with_name(f"{path.name}.xxh3")


def _write(fd: int, piece: bytes, offset: int) -> None:
    view = memoryview(piece)
    try:
        while view:
            count = os.pwrite(fd, view, offset)
            view, offset = view[count:], offset + count
    except OSError as error:
        raise _DiskError(error.errno, error.strerror) from error


def _beside(path: Path, kind: str) -> Path:
    return path.with_name(f".{path.name}.{kind}")


def _partials(path: Path) -> list[Path]:
    return list(path.parent.glob(f".{glob.escape(path.name)}.partial-*"))


def _progress(path: Path) -> float:
    """When something was last written for a file."""
    times = [0.0]
    for partial in _partials(path):
        try:
            times.append(partial.stat().st_mtime)
        except FileNotFoundError:
            continue
    return max(times)


@dataclass(frozen=True)
class _File:
    """A shard or a part of one: when it was used last, its size."""

    path: Path
    used_s: float
    num_bytes: int

    @property
    def is_being_written(self) -> bool:
        return ".partial-" in self.path.name and time.time() - self.used_s < _ABANDONED_S


def _files(root: Path) -> Iterator[_File]:
    """Shards and parts of them. Indexes and locks stay, and don't count."""
    for folder, _, names in os.walk(root):
        for name in names:
            if name.endswith(".tar") or ".tar.partial-" in name:
                path = Path(folder, name)
                with suppress(FileNotFoundError):
                    status = path.stat()
                    yield _File(path, status.st_mtime, status.st_size)


def _unlink_if_free(path: Path) -> bool:
    """Removes a file that nobody has open; says whether it did."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return False
    try:
        if not flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB):
            return False
        path.unlink(missing_ok=True)
        return True
    finally:
        os.close(fd)
