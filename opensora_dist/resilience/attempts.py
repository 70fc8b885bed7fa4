"""Whether a scheduler starts a run again: decided from how its ranks ended, and bounded by what the starts before achieved.

An attempt is one start by the scheduler; torchrun may start the ranks several times within one. ``attempts.jsonl`` has one line where it
begins and one where it ends. An attempt without an end line ended with the node that would have written it.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import signal
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from enum import StrEnum
from pathlib import Path
from typing import Any, Final

from opensora_dist.core.logging import get_logger
from opensora_dist.resilience.endings import Ended, Ending
from opensora_dist.resilience.restarts import of_no_use

ATTEMPTS_NAME: Final = "attempts.jsonl"
PREFLIGHT_CODES: Final = (30, 31)
"""Exit codes of ``node verdict``: some nodes are unfit, or none can be blamed. No rank was started."""

_MOST_NAMED: Final = 8
_log = get_logger(__name__)


class Next(StrEnum):
    """What follows an attempt."""

    DONE = "done"
    AGAIN = "again"
    FAILED = "failed"
    STOPPED = "stopped"  # by a user, who starts it again or doesn't

    @property
    def code(self) -> int:
        """Exit code of ``node end``."""
        return {Next.DONE: 0, Next.AGAIN: 10, Next.FAILED: 11, Next.STOPPED: 12}[self]


class StoppedBy(StrEnum):
    """Who asked an attempt to stop, as its script knows it."""

    USER = "user"
    SCHEDULER = "scheduler"


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """
    Args:
        next: What follows.
        why: In words.
        excused: It says nothing of the run's progress: it was asked to stop, or nodes were unfit.
    """

    next: Next
    why: str
    excused: bool = False


@dataclass(frozen=True, kw_only=True)
class Attempt:
    """
    Args:
        name: The scheduler's job and how often it was started again: ``1234.0``.
        began: Step of the newest checkpoint when it began; 0 where there was none.
        ended: The same when it ended; None while it has no end line.
        starts_before: How often ranks of this run had begun to train before it.
        starts: How often they did in it.
        outcome: What was decided; None while it has no end line.
    """

    name: str
    began: int
    ended: int | None = None
    starts_before: int = 0
    starts: int = 0
    outcome: Outcome | None = None

    @property
    def progressed(self) -> bool:
        """It committed a checkpoint. Not just a newer one: a run may have gone back behind one that was damaged."""
        return self.ended != self.began

    @property
    def counts(self) -> bool:
        """It had its chance to commit one."""
        return self.outcome is None or not self.outcome.excused


def decide(ends: Mapping[int, Ended], *, code: int | None, stopped_by: StoppedBy | None = None) -> Outcome:
    """What the ranks of an attempt say, before any bound.

    Args:
        ends: Of all ranks.
        code: Exit code of what started them; None where it isn't known.
        stopped_by: Who asked them to stop; None where nobody did, or only the ranks know.
    """
    if own := [r for r in sorted(ends) if ends[r].ending in (Ending.CONFIG, Ending.ERROR)]:
        return Outcome(next=Next.FAILED, why=f"{_who(ends, own)}, which would come again")
    if all(e.ending is Ending.DONE for e in ends.values()):
        return Outcome(next=Next.DONE, why="all ranks are done")
    if stopped_by is not None:
        return _asked_to_stop(stopped_by)
    silent = all(e.ending is Ending.KILLED for e in ends.values())
    if silent and code in PREFLIGHT_CODES:
        return Outcome(next=Next.FAILED, why="nodes are unfit, and no others can be asked for; the preflight says why")
    if silent and code == 2:
        return Outcome(next=Next.FAILED, why="what starts the ranks was refused; the job's log says why")
    if stopped := [r for r in sorted(ends) if ends[r].ending is Ending.STOPPED]:
        signals = {ends[r].signal for r in stopped} - {None}
        if signals and signal.SIGUSR1.name not in signals:
            return _asked_to_stop(StoppedBy.USER, how=f", by {' and '.join(sorted(filter(None, signals)))}")
        return _asked_to_stop(StoppedBy.SCHEDULER)
    if code == 0:  # of every process: a rank that said nothing had nowhere to write
        return Outcome(next=Next.DONE, why="all ranks are done")
    for ending in (Ending.DEVICE, Ending.HANG, Ending.KILLED, Ending.LOST):  # a cause before what follows from it
        if ranks := [r for r in sorted(ends) if ends[r].ending is ending]:
            return Outcome(next=Next.AGAIN, why=_who(ends, ranks))
    raise AssertionError(ends)


def _asked_to_stop(by: StoppedBy, *, how: str = "") -> Outcome:
    if by is StoppedBy.USER:
        return Outcome(next=Next.STOPPED, why=f"a user asked it to stop{how}", excused=True)
    return Outcome(next=Next.AGAIN, why="the scheduler asked it to stop, before its time limit or for another job", excused=True)


def bounded(outcome: Outcome, attempts: Sequence[Attempt], *, started: int, max_requeues: int, run_dir: Path | None) -> Outcome:
    """The outcome, once the number and the progress of attempts are looked at; arguments as of ``refused``."""
    why = refused(attempts, started=started, max_requeues=max_requeues, run_dir=run_dir)
    if outcome.next is not Next.AGAIN or why is None:
        return outcome
    return replace(outcome, next=Next.FAILED, why=f"{outcome.why}; not started again: {why}")


def refused(attempts: Sequence[Attempt], *, started: int, max_requeues: int, run_dir: Path | None) -> str | None:
    """Why there is no other attempt after these, or None.

    Args:
        attempts: All of a submission, each ended.
        started: How many there were, which may be more than could be noted.
        run_dir: Of a training, which has to get further; None: no progress is asked for.
    """
    if started > max_requeues:
        return f"it was started {started} times, and --max-requeues={max_requeues}; submit it again to go on"
    trained = [a for a in attempts if a.counts]
    if run_dir is None or len(trained) < 2 or any(a.progressed for a in trained[-2:]) or trained[-2].ended != trained[-1].began:
        return None
    began = any(a.starts for a in trained[-2:])
    return of_no_use(run_dir, step=trained[-1].began if began else None)


def ended_with(code: int | None) -> Ended:
    """What the exit code of a single process says, which is no rank and notes no ending; None: it isn't known."""
    if code is None:
        return Ended(ending=Ending.KILLED)
    number = -code if code < 0 else code - 128  # as Python says it, and as a shell
    if number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
        name = signal.Signals(number).name
        return Ended(ending=Ending.STOPPED, said=f"ended by {name}", signal=name)
    ending = {0: Ending.DONE, 2: Ending.CONFIG}.get(code, Ending.KILLED if number > 0 else Ending.ERROR)
    return Ended(ending=ending, said=f"exit code {code}")


def append_line(path: Path, line: Mapping[str, Any]) -> None:
    """Adds one line, whole, though jobs of a chain or an array write at once. On a disk that is full it is said, and that is all."""
    data = json.dumps(line).encode() + b"\n"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        try:
            with contextlib.suppress(OSError):  # where there are no locks, one write of a short line is whole all the same
                fcntl.flock(handle, fcntl.LOCK_EX)
            size = os.fstat(handle).st_size
            cut = size > 0 and os.pread(handle, 1, size - 1) != b"\n"  # by a crash: it ends there
            os.write(handle, b"\n" + data if cut else data)
            os.fsync(handle)
        finally:
            os.close(handle)
    except OSError as error:
        _log.error("%s can't be written (%s); this is left out there: %s", path, error, json.dumps(line))


def read_lines(path: Path) -> list[dict[str, Any]]:
    """All but what a crash cut off."""
    lines = []
    for text in path.read_text(encoding="utf-8", errors="replace").splitlines() if path.exists() else []:
        with contextlib.suppress(ValueError):
            if isinstance(line := json.loads(text), dict):
                lines.append(line)
    return lines


def begin_line(attempt: Attempt, *, submission: str, task: str | None) -> dict[str, Any]:
    """Of an attempt that begins."""
    return {
        **{"event": "begin", "submission": submission, "task": task, "attempt": attempt.name, "step": attempt.began},
        **{"starts_before": attempt.starts_before},
    }


def end_line(attempt: Attempt, *, submission: str, task: str | None) -> dict[str, Any]:
    """Of an attempt that has ended."""
    assert attempt.outcome is not None
    return {
        **{"event": "end", "submission": submission, "task": task, "attempt": attempt.name, "step": attempt.ended},
        **{"starts": attempt.starts, **asdict(attempt.outcome)},
    }


def attempts_of(lines: Sequence[Mapping[str, Any]], *, submission: str, task: str | None) -> list[Attempt]:
    """Of one submission, and one task of an array, oldest first."""
    attempts: list[Attempt] = []
    for line in (x for x in lines if x.get("submission") == submission and x.get("task") == task):
        if line["event"] == "begin":
            attempts.append(Attempt(name=line["attempt"], began=line["step"], starts_before=line["starts_before"]))
            continue
        index = max((i for i, a in enumerate(attempts) if a.name == line["attempt"]), default=len(attempts))
        if index == len(attempts):  # its begin could not be written
            attempts.append(Attempt(name=line["attempt"], began=line["step"]))
        outcome = Outcome(next=Next(line["next"]), why=line["why"], excused=line["excused"])
        attempts[index] = replace(attempts[index], ended=line["step"], starts=line["starts"], outcome=outcome)
    return attempts


def restarts_of(name: str) -> int:
    """How often the scheduler had started a job again, by the name of its attempt: 3 of ``1234.3``."""
    number = name.rpartition(".")[2]
    return int(number) if number.isdecimal() else 0


def _who(ends: Mapping[int, Ended], ranks: Sequence[int]) -> str:
    """The ranks, and what the first of them said."""
    ended = ends[ranks[0]]
    listed = ", ".join(map(str, ranks[:_MOST_NAMED])) + (
        f" and {len(ranks) - _MOST_NAMED} more" if len(ranks) > _MOST_NAMED else ""
    )
    where = f" on {ended.host}" if ended.host else ""
    said = f" ({' '.join(ended.said.split())})" if ended.said else ""
    return f"rank{'s' if len(ranks) > 1 else ''} {listed}{where}: {ended.ending}{said}"
