"""A request to stop that comes before the first step: nothing is lost, so the process ends at once, and says so.

Python's handlers wait for the main thread, which may be waiting in C for other ranks. The wake-up descriptor is written to by the signal
itself, and a thread reads it.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

from opensora_dist.core.logging import get_logger
from opensora_dist.resilience.endings import Ended, Ending, note_ending
from opensora_dist.resilience.signals import write_marker

_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
_log = get_logger(__name__)


class StopWhileStarting:
    """Ends the process on SIGTERM and SIGUSR1, until ``over``; from then on they do what they did before. Main thread only.

    With code 0 and the marker, which names the step that the run would have gone on from. Only of a SIGTERM from a launcher that isn't
    known to be true: it sends one, too, where another rank has failed. Then the code is 1, and there is no marker. A signal to one rank
    of several ends that rank, and the others fail as they lose contact; who asks a run to stop asks all.

    Args:
        run_dir: Where the marker goes.
        saved_step: The step of the newest checkpoint, asked when the signal comes; 0 where there is none.
        launched: A launcher started this process.
    """

    def __init__(self, run_dir: Path, *, saved_step: Callable[[], int], launched: bool) -> None:
        self._run_dir, self._saved_step, self._launched = run_dir, saved_step, launched
        self._previous: dict[int, Any] = {}
        self._read, self._write = os.pipe()
        os.set_blocking(self._write, False)
        self._thread = threading.Thread(target=self._run, name="stop-while-starting", daemon=True)

    def __enter__(self) -> StopWhileStarting:
        self._previous = {number: signal.signal(number, self._handle) for number in _SIGNALS}
        signal.set_wakeup_fd(self._write, warn_on_full_buffer=False)
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.over()
        os.close(self._read)
        os.close(self._write)
        for number in _SIGNALS:
            self._put_back(number)

    def over(self) -> None:
        """The loop listens from here on; a second call does nothing."""
        if self._thread.is_alive():
            signal.set_wakeup_fd(-1)
            os.write(self._write, b"\0")
            self._thread.join()

    def _handle(self, number: int, _frame: FrameType | None) -> None:
        """Set for the descriptor to be written to. Once it isn't read any more, and the loop no longer listens, as it was before."""
        if not self._thread.is_alive():
            self._put_back(number)
            os.kill(os.getpid(), number)

    def _put_back(self, number: int) -> None:
        handler = self._previous[number]
        signal.signal(number, handler if handler is not None else signal.SIG_DFL)

    def _run(self) -> None:
        while (number := os.read(self._read, 1)[0]) != 0:
            if number in _SIGNALS:
                self._stop(signal.Signals(number))

    def _stop(self, number: signal.Signals) -> None:
        asked, step = number == signal.SIGUSR1 or not self._launched, self._saved_step()
        if asked:
            with contextlib.suppress(OSError):  # a full disk is no reason to stay
                write_marker(self._run_dir, step=step, signal_name=number.name)
        ending = Ended(ending=Ending.STOPPED, said=f"before the first step, saved step {step}", signal=number.name)
        lost = Ended(ending=Ending.LOST, said=f"{number.name} before the first step, as another rank has failed or a user asked")
        note_ending(ending if asked else lost)
        why = "as asked" if asked else "as asked, or because another rank has failed"
        said = "ended by %s before the first step, %s; nothing is lost: the same command goes on from step %d"
        _log.warning(said, number.name, why, step)
        logging.shutdown()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0 if asked else 1)
