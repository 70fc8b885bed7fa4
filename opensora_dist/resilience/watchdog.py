"""A run that makes no progress is ended: stacks of every rank written, the rank that holds up the others named.

One thread per rank. It sleeps, looks at the clock once a second, and asks the store that the ranks met at whether another rank's clock
ran out: never a collective, since those are what hangs.

What it can't see: a rank whose main thread holds Python's lock for ever, whose watchdog can't run then (the others name it as one that
does not answer), and a store that is gone (``parallel.timeout_s`` ends such a run).
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import logging
import math
import os
import sys
import threading
import time
from collections import defaultdict, deque
from collections.abc import Callable, Mapping
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path
from typing import Any, Final, TextIO

import torch.distributed as dist
from torch.distributed.distributed_c10d import _get_default_store

from opensora_dist.core.io import write_json
from opensora_dist.core.layout import LOGS_DIR
from opensora_dist.core.logging import get_logger
from opensora_dist.resilience.endings import Ended, Ending, note_ending
from opensora_dist.resilience.position import Place, Position, Verdict, Waits, judge, place_of

HANG_NAME: Final = "hang.json"
_LONG_PHASES: Final = ("validation", "save")
_LONGER: Final = 10.0
_WINDOW: Final = 128
_POLL_S, _COLLECT_S, _ASLEEP_S, _LAST_S = 1.0, 5.0, 15.0, 30.0
_log = get_logger(__name__)


class Clock:
    """How long the loop has been in its phase, and how long it may be.

    The limit is ``watchdog_s``, or three times the 99th percentile of recent steps or of recent turns of the same phase where that is
    more. Validation, a save, and the first turn of any phase, in which kernels are compiled and buffers made, may take ten times
    ``watchdog_s``.
    """

    def __init__(self, *, watchdog_s: float, now: Callable[[], float] = time.monotonic) -> None:
        self._watchdog_s, self._now = watchdog_s, now
        self._took: defaultdict[str, deque[float]] = defaultdict(lambda: deque(maxlen=_WINDOW))
        self.step = 0
        self.phase, self.began = "data", now()

    def turn(self, phase: str) -> None:
        """The loop turns to another phase."""
        now = self._now()
        self._took[self.phase].append(now - self.began)
        self.phase, self.began = phase, now

    def restart(self) -> None:
        """Time that this process was stopped for is nobody's hang."""
        self.began = self._now()

    @property
    def age_s(self) -> float:
        """Seconds since the last turn."""
        return self._now() - self.began

    @property
    def limit_s(self) -> float:
        """Seconds that the phase may last."""
        phase = self.phase
        longer = phase in _LONG_PHASES or not self._took[phase]
        floor = self._watchdog_s * (_LONGER if longer else 1.0)
        return max(floor, 3 * p99(self._took["step"]), 3 * p99(self._took[phase]))


def p99(values: deque[float]) -> float:
    """The 99th percentile, by the nearest rank; 0 of none."""
    ordered = sorted(values)
    return ordered[math.ceil(0.99 * len(ordered)) - 1] if ordered else 0.0


class Watchdog:
    """Watches over this rank, and hears of the others.

    Args:
        watchdog_s: As ``resilience.watchdog_s``.
        run_dir: Where ``logs/stacks-rank-N.txt`` and ``logs/hang.json`` go.
        event: Notes an event of the run; called on one rank, from the watchdog's thread.
    """

    def __init__(
        self, *, watchdog_s: float, run_dir: Path, rank: int, world: int, event: Callable[[str, Mapping[str, Any]], None]
    ) -> None:
        self.clock = Clock(watchdog_s=watchdog_s)
        self._logs, self._rank, self._world, self._event = Path(run_dir) / LOGS_DIR, rank, world, event
        self._place, self._turn, self._there = Place(what="", waits=Waits.NO), self.clock.began, self.clock.began
        self._stop, self._pause, self._ending = threading.Event(), threading.Event(), False
        self._thread = threading.Thread(target=self._run, name="watchdog", daemon=True)
        # A connection of its own: the main thread may be waiting on the first one.
        self._store = dist.PrefixStore("watchdog", _get_default_store().clone())  # type: ignore[attr-defined]  # not in torch's stubs
        self._store.set_timeout(timedelta(seconds=_COLLECT_S))

    def start(self) -> None:
        """Starts to watch."""
        self.clock.restart()
        self._thread.start()

    def stop(self) -> None:
        """Ends the watch."""
        self._stop.set()
        if self._thread.is_alive():
            # Where the ranks are being asked, what the main thread came to meanwhile is a consequence: the answer comes first.
            self._thread.join(_LAST_S if self._ending else _COLLECT_S)

    def _run(self) -> None:
        last = time.monotonic()
        while not self._stop.wait(_POLL_S):
            now = time.monotonic()
            if now - last > _ASLEEP_S:
                self.clock.restart()
            last = now
            self._look(now)
            if self.clock.age_s > self.clock.limit_s or self._has("hang"):
                self._end()

    def _look(self, now: float) -> None:
        """Where the main thread is, and since when."""
        place, began = place_of(sys._current_frames()[threading.main_thread().ident or 0]), self.clock.began
        if (place, began) != (self._place, self._turn):
            self._place, self._turn, self._there = place, began, now

    def _end(self) -> None:
        """Writes what is known and ends this process, so that a launcher can start the run again."""
        self._ending = True
        # Whatever happens below: a disk that doesn't answer, or what ends this thread.
        last = threading.Timer(_LAST_S, os._exit, [1])
        last.daemon = True
        last.start()
        clock, where = self.clock, str(self._logs)
        with contextlib.ExitStack() as stack:
            try:
                self._logs.mkdir(parents=True, exist_ok=True)
                self._write_stacks(stack.enter_context(open(self._logs / f"stacks-rank-{self._rank}.txt", "w")))
            except OSError as error:
                where = f"stderr, since {self._logs} can't be written ({error})"
                self._write_stacks(sys.stderr)
            try:
                text = self._agree_on_culprit()
            except (RuntimeError, OSError) as error:  # the store is gone, or the disk is full: the run ends all the same
                text = f"the other ranks can't be asked: {error}"
            note_ending(Ended(ending=Ending.HANG, said=f"no progress for {clock.age_s:.0f} s: {text}"))
            _log.error("no progress for %.0f s: %s; stacks are in %s", clock.age_s, text, where)
            logging.shutdown()
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(1)

    def _write_stacks(self, file: TextIO) -> None:
        """Raises OSError. The file stays open: where Python's lock is lost below, C code that needs none writes them again and exits."""
        faulthandler.dump_traceback_later(_LAST_S, exit=True, file=file)
        clock = self.clock
        file.write(f"rank {self._rank}, step {clock.step}, phase {clock.phase}, {clock.age_s:.1f} s in it\n")
        file.flush()
        faulthandler.dump_traceback(file=file, all_threads=True)

    def _agree_on_culprit(self) -> str:
        seconds = time.monotonic() - self._there
        place, clock = self._place, self.clock
        mine = Position(
            rank=self._rank, step=clock.step, phase=clock.phase, what=place.what, waits=place.waits, seconds=round(seconds, 1)
        )
        self._store.set(f"position/{self._rank}", json.dumps(asdict(mine)))
        self._store.set("hang", str(self._rank))
        ranks = range(self._world)
        self._wait(lambda: all(self._has(f"position/{r}") for r in ranks))
        answered = [r for r in ranks if self._has(f"position/{r}")]
        if self._rank != answered[0]:
            self._wait(lambda: self._has("verdict"))
            return str(self._store.get("verdict").decode())
        said = {r: json.loads(self._store.get(f"position/{r}")) for r in answered}
        positions = {r: Position(**{**p, "waits": Waits(p["waits"])}) for r, p in said.items()}
        verdict = judge(positions, world=self._world)
        self._note(verdict, said)
        self._store.set("verdict", verdict.text)
        self._pause.wait(_POLL_S)  # others read it, from a store that may be this process's own
        return verdict.text

    def _note(self, verdict: Verdict, said: Mapping[int, Any]) -> None:
        record = {"ranks": list(verdict.ranks), "text": verdict.text, "positions": list(said.values())}
        write_json(self._logs / HANG_NAME, record)
        self._event("hang", record)

    def _wait(self, ready: Callable[[], bool]) -> None:
        deadline = time.monotonic() + _COLLECT_S
        while not ready() and time.monotonic() < deadline:
            self._pause.wait(0.1)

    def _has(self, key: str) -> bool:
        try:
            return bool(self._store.check([key]))
        except RuntimeError:  # the other ranks have ended, and the store with them
            return False
