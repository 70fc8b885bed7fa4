"""Progress: a live display on a terminal, plain lines elsewhere, nothing from ranks other than 0."""

from __future__ import annotations

import logging
import statistics
import sys
import time
from collections.abc import Sequence
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from opensora_dist.observe.metrics import StepMetrics

_LINE_EVERY_S = 5.0


def format_count(value: float) -> str:
    """Three digits and a unit: 950, 12.3k, 759M."""
    for limit, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= limit:
            return f"{value / limit:.3g}{unit}"
    return f"{value:.3g}"


def format_seconds(seconds: float) -> str:
    """``42s``, ``3m05s``, ``2h03m``, ``4d07h``."""
    total = max(0, round(seconds))
    if total < 60:
        return f"{total}s"
    if total < 3600:
        return f"{total // 60}m{total % 60:02d}s"
    if total < 86400:
        return f"{total // 3600}h{total % 3600 // 60:02d}m"
    return f"{total // 86400}d{total % 86400 // 3600:02d}h"


def describe_steps(window: Sequence[StepMetrics], *, total_steps: int) -> str:
    """One line about the steps since the last one: last loss and norm, mean speed, share of data wait, time to go."""
    last = window[-1]
    seconds = sum(m.step_s for m in window)
    parts = [f"loss {last.loss:.4f}", f"grad {last.grad_norm:.3g}", f"lr {last.lr:.2e}"]
    if seconds > 0:
        parts.append(f"{format_count(sum(m.samples for m in window) / seconds)} samples/s")
        parts.append(f"{format_count(sum(m.tokens for m in window) / seconds)} tokens/s")
    known = [m for m in window if m.mfu is not None]
    if known and seconds > 0:
        # Weighted by time: FLOPs over seconds of the whole window, not a mean of the steps' ratios.
        mfu = sum(m.mfu * m.step_s for m in known if m.mfu is not None) / sum(m.step_s for m in known)
        parts.append(f"MFU {100 * mfu:.1f}%")
    if seconds > 0:
        parts.append(f"wait {100 * sum(m.data_wait_s for m in window) / seconds:.0f}%")
    # The median: one step that waited for a checkpoint says nothing about the rest.
    parts.append(f"ETA {format_seconds((total_steps - last.step) * statistics.median(m.step_s for m in window))}")
    return "  ".join(parts)


class Bar:
    """A progress bar of one piece of work, as a context manager. On a terminal it is live; elsewhere a line now and then.

    Args:
        description: What is being done ("encoding clips").
        total: Number of items; None where it isn't known.
        done: Items already done.
        enabled: Whether this process shows anything (rank 0 does).
        console: Where to; default: stderr, so that results on stdout stay clean.
    """

    def __init__(
        self, description: str, *, total: int | None, done: int = 0, enabled: bool = True, console: Console | None = None
    ) -> None:
        self._description, self._total, self._done, self._enabled = description, total, done, enabled
        self._console = console or Console(stderr=True)
        self._live = self._console.is_terminal
        self._last_line_s = -float("inf")
        self._printed: int | None = None  # the count in the last plain line
        self._started_s = 0.0
        self._loggers: list[tuple[logging.StreamHandler[Any], Any]] = []
        self._task = TaskID(0)
        self._progress = Progress(
            TextColumn("[bold]{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("{task.fields[note]}"),
            TimeElapsedColumn(),
            *([TimeRemainingColumn()] if total is not None else []),
            console=self._console,
            disable=not (enabled and self._live),
        )

    def __enter__(self) -> Bar:
        self._started_s = time.monotonic()
        self._progress.start()
        if self._enabled and self._live:
            self._task = self._progress.add_task(self._description, total=self._total, completed=self._done, note="")
            self._redirect_log()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._live:
            self._progress.stop()
            for handler, stream in self._loggers:
                handler.setStream(stream)
            self._loggers.clear()
        elif self._enabled and kind is None and self._done != self._printed:
            self._print()

    def advance(self, count: int = 1, *, note: str = "") -> None:
        """``count`` more items are done."""
        self.update(self._done + count, note=note)

    def update(self, done: int, *, total: int | None = None, note: str = "", line: bool = False) -> None:
        """``done`` items of ``total`` are done.

        Args:
            note: Shown after the count.
            line: Without a terminal, print a line now; otherwise one is printed every few seconds.
        """
        self._done = done
        self._total = total if total is not None else self._total
        if not self._enabled:
            return
        if self._live:
            self._progress.update(self._task, completed=done, total=self._total, note=note)
        elif line or time.monotonic() - self._last_line_s >= _LINE_EVERY_S:
            self._print(note)

    def _print(self, note: str = "") -> None:
        self._last_line_s = time.monotonic()
        self._printed = self._done
        count = f"{self._done}/{self._total}" if self._total is not None else str(self._done)
        tail = note or f"{format_seconds(time.monotonic() - self._started_s)} elapsed"
        print(f"{self._description} {count}  {tail}", file=self._console.file, flush=True)

    def _redirect_log(self) -> None:
        """Log lines go above the bar: rich has put itself in place of sys.stderr, but handlers hold the old one."""
        for handler in logging.getLogger("opensora_dist").handlers:
            if isinstance(handler, logging.StreamHandler) and handler.stream is sys.__stderr__:
                self._loggers.append((handler, handler.setStream(sys.stderr)))


class TrainProgress:
    """The display of a training run: step, loss, gradient norm, samples/s, tokens/s, MFU, data wait, ETA.

    Args:
        total_steps: ``run.steps``.
        steps_done: Where the run starts or goes on.
        enabled: True on rank 0 only.
    """

    def __init__(self, *, total_steps: int, steps_done: int, enabled: bool, console: Console | None = None) -> None:
        self._total_steps = total_steps
        self._bar = Bar("step", total=total_steps, done=steps_done, enabled=enabled, console=console)

    def __enter__(self) -> TrainProgress:
        self._bar.__enter__()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._bar.__exit__(kind, error, trace)

    def update(self, window: Sequence[StepMetrics]) -> None:
        """Shows the steps since the last call; called at log steps."""
        if window:
            self._bar.update(window[-1].step, note=describe_steps(window, total_steps=self._total_steps), line=True)
