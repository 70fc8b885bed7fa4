"""What goes wrong between a store and this machine: what is tried again, and what is said in the end."""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from opensora_dist.core.logging import get_logger
from opensora_dist.core.urls import redact

_log = get_logger(__name__)
_T = TypeVar("_T")
_LOOK_S = 0.1  # between looks whether a pause still matters


class FetchError(OSError):
    """A shard can't be brought here. An ``OSError``, as it would be of a file on this machine: readers make it damage of samples.

    What the transport raised is left out of tracebacks: it may show a URL with its signature.

    Args:
        message: What is said.
        missing: The store answered that there is no such thing.
    """

    def __init__(self, message: str, *, missing: bool = False) -> None:
        super().__init__(message)
        self.missing = missing


@dataclass(frozen=True, kw_only=True)
class Patience:
    """How long a fetch is tried.

    Args:
        total_s: From the first failure on; what got further than any attempt before it begins anew.
        backoff_s: Pause after the first that failed; each next one is twice as long, up to ``longest_s``.
        longest_s: The longest pause.
        wrong: How often what came whole may be something else than what the index says: a store that holds the wrong thing keeps it.
        stall_s: Who waits for another process gives up after so long without a byte.
    """

    total_s: float = 300.0
    backoff_s: float = 0.5
    longest_s: float = 30.0
    wrong: int = 4
    stall_s: float = 120.0


def retried(call: Callable[[], _T], *, shown: str, patience: Patience) -> _T:
    """What a small request answers, tried as often as a transfer is.

    Raises:
        FetchError: As ``ShardCache.open``.
    """
    tries = Tries(patience, shown=shown)
    while True:
        try:
            return call()
        except transport_errors() as error:
            tries.failed(error)


class WrongContentError(EOFError):
    """What came is not what the index says."""


class Tries:
    """The attempts at one thing.

    Args:
        patience: How long it is tried.
        shown: What messages call it.
        stopped: Asked during pauses.
    """

    def __init__(self, patience: Patience, *, shown: str, stopped: Callable[[], bool] = lambda: False) -> None:
        self._patience, self._shown, self._stopped = patience, shown, stopped
        self._since: float | None = None
        self._attempts = self._row = self._wrong = self._furthest = 0

    def failed(self, error: BaseException, *, done: int = 0) -> None:
        """Of an attempt: returns after a pause, where another one may follow.

        Args:
            done: Bytes that are here.
        Raises:
            FetchError: It is given up, or stopped.
        """
        patience, now = self._patience, time.monotonic()
        self._attempts += 1
        self._wrong += isinstance(error, WrongContentError)
        if done > self._furthest:
            self._furthest, self._since, self._row = done, None, 0
        self._since = now if self._since is None else self._since
        pause = min(patience.longest_s, patience.backoff_s * 2**self._row)
        self._row = min(self._row + 1, 32)
        if is_final(error) or self._wrong >= patience.wrong or now + pause - self._since > patience.total_s:
            raise gave_up(self._shown, self._attempts, error) from None
        _log.warning("%s: %s; attempt %d follows in %.1f s", self._shown, why(error), self._attempts + 1, pause)
        while (left := now + pause - time.monotonic()) > 0:
            if self._stopped():
                raise FetchError(f"{self._shown}: not fetched, as reading ended")
            time.sleep(min(_LOOK_S, left))


def transport_errors() -> tuple[type[BaseException], ...]:
    """What transports raise, of those that are loaded."""
    kinds: list[type[BaseException]] = [OSError, EOFError, ValueError, asyncio.TimeoutError]
    for module, name in (
        ("aiohttp", "ClientError"),
        ("botocore.exceptions", "BotoCoreError"),
        ("botocore.exceptions", "ClientError"),
        ("gcsfs.retry", "HttpError"),
        ("google.auth.exceptions", "GoogleAuthError"),
    ):
        if module in sys.modules:
            kinds.append(getattr(sys.modules[module], name))
    return tuple(kinds)


def is_final(error: BaseException) -> bool:
    """Whether trying again can't help: not there, not allowed. fsspec's http calls whatever went wrong "not found": its cause says what."""
    status = getattr(error, "status", getattr(error.__cause__, "status", None))
    if isinstance(status, int):
        return 400 <= status < 500 and status not in (408, 425, 429)
    if type(error.__cause__).__module__.startswith("aiohttp"):  # no answer at all
        return False
    return isinstance(error, FileNotFoundError | PermissionError)


def why(error: BaseException) -> str:
    """What went wrong, without secrets."""
    cause = error.__cause__ if type(error.__cause__).__module__.startswith("aiohttp") else None  # fsspec says less than that
    return redact(f"{type(error).__name__}: {cause or error}")


def gave_up(shown: str, attempts: int, error: BaseException) -> FetchError:
    """The error of a transfer that is given up."""
    missing = isinstance(error, FileNotFoundError) and is_final(error) and getattr(error.__cause__, "status", 404) in (404, 410)
    return FetchError(
        f"{shown}: can't be fetched, after {attempts} attempt{'s' if attempts > 1 else ''} ({why(error)}); see that it is there, that this "
        "machine reaches it and that the credentials in the environment allow it (docs/remote.md)",
        missing=missing,
    )
