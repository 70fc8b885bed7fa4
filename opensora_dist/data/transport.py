"""What goes wrong between a store and this machine: what is tried again, and what is said in the end."""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from opensora_dist.core.urls import redact

_T = TypeVar("_T")


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
        attempts: Transfers that are begun.
        backoff_s: Pause after the first that failed; each next one is twice as long.
        stall_s: Who waits for another process gives up after so long without a byte.
    """

    attempts: int = 5
    backoff_s: float = 0.5
    stall_s: float = 120.0


def retried(call: Callable[[], _T], *, shown: str, patience: Patience) -> _T:
    """What a small request answers, tried as often as a transfer is.

    Raises:
        FetchError: As ``ShardCache.open``.
    """
    for attempt in range(1, patience.attempts + 1):
        try:
            return call()
        except transport_errors() as error:
            if attempt == patience.attempts or is_final(error):
                raise gave_up(shown, attempt, error) from None
        time.sleep(patience.backoff_s * 2 ** (attempt - 1))
    raise AssertionError("the last attempt answers or raises")


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
