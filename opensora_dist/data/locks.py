"""Work in the cache's folder that one thread of all processes does while the others wait. Locks of processes that died are free."""

from __future__ import annotations

import errno
import fcntl
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from opensora_dist.data.transport import FetchError

_NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOTSUP)


def make_folder(path: Path) -> None:
    """Makes a folder of the cache.

    Raises:
        FetchError: It can't be, which names the field that says where the cache is.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise FetchError(
            f"{path}: can't be made ({error.strerror}); name a folder that can be written with data.cache.path"
        ) from None


@contextmanager
def turn(
    lock: Path, *, progress: Callable[[], float], late: str, stall_s: float, stopped: Callable[[], bool] = lambda: False
) -> Iterator[None]:
    """Holds a lock file for this thread alone, which other threads and processes wait for while work goes on.

    Args:
        progress: A number that changes while whoever has the lock gets on.
        late: What to say where it did not change for ``stall_s`` seconds.
        stopped: Asked while waiting; true ends it.
    Raises:
        FetchError: ``late``, or it was stopped.
    """
    with open(lock, "w") as handle:
        seen, since = progress(), time.monotonic()
        looked = since
        while not flock(handle.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB):
            if stopped():
                raise FetchError(f"{lock}: no longer waited for, as reading ended")
            now = time.monotonic()
            if now - looked > min(1.0, stall_s / 4):  # less often than the lock: it looks through folders
                looked = now
                if (last := progress()) != seen:
                    seen, since = last, now
                if now - since > stall_s:
                    raise FetchError(late)
            time.sleep(0.02)
        yield


def flock(fd: int, how: int) -> bool:
    """Whether the lock was had. Where there are no locks, as on some cluster file systems, everyone has it: renames are atomic still."""
    try:
        fcntl.flock(fd, how)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
    return True
