"""Files that are whole or absent: atomic writes, durable renames, content hashes. And folders that are one process's at a time."""

from __future__ import annotations

import errno
import fcntl
import io
import json
import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import xxhash

from opensora_dist.core.errors import ConfigError, OpensoraError
from opensora_dist.core.logging import get_logger

_log = get_logger(__name__)
_CHUNK_BYTES = 1 << 20
_NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOTSUP)  # what file systems without locks answer


def fsync(path: Path) -> None:
    """Makes the content of a file, or the renames and creations inside a folder, survive a power cut."""
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
        fsync(partial)
        os.replace(partial, path)
        fsync(path.parent)
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


def read_utf8(path: Path) -> str:
    """Text that a user wrote, without the byte order mark that some editors put before it.

    Raises:
        ConfigError: It is not UTF-8; the line is named.
    """
    data = Path(path).read_bytes()
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise ConfigError(
            f"{path}: line {line} holds bytes that are not UTF-8 (0x{data[error.start]:02x}); save the file as UTF-8"
        ) from error


def read_json(path: Path) -> Any:
    """Reads a JSON file."""
    return json.loads(Path(path).read_text())


@contextmanager
def exclusive_lock(path: Path, *, busy: OpensoraError) -> Iterator[None]:
    """Holds ``path`` for this process alone, until the block or the process ends. Where there are no locks, warns and goes on.

    Args:
        path: The lock file; made with its folder, and left there.
        busy: Raised where another process holds it.
    """
    with _locked(path, fcntl.LOCK_EX, busy=busy):
        yield


@contextmanager
def shared_lock(path: Path, *, busy: OpensoraError) -> Iterator[None]:
    """As ``exclusive_lock``, but others may hold ``path`` in the same way; ``busy`` is raised where one holds it alone."""
    with _locked(path, fcntl.LOCK_SH, busy=busy):
        yield


@contextmanager
def _locked(path: Path, how: int, *, busy: OpensoraError) -> Iterator[None]:
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w") as handle:
        try:
            fcntl.flock(handle, how | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise busy from error
        except OSError as error:  # as some cluster file systems are mounted; that is no reason not to work there
            if error.errno not in _NO_LOCKS:
                raise
            _log.warning("%s can't be locked (%s); see to it that no second process writes to %s", path, error, path.parent)
        yield


class FileWindow(io.RawIOBase):
    """Some bytes of a file, to be read as a file of their own: a tar's member, without a copy of it.

    Args:
        path: The file.
        offset, num_bytes: Which of its bytes.
        name: What it is called in errors.
    """

    def __init__(self, path: Path, *, offset: int, num_bytes: int, name: str) -> None:
        super().__init__()
        self.name = name
        self._file = open(path, "rb", buffering=0)  # noqa: SIM115 - closed with the window
        self._offset, self._num_bytes, self._place = offset, num_bytes, 0

    def close(self) -> None:
        """Closes the file."""
        self._file.close()
        super().close()

    def readable(self) -> bool:
        """It is."""
        return True

    def seekable(self) -> bool:
        """It is."""
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """As of any file."""
        start = {io.SEEK_SET: 0, io.SEEK_CUR: self._place, io.SEEK_END: self._num_bytes}[whence]
        self._place = max(0, start + offset)
        return self._place

    def tell(self) -> int:
        """As of any file."""
        return self._place

    def readinto(self, buffer: Any) -> int:
        """As of any raw file."""
        view = memoryview(buffer).cast("B")[: max(0, self._num_bytes - self._place)]
        count = os.preadv(self._file.fileno(), [view], self._offset + self._place)
        self._place += count
        return count


def hash_bytes(data: bytes | bytearray | memoryview) -> str:
    """xxh3-64 of a buffer, as 16 hex digits."""
    return xxhash.xxh3_64_hexdigest(data)


def sample_id(key: str) -> int:
    """The identity of a sample for keyed draws: a hash of its key, so that it survives re-sharding and re-ordering."""
    return xxhash.xxh3_64_intdigest(key.encode()) >> 1


def hash_file(path: Path) -> str:
    """xxh3-64 of a file's content, as 16 hex digits."""
    digest = xxhash.xxh3_64()
    with open(path, "rb") as handle:
        while chunk := handle.read(_CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()
