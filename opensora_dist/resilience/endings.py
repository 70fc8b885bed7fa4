"""How each rank ended, in a file that outlives it, for who decides whether to start the run again.

A launcher sees exit codes, and torchrun's is 1 whatever happened. But a mistake in the code comes again at every start, and a node that is
gone does not: so each rank says of itself which it was. A rank that says nothing was killed.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import platform
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Final

from opensora_dist.core.errors import ConfigError, DeviceError, OpensoraError

ENDINGS_VARIABLE: Final = "OPENSORA_ENDINGS"
"""Names the folder; where it isn't set, nothing is noted."""

_MOST_SAID: Final = 2000

# What CUDA, its libraries and NCCL say where memory is too small: that comes again.
_MEMORY = ("out of memory", "cublas_status_alloc_failed", "cudnn_status_alloc_failed", "ncclinvalidusage", "ncclinvalidargument")
# And where a GPU, its driver or a link failed (cudaGetErrorString, ncclGetErrorString, torch.cuda, NVML). Not here, since a mistake in
# a kernel or an index says them too: illegal memory access, misaligned address, device-side assert, unspecified launch failure.
_DEVICE = (
    "ecc error",
    "nvlink",
    "illegal instruction",
    "hardware stack error",
    "busy or unavailable",
    "no cuda-capable device",
    "no cuda gpus are available",
    "found no nvidia driver",
    "cuda driver initialization failed",
    "cudagetdevicecount",
    "invalid device ordinal",
    "system not yet initialized",
    "unsupported display driver",
    "cuda error: unknown error",
    "cuda error: initialization error",
    "os call failed",
    "gpu is lost",
    "fallen off the bus",
    "unhandled system error",
    "ncclsystemerror",
    "unhandled cuda error",
    "ncclunhandledcudaerror",
    "ncclinternalerror",
)
# Of a file system that this machine no longer reaches.
_MACHINE_ERRNOS = (errno.EIO, errno.ESTALE, errno.ENOTCONN, errno.ESHUTDOWN, errno.ENODEV, errno.ENXIO)


class Ending(StrEnum):
    """Why a rank ended."""

    DONE = "done"
    STOPPED = "stopped"  # as asked; saved, but for a second Ctrl-C
    CONFIG = "config"  # it would fail again, at once
    ERROR = "error"  # it would fail again
    LOST = "lost contact"  # of another rank, which ended first or can't be reached
    HANG = "hang"  # ended by the watchdog
    DEVICE = "device"  # a GPU, its driver or a link failed, or the machine's way to its files
    KILLED = "killed"  # said nothing


@dataclass(frozen=True, kw_only=True)
class Ended:
    """
    Args:
        ending: Why.
        said: In words.
        signal: That this rank was stopped by; None where another one was asked.
        host: Where this rank ran, as far as it is known.
    """

    ending: Ending
    said: str = ""
    signal: str | None = None
    host: str | None = None


def note_ending(ended: Ended) -> None:
    """Writes this rank's, once; the first counts. Where it can't be written, stderr has it, and the process goes on to its end."""
    path = _own_file()
    if path is None:
        return
    record = {"ending": ended.ending, "said": ended.said[:_MOST_SAID], "signal": ended.signal, "host": platform.node()}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(FileExistsError):
            _write_new(path, json.dumps(record).encode())
    except OSError as error:
        print(f"{path} can't be written ({error}); this rank ended: {json.dumps(record)}", file=sys.stderr, flush=True)


def note_error(error: BaseException) -> None:
    """``note_ending`` of what ends this rank."""
    if _own_file() is not None:
        note_ending(ended_by(error))


def noted(body: Callable[[], int]) -> int:
    """``body()``, which returns an exit code; how it ends is noted. What an earlier start of this rank noted is forgotten first."""
    if (path := _own_file()) is not None:
        with contextlib.suppress(OSError):
            path.unlink(missing_ok=True)
    try:
        code = body()
    except BaseException as error:
        note_error(error)
        raise
    note_ending(Ended(ending=Ending.DONE) if code == 0 else Ended(ending=Ending.ERROR, said=f"exit code {code}"))
    return code


def read_endings(folder: Path, *, world: int) -> Mapping[int, Ended]:
    """Of every rank; ``KILLED`` of those that said nothing, or were cut off in it."""
    return {rank: _read(folder / _name(rank)) for rank in range(world)}


def ended_by(error: BaseException) -> Ended:
    """What an error says of its rank: judged by it and its explicit causes, from the last one told to the first one met."""
    return Ended(ending=_ending_of(error), said=f"{type(error).__name__}: {error}", signal=_signal_of(error))


def _ending_of(error: BaseException) -> Ending:
    # Imports torch, which a rank that comes here has already.
    from opensora_dist.parallel.failures import is_lost_contact

    if isinstance(error, KeyboardInterrupt):
        return Ending.STOPPED
    if isinstance(error, SystemExit):
        return Ending.DONE if error.code in (0, None) else Ending.CONFIG if error.code == 2 else Ending.ERROR
    chain = [error]
    while (cause := chain[-1].__cause__) is not None:
        chain.append(cause)
    if any(isinstance(e, ConfigError) and not isinstance(e, DeviceError) for e in chain):
        return Ending.CONFIG
    if isinstance(error, DeviceError):  # who submits a run asks for a device that the machines have
        return Ending.DEVICE
    raw = [e for e in chain if isinstance(e, RuntimeError)]
    said = " ".join(str(e).lower() for e in raw)
    if any(phrase in said for phrase in _MEMORY):
        return Ending.ERROR
    if any(phrase in said for phrase in _DEVICE) or any(isinstance(e, OSError) and e.errno in _MACHINE_ERRNOS for e in chain):
        return Ending.DEVICE
    # Not our own CommunicationError alone: ranks that are about to do different things would be so again.
    lost = any(is_lost_contact(e) for e in raw if not isinstance(e, OpensoraError))
    return Ending.LOST if lost else Ending.ERROR


def _signal_of(error: BaseException) -> str | None:
    return "SIGINT" if isinstance(error, KeyboardInterrupt) else None


def _name(rank: int) -> str:
    return f"rank-{rank}.json"


def _own_file() -> Path | None:
    """None where nobody asked, or this process is no rank: who starts ranks has nothing to say for them."""
    folder, rank = os.environ.get(ENDINGS_VARIABLE), os.environ.get("RANK")
    return Path(folder) / _name(int(rank)) if folder and rank else None


def _write_new(path: Path, data: bytes) -> None:
    """Raises FileExistsError where it is there. A file that can't be filled is taken away again."""
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
    try:
        whole = os.write(handle, data) == len(data)
        os.fsync(handle)
        if not whole:
            raise OSError(errno.ENOSPC, "written in part")
    except OSError:
        path.unlink(missing_ok=True)
        raise
    finally:
        os.close(handle)


def _read(path: Path) -> Ended:
    try:
        record = json.loads(path.read_text())
        return Ended(**{**record, "ending": Ending(record["ending"])})
    except (OSError, ValueError, KeyError, TypeError):
        return Ended(ending=Ending.KILLED)
