"""Stopping on request: a flag in the handler, agreed by all ranks at the same step's edge."""

from __future__ import annotations

import signal
from collections.abc import Callable
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, Final

import torch
import torch.distributed as dist

from opensora_dist.core.io import write_json

# The marker in the run directory that tells a launcher "saved and stopped on request; start me again to go on".
SAVED_AND_STOPPED: Final = "STOPPED"

# What Slurm, Kubernetes, spot instances and a terminal send.
STOP_SIGNALS: Final = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)

_Handler = Callable[[int, FrameType | None], Any] | int | None


class StopFlag:
    """Catches stop signals while the block runs; the loop asks ``requested`` at each step's edge.

    The handler sets a flag and does nothing else: a signal may come in the middle of a collective or of a checkpoint, and may
    come twice. Only a second Ctrl-C raises ``KeyboardInterrupt``: whoever presses it again won't wait. Main thread only,
    as Python's signal handlers are.
    """

    def __init__(self) -> None:
        self._caught: int | None = None
        self._interrupts = 0
        self._previous: dict[int, _Handler] = {}

    @property
    def requested(self) -> bool:
        """Whether this process was asked to stop."""
        return self._caught is not None

    @property
    def signal_name(self) -> str | None:
        """The first signal caught (``"SIGTERM"``), or None."""
        return signal.Signals(self._caught).name if self._caught is not None else None

    def __enter__(self) -> StopFlag:
        for number in STOP_SIGNALS:
            self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for number, handler in self._previous.items():
            # None: the handler before was installed by C code; Python can't put it back.
            signal.signal(number, handler if handler is not None else signal.SIG_DFL)
        self._previous.clear()

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self._caught is None:
            self._caught = number
        if number == signal.SIGINT:
            self._interrupts += 1
            if self._interrupts > 1:
                raise KeyboardInterrupt


class StopAgreement:
    """Makes all ranks stop at the same step, without a stall.

    Each step posts an asynchronous MAX of the ranks' flags and reads the one posted a step earlier, which has had a whole step to
    arrive. So a signal to any one rank stops all of them, one step after it was seen.

    Args:
        group: A CPU (gloo) group of all ranks; None is the default group, or one process where none is initialised.
    """

    def __init__(self, group: dist.ProcessGroup | None = None) -> None:
        self._group = group
        self._posted: tuple[torch.Tensor, dist.Work] | None = None

    def agree(self, flag: bool) -> bool:
        """Whether to stop now. Collective: every rank calls it at every step's edge, with its own flag, and gets the same answer.

        With one process the answer is the flag itself, at once.
        """
        if not dist.is_initialized() or dist.get_world_size(self._group) == 1:
            return flag
        stop = self._read()
        vote = torch.tensor([int(flag)], dtype=torch.int32)
        work = dist.all_reduce(vote, op=dist.ReduceOp.MAX, group=self._group, async_op=True)
        assert work is not None, "this rank is not in the group of the agreement"
        self._posted = (vote, work)
        return stop

    def close(self) -> None:
        """Waits for the last vote. Collective; called once after the last step, so that no rank leaves one in flight."""
        self._read()

    def _read(self) -> bool:
        if self._posted is None:
            return False
        vote, work = self._posted
        self._posted = None
        work.wait()
        return bool(vote.item())


def write_marker(run_dir: Path, *, step: int, signal_name: str | None) -> Path:
    """Writes ``STOPPED`` into the run directory: the run saved step ``step`` and ended because it was asked to.

    Args:
        signal_name: What this process caught; None where another rank did.
    """
    path = Path(run_dir) / SAVED_AND_STOPPED
    write_json(path, {"step": step, "signal": signal_name})
    return path


def clear_marker(run_dir: Path) -> None:
    """Removes the marker of an earlier stop, when the run goes on."""
    (Path(run_dir) / SAVED_AND_STOPPED).unlink(missing_ok=True)
