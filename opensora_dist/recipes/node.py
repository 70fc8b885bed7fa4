"""What a job's script asks between its steps: whether to begin, what the end of an attempt means, and what is noted of both."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

from opensora_dist.checkpoint.commit import last_step
from opensora_dist.core.errors import OpensoraError
from opensora_dist.core.io import exclusive_lock, read_json, write_json
from opensora_dist.core.layout import CHECKPOINTS_DIR
from opensora_dist.core.logging import get_logger
from opensora_dist.launch.job import Job
from opensora_dist.launch.records import read_record, write_record
from opensora_dist.recipes.preflight import links, preflight
from opensora_dist.recipes.verdict import verdict
from opensora_dist.resilience.attempts import (
    ATTEMPTS_NAME,
    PREFLIGHT_CODES,
    Attempt,
    Next,
    Outcome,
    StoppedBy,
    append_line,
    attempts_of,
    begin_line,
    bounded,
    decide,
    end_line,
    ended_with,
    read_lines,
    refused,
    restarts_of,
)
from opensora_dist.resilience.endings import ENDINGS_VARIABLE, Ended, Ending, read_endings
from opensora_dist.resilience.restarts import num_starts
from opensora_dist.resilience.signals import SAVED_AND_STOPPED, clear_marker

GO_ON: Final = 0
NOTHING_TO_DO: Final = 20
REFUSED: Final = 21
_LOCK_S: Final = 60.0
_log = get_logger(__name__)


def endings_folder(submission: Path, attempt: str) -> Path:
    """What a script exports as OPENSORA_ENDINGS for an attempt."""
    return submission / "endings" / attempt


def begin(submission: Path, *, attempt: str, task: str | None = None) -> int:
    """Notes that an attempt begins; says on stdout, and returns as exit code, whether it is to go on.

    Slurm starts a job again by itself when a node fails or another job takes its place, and asks nobody. So what ``end`` would have said
    of the attempt before, where its node ended first, is said here.

    Args:
        attempt: The scheduler's job, and how often it was started again: ``1234.0``.
        task: Of several that a submission has, each with attempts of its own: of an array.
    Returns:
        0 go on; 20 nothing is left to do; 21 another attempt is of no use, or one too many.
    """
    record = read_record(submission)
    job = record.job
    attempts = _attempts(job, task=task)
    if attempts and attempts[-1].outcome is None:
        attempts[-1] = _close(job, attempts, code=None, task=task)
    if attempts:
        last = attempts[-1].outcome
        assert last is not None
        print(f"attempt {attempts[-1].name} of {submission.name} ended: {last.next}, {last.why}")
        if last.next is Next.DONE:
            return NOTHING_TO_DO
        # Of a chain, the next job starts by itself where a user cancels this one and its script has no time to take the rest back.
        chained = record.backend == "slurm" and job.site.slurm.requeue == "chain"
        if last.next is Next.FAILED or (last.next is Next.STOPPED and chained):
            return REFUSED
    started = max(len(attempts), restarts_of(attempt))
    if (why := refused(attempts, started=started, max_requeues=job.max_requeues, run_dir=_trained_in(job))) is not None:
        print(f"not started again: {why}")
        return REFUSED
    began = Attempt(name=attempt, began=last_step(job.run_dir / CHECKPOINTS_DIR), starts_before=num_starts(job.run_dir))
    if job.kind == "train":
        with contextlib.suppress(OSError):
            clear_marker(job.run_dir)  # of an earlier stop: one that is there at the end is of this attempt
    _note(job, begin_line(began, submission=submission.name, task=task))
    print(f"attempt {attempt} of {submission.name} begins at step {began.began}")
    return GO_ON


def end(submission: Path, *, attempt: str, code: int, stopped_by: StoppedBy | None = None, task: str | None = None) -> int:
    """Notes how an attempt ended; says on stdout, and returns as exit code, what follows (``Next.code``).

    Args:
        code: Exit code of what started the ranks, or of the preflight where that was the last step.
        stopped_by: Who asked this attempt to stop, where its script knows.
    """
    job = read_record(submission).job
    attempts = _attempts(job, task=task)
    if not attempts or attempts[-1].name != attempt:  # its begin could not be written: the disk was full
        attempts.append(
            Attempt(name=attempt, began=last_step(job.run_dir / CHECKPOINTS_DIR), starts_before=num_starts(job.run_dir))
        )
    if attempts[-1].outcome is None:
        attempts[-1] = _close(job, attempts, code=code, stopped_by=stopped_by, task=task)
    outcome = attempts[-1].outcome
    assert outcome is not None
    print(f"attempt {attempt} of {submission.name} ended: {outcome.next}, {outcome.why}")
    return outcome.next.code


def resubmitted(submission: Path, *, attempt: str, job_id: str) -> None:
    """Notes that another job goes on with a submission, since nodes of this attempt's were unfit; this attempt is over."""
    job = read_record(submission).job
    mine = [a for a in _attempts(job, task=None) if a.name == attempt]
    step = mine[-1].began if mine else last_step(job.run_dir / CHECKPOINTS_DIR)
    outcome = Outcome(next=Next.AGAIN, why=f"nodes were unfit; job {job_id} goes on without them", excused=True)
    ended = Attempt(name=attempt, began=step, ended=step, outcome=outcome)
    _note(job, end_line(ended, submission=submission.name, task=None))
    with _record_lock(submission):
        record = read_record(submission)
        ids = record.job_ids or ()
        if job_id not in ids:
            write_record(replace(record, job_ids=(*ids, job_id)))


def look_at_node(submission: Path, *, attempt: str, node: str) -> int:
    """This node's part of the preflight; says what is wrong, and leaves it to ``judge_nodes`` what that means."""
    job = read_record(submission).job
    report = preflight(
        job.site, node=node, run_dir=job.run_dir, gpus=job.gpus_per_node, folder=_preflight_folder(submission, attempt)
    )
    for problem in (*report.problems, *report.shared):
        _log.error("%s: %s", node, problem)
    return 0


def try_links(submission: Path, *, attempt: str, node: str, device: str) -> int:
    """One rank's part of the checks between nodes. Collective."""
    os.environ.pop(ENDINGS_VARIABLE, None)  # how these ranks end is no ending of the run's
    folder = _preflight_folder(submission, attempt)
    return links(read_record(submission).job.site, node=node, folder=folder, device=device)


def judge_nodes(submission: Path, *, attempt: str, nodes: Sequence[str]) -> int:
    """Prints the nodes that are unfit, comma separated, on stdout, and the reasons on stderr; returns ``Verdict.code``."""
    git = read_record(submission).git
    commit = None if git is None else git["commit"] + "+" * git["changed"]
    found = verdict(_preflight_folder(submission, attempt), nodes, commit=commit)
    for node, reasons in found.unfit.items():
        for reason in reasons:
            _log.error("%s: %s", node, reason)
    for reason in found.shared:
        _log.error("%s", reason)
    write_json(_judgement(submission, attempt), {"code": found.code, "unfit": sorted(found.unfit)})
    if found.unfit:
        print(",".join(found.unfit))
    return found.code


def _preflight_folder(submission: Path, attempt: str) -> Path:
    return submission / "preflight" / attempt


def _judgement(submission: Path, attempt: str) -> Path:
    """Beside the folder, in which nodes write under their own names."""
    return submission / "preflight" / f"{attempt}.json"


def _close(
    job: Job, attempts: Sequence[Attempt], *, code: int | None, task: str | None, stopped_by: StoppedBy | None = None
) -> Attempt:
    """The last of ``attempts``, ended and noted."""
    last = attempts[-1]
    ended = replace(last, ended=last_step(job.run_dir / CHECKPOINTS_DIR), starts=num_starts(job.run_dir) - last.starts_before)
    unfit = _unfit(job, last.name) if code is None else []
    if unfit:  # the job that goes on without them began before this could be noted, or there is none
        outcome = Outcome(next=Next.AGAIN, why=f"nodes were unfit: {', '.join(unfit)}", excused=True)
    else:
        # What a process that was asked to stop returns says no more than that.
        own = code if stopped_by is None or code == 0 else None
        outcome = decide(_ends(job, last.name, code=own), code=code, stopped_by=stopped_by)
    ended = replace(ended, outcome=outcome)
    whole, started = [*attempts[:-1], ended], max(len(attempts), restarts_of(last.name) + 1)
    outcome = bounded(outcome, whole, started=started, max_requeues=job.max_requeues, run_dir=_trained_in(job))
    ended = replace(ended, outcome=outcome)
    _note(job, end_line(ended, submission=job.folder.name, task=task))
    return ended


def _unfit(job: Job, attempt: str) -> list[str]:
    """Nodes that the preflight of an attempt names, where others could be asked for; then no rank was started."""
    try:
        judged = read_json(_judgement(job.folder, attempt))
    except (OSError, ValueError):
        return []
    return list(judged["unfit"]) if judged["code"] == PREFLIGHT_CODES[0] else []


def _ends(job: Job, attempt: str, *, code: int | None) -> Mapping[int, Ended]:
    """What the ranks said; of a single process that is no rank, what its exit code says."""
    if job.kind == "prepare":
        return {0: ended_with(code)}
    ends = dict(read_endings(endings_folder(job.folder, attempt), world=job.world))
    if job.kind == "bench":
        return {0: ended_with(code)} if all(e.ending is Ending.KILLED for e in ends.values()) else ends
    if ends[0].ending is Ending.KILLED and (marker := _marker(job)) is not None:
        ends[0] = marker
    return ends


def _marker(job: Job) -> Ended | None:
    """What rank 0 leaves in the run directory when it has saved and stopped, though it had nowhere to note its ending."""
    try:
        marker = read_json(job.run_dir / SAVED_AND_STOPPED)
        return Ended(ending=Ending.STOPPED, said=f"saved step {marker['step']}", signal=marker["signal"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _trained_in(job: Job) -> Path | None:
    """Where progress is looked at; arrays and benchmarks are simply run again."""
    return job.run_dir if job.kind == "train" else None


def _attempts(job: Job, *, task: str | None) -> list[Attempt]:
    return attempts_of(read_lines(job.folder.parent / ATTEMPTS_NAME), submission=job.folder.name, task=task)


def _note(job: Job, line: Mapping[str, Any]) -> None:
    append_line(job.folder.parent / ATTEMPTS_NAME, {**line, "time": datetime.now(UTC).isoformat(timespec="seconds")})


@contextlib.contextmanager
def _record_lock(submission: Path) -> Iterator[None]:
    """The one that ``submit`` holds while it writes the scheduler's answer: it may not have yet."""
    busy = OpensoraError(
        f"{submission.parent / '.lock'} is held for more than {_LOCK_S:.0f} s; see what `opensora-dist submit` waits for"
    )
    deadline = time.monotonic() + _LOCK_S
    with contextlib.ExitStack() as stack:
        while True:
            try:
                stack.enter_context(exclusive_lock(submission.parent / ".lock", busy=busy))
                break
            except OpensoraError:
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.2)
        yield
