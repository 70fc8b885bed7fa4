"""What follows the end of an attempt: a table of endings, and the bounds of number and progress."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from opensora_dist.cli.main import main
from opensora_dist.config.site import SiteConfig
from opensora_dist.core.io import write_json, write_text
from opensora_dist.launch.job import Job
from opensora_dist.launch.records import Record, read_record, write_record
from opensora_dist.recipes.node import GO_ON, NOTHING_TO_DO, REFUSED, begin, end, endings_folder, resubmitted
from opensora_dist.resilience.attempts import (
    Attempt,
    Next,
    Outcome,
    StoppedBy,
    append_line,
    attempts_of,
    bounded,
    decide,
    ended_with,
    read_lines,
    refused,
)
from opensora_dist.resilience.endings import Ended, Ending
from opensora_dist.resilience.restarts import note_start
from opensora_dist.resilience.signals import write_marker

D, C, E, L, H, G, K = Ending.DONE, Ending.CONFIG, Ending.ERROR, Ending.LOST, Ending.HANG, Ending.DEVICE, Ending.KILLED
AGAIN, FAILED, DONE, STOPPED = Next.AGAIN, Next.FAILED, Next.DONE, Next.STOPPED


def _stop(signal):
    return Ended(ending=Ending.STOPPED, said="saved step 5", signal=signal)


USR1, TERM, INT, OTHERS = _stop("SIGUSR1"), _stop("SIGTERM"), _stop("SIGINT"), _stop(None)


@pytest.mark.parametrize(
    "ends, code, follows, names",
    [
        # Its own error, whatever the others say of the consequences.
        ([E, L, L, L], 1, FAILED, "rank 0: error"),
        ([L, L, E, K], 1, FAILED, "rank 2: error"),
        ([L, E, D, D], 1, FAILED, "rank 1: error"),
        ([C, C, C, C], 1, FAILED, "ranks 0, 1, 2, 3: config"),
        ([K, K, C, K], 1, FAILED, "rank 2: config"),
        ([E, G, L, L], 1, FAILED, "rank 0: error"),
        ([E, H, H, H], 1, FAILED, "rank 0: error"),
        ([E, TERM, TERM, TERM], 1, FAILED, "rank 0: error"),
        ([E, USR1, USR1, USR1], 1, FAILED, "rank 0: error"),
        ([E, D, D, D], None, FAILED, "rank 0: error"),
        # What a node or a link did.
        ([L, L, L, L], 1, AGAIN, "ranks 0, 1, 2, 3: lost contact"),
        ([L, K, L, L], 1, AGAIN, "rank 1: killed"),
        ([K, K, K, K], 1, AGAIN, "ranks 0, 1, 2, 3: killed"),
        ([K, K, K, K], 137, AGAIN, "ranks 0, 1, 2, 3: killed"),
        ([K, K, K, K], None, AGAIN, "ranks 0, 1, 2, 3: killed"),
        ([H, H, K, H], 1, AGAIN, "ranks 0, 1, 3: hang"),
        ([L, L, G, K], 1, AGAIN, "rank 2: device"),
        # Trained to the end, and not all of them could say so.
        ([D, D, D, D], 0, DONE, "all ranks"),
        ([D, D, D, D], None, DONE, "all ranks"),
        ([D, D, D, D], 134, DONE, "all ranks"),
        ([K, K, K, K], 0, DONE, "all ranks"),
        ([D, K, D, D], 0, DONE, "all ranks"),
        ([D, K, D, D], 1, AGAIN, "rank 1: killed"),
        ([K, D, D, D], None, AGAIN, "rank 0: killed"),
        ([D, L, D, D], 1, AGAIN, "rank 1: lost contact"),
        # Asked to stop: by the scheduler, by a user, and only some had the time to say so.
        ([USR1, USR1, USR1, USR1], 0, AGAIN, "the scheduler"),
        ([OTHERS, USR1, OTHERS, OTHERS], 0, AGAIN, "the scheduler"),
        ([OTHERS, OTHERS, K, OTHERS], None, AGAIN, "the scheduler"),
        ([USR1, TERM, TERM, TERM], 0, AGAIN, "the scheduler"),
        ([USR1, L, L, K], 1, AGAIN, "the scheduler"),
        ([USR1, K, K, K], 0, AGAIN, "the scheduler"),
        ([TERM, TERM, TERM, TERM], 0, STOPPED, "a user asked it to stop, by SIGTERM"),
        ([OTHERS, OTHERS, INT, OTHERS], 0, STOPPED, "a user asked it to stop, by SIGINT"),
        ([TERM, K, K, K], None, STOPPED, "SIGTERM"),
        ([TERM, L, L, L], 1, STOPPED, "SIGTERM"),
        # No rank was started.
        ([K, K, K, K], 30, FAILED, "preflight"),
        ([K, K, K, K], 31, FAILED, "preflight"),
        ([K, K, K, K], 2, FAILED, "what starts the ranks was refused"),
    ],
)
def test_what_follows_from_how_ranks_ended(ends, code, follows, names):
    of = {rank: e if isinstance(e, Ended) else Ended(ending=e) for rank, e in enumerate(ends)}
    outcome = decide(of, code=code)
    assert outcome.next is follows and names in outcome.why, outcome


@pytest.mark.parametrize(
    "ends, code, by_user, by_scheduler",
    [
        ([K, K], 1, STOPPED, AGAIN),  # before they began
        ([K, K], 143, STOPPED, AGAIN),
        ([K, K], 0, STOPPED, AGAIN),
        ([K, K], 2, STOPPED, AGAIN),
        ([K, K], 30, STOPPED, AGAIN),
        ([L, K], 1, STOPPED, AGAIN),
        ([TERM, TERM], 0, STOPPED, AGAIN),
        ([USR1, USR1], 0, STOPPED, AGAIN),
        # What it did of itself stays what it is.
        ([D, D], 0, DONE, DONE),
        ([E, L], 1, FAILED, FAILED),
    ],
)
def test_a_script_that_knows_who_stopped_it_is_believed(ends, code, by_user, by_scheduler):
    of = {rank: e if isinstance(e, Ended) else Ended(ending=e) for rank, e in enumerate(ends)}
    assert decide(of, code=code, stopped_by=StoppedBy.USER).next is by_user
    assert decide(of, code=code, stopped_by=StoppedBy.SCHEDULER).next is by_scheduler


def test_many_ranks_are_named_in_a_line_with_what_the_first_said_and_where():
    ends = {r: Ended(ending=L, said="peer\ngone", host="node1") for r in range(100)}
    assert decide(ends, code=1).why == "ranks 0, 1, 2, 3, 4, 5, 6, 7 and 92 more on node1: lost contact (peer gone)"


@pytest.mark.parametrize(
    "code, follows",
    [(0, DONE), (1, FAILED), (2, FAILED), (143, STOPPED), (-15, STOPPED), (138, AGAIN), (137, AGAIN), (-9, AGAIN), (None, AGAIN)],
)
def test_what_follows_from_the_exit_code_of_a_single_process(code, follows):
    assert decide({0: ended_with(code)}, code=code).next is follows


def _attempt(began, ended, *, starts=1, excused=False):
    outcome = Outcome(next=AGAIN, why="", excused=excused)
    return Attempt(name="1.0", began=began, ended=ended, starts=starts, outcome=outcome)


@pytest.mark.parametrize(
    "attempts, most, why",
    [
        ([], 0, None),
        ([_attempt(0, 0)], 3, None),
        ([_attempt(0, 5)], 0, "it was started 1 times, and --max-requeues=0"),
        ([_attempt(0, 5), _attempt(5, 9), _attempt(9, 12)], 3, None),
        ([_attempt(0, 5), _attempt(5, 9), _attempt(9, 12)], 2, "it was started 3 times"),
        ([_attempt(0, 0), _attempt(0, 0)], 3, "two starts in a row failed after going on from step 0"),
        ([_attempt(0, 0, starts=0), _attempt(0, 0, starts=0)], 3, "two starts in a row failed before training began"),
        ([_attempt(0, 50), _attempt(50, 50), _attempt(50, 50)], 9, "after going on from step 50"),
        ([_attempt(50, 50), _attempt(50, 50), _attempt(50, 60)], 9, None),
        ([_attempt(0, 50), _attempt(50, 50)], 9, None),
        # A stop, or a node that was unfit, says nothing of the run, but it is a start.
        ([_attempt(0, 0, excused=True), _attempt(0, 0, excused=True)], 3, None),
        ([_attempt(0, 0), _attempt(0, 0, excused=True), _attempt(0, 0)], 9, "two starts in a row failed"),
        ([_attempt(0, 0, excused=True)] * 4, 3, "it was started 4 times"),
        # It went back behind a checkpoint that was damaged, and has come on since.
        ([_attempt(100, 75), _attempt(75, 100)], 9, None),
    ],
)
def test_attempts_are_bounded_by_their_number_and_by_checkpoints(attempts, most, why, tmp_path):
    said = refused(attempts, started=len(attempts), max_requeues=most, run_dir=tmp_path)
    assert (said is None) == (why is None) and (why or "") in (said or "")
    again = bounded(
        Outcome(next=AGAIN, why="rank 1: killed"), attempts, started=len(attempts), max_requeues=most, run_dir=tmp_path
    )
    assert again.next is (AGAIN if why is None else FAILED)
    for outcome in (Outcome(next=n, why="") for n in (DONE, FAILED, STOPPED)):
        assert bounded(outcome, attempts, started=99, max_requeues=most, run_dir=tmp_path) == outcome


def test_an_array_and_a_benchmark_are_bounded_by_their_number_alone():
    attempts = [_attempt(0, 0)] * 3
    assert refused(attempts, started=3, max_requeues=3, run_dir=None) is None
    assert "started 4 times" in (refused(attempts, started=4, max_requeues=3, run_dir=None) or "")


# --- the verbs, on files


@pytest.fixture
def submission(tmp_path):
    return _submission(tmp_path)


def _submission(run_dir, *, kind="train", max_requeues=3, site=None):
    folder = run_dir / "launch" / "0001"
    job = Job(
        id="run-0123abcd",
        name="run",
        kind=kind,
        argv=("train", str(folder / "config.yaml")),
        nodes=2,
        gpus_per_node=0,
        ranks_per_node=1,
        time_limit_s=None,
        max_requeues=max_requeues,
        run_dir=run_dir,
        folder=folder,
        config=folder / "config.yaml",
        site=SiteConfig.model_validate(site or {}),
    )
    write_record(Record(backend="slurm", job=job, job_ids=("7",), git=None, time="2026-01-01T00:00:00"))
    return folder


def _say(submission, attempt, *endings):
    for rank, ended in enumerate(endings):
        if ended is not K:
            record = {"ending": ended, "said": "", "signal": None}
            write_json(endings_folder(submission, attempt) / f"rank-{rank}.json", record)


def _commit(submission, step):
    write_text(submission.parent.parent / "checkpoints" / "latest", f"step-{step:08d}\n")


def _lines(submission):
    return read_lines(submission.parent / "attempts.jsonl")


def test_a_run_that_loses_nodes_is_started_again_until_it_is_done(submission, capsys):
    run_dir = submission.parent.parent
    for restart, (ends, step, follows) in enumerate([((K, L), 5, 10), ((H, H), 10, 10), ((D, D), 12, 0)]):
        assert begin(submission, attempt=f"7.{restart}") == GO_ON
        note_start(run_dir, step=step - 5)
        _say(submission, f"7.{restart}", *ends)
        _commit(submission, step)
        assert end(submission, attempt=f"7.{restart}", code=1 if follows else 0) == follows
    assert begin(submission, attempt="7.3") == NOTHING_TO_DO
    ends = [x for x in _lines(submission) if x["event"] == "end"]
    assert [(x["step"], x["starts"], x["next"]) for x in ends] == [(5, 1, "again"), (10, 1, "again"), (12, 1, "done")]
    assert "attempt 7.2 of 0001 ended: done, all ranks are done" in capsys.readouterr().out


def test_an_error_of_a_ranks_own_is_never_started_again(submission):
    assert begin(submission, attempt="7.0") == GO_ON
    _commit(submission, 5)
    _say(submission, "7.0", L, E)
    assert end(submission, attempt="7.0", code=1) == 11
    assert end(submission, attempt="7.0", code=1) == 11, "asked twice, it is noted once"
    assert begin(submission, attempt="7.1") == REFUSED
    assert [x["event"] for x in _lines(submission)] == ["begin", "end"]


def test_an_attempt_that_ended_with_the_head_node_is_judged_at_the_next_begin(submission):
    """No end line: Slurm starts the job again by itself."""
    assert begin(submission, attempt="7.0") == GO_ON
    _commit(submission, 5)
    assert begin(submission, attempt="7.1") == GO_ON
    assert [(x["event"], x["attempt"], x["step"]) for x in _lines(submission)] == [
        ("begin", "7.0", 0),
        ("end", "7.0", 5),
        ("begin", "7.1", 5),
    ]


def test_an_error_that_was_noted_before_the_head_node_went_is_not_started_again(submission):
    begin(submission, attempt="7.0")
    _say(submission, "7.0", K, E)
    assert begin(submission, attempt="7.1") == REFUSED


def test_nodes_that_go_twice_before_a_checkpoint_end_the_run(submission, capsys):
    for restart in range(2):
        assert begin(submission, attempt=f"7.{restart}") == GO_ON
    assert begin(submission, attempt="7.2") == REFUSED
    assert "two starts in a row failed before training began" in capsys.readouterr().out


def test_a_stop_by_a_user_is_no_failure_and_may_be_taken_up_again(submission):
    begin(submission, attempt="7.0")
    for rank in range(2):
        record = {"ending": "stopped", "said": "saved step 5", "signal": "SIGTERM" if rank else None}
        write_json(endings_folder(submission, "7.0") / f"rank-{rank}.json", record)
    _commit(submission, 5)
    assert end(submission, attempt="7.0", code=0) == 12
    assert begin(submission, attempt="7.1") == GO_ON


def test_a_run_that_is_preempted_before_its_first_save_goes_on_as_often_as_it_may(submission, tmp_path):
    """And what fails of itself is still ended by the second time, whatever came between."""
    for restart, (signal, how) in enumerate([("SIGUSR1", None), ("SIGTERM", StoppedBy.SCHEDULER), (None, StoppedBy.SCHEDULER)]):
        assert begin(submission, attempt=f"7.{restart}") == GO_ON
        if signal:
            record = {"ending": "stopped", "said": "", "signal": signal}
            write_json(endings_folder(submission, f"7.{restart}") / "rank-0.json", record)
        assert end(submission, attempt=f"7.{restart}", code=1, stopped_by=how) == 10
    assert begin(submission, attempt="7.3") == GO_ON
    assert end(submission, attempt="7.3", code=1, stopped_by=StoppedBy.SCHEDULER) == 11
    assert "started 4 times, and --max-requeues=3" in _lines(submission)[-1]["why"]
    other = _submission(tmp_path / "other", max_requeues=9)
    for restart, (how, follows) in enumerate([(None, 10), (StoppedBy.SCHEDULER, 10), (None, 11)]):
        assert begin(other, attempt=f"7.{restart}") == GO_ON
        assert end(other, attempt=f"7.{restart}", code=1, stopped_by=how) == follows


def test_a_cancel_before_ranks_begin_is_written_down_as_one(submission, tmp_path, capsys):
    begin(submission, attempt="7.0")
    assert end(submission, attempt="7.0", code=1) == 10
    begin(submission, attempt="7.1")
    assert main(["node", "end", str(submission), "--attempt", "7.1", "--stopped-by", "user", "--code", "1"]) == 12
    line = _lines(submission)[-1]
    assert (line["next"], line["why"]) == ("stopped", "a user asked it to stop")
    array = _submission(tmp_path / "array", kind="prepare")
    begin(array, attempt="8.0", task="1")
    assert end(array, attempt="8.0", code=1, task="1", stopped_by=StoppedBy.USER) == 12
    capsys.readouterr()


@pytest.mark.parametrize("signal, goes_on", [("SIGTERM", False), ("SIGUSR1", True)])
def test_the_next_job_of_a_chain_does_not_begin_where_a_user_cancelled_the_one_before(tmp_path, signal, goes_on):
    """Slurm killed its script before that could take the rest of the chain back."""
    submission = _submission(tmp_path, site={"slurm": {"requeue": "chain"}})
    begin(submission, attempt="7.0")
    write_json(endings_folder(submission, "7.0") / "rank-0.json", {"ending": "stopped", "said": "", "signal": signal})
    assert begin(submission, attempt="8.0") == (GO_ON if goes_on else REFUSED)


def test_the_marker_speaks_for_rank_0_where_that_could_not_note_its_ending(submission):
    run_dir = submission.parent.parent
    begin(submission, attempt="7.0")
    _commit(submission, 5)
    write_marker(run_dir, step=5, signal_name="SIGUSR1")
    assert end(submission, attempt="7.0", code=0) == 10
    begin(submission, attempt="7.1")
    assert not (run_dir / "STOPPED").exists(), "it is of the attempt before"
    assert end(submission, attempt="7.1", code=0) == 0


def test_unfit_nodes_end_an_attempt_and_the_job_that_goes_on_is_found(submission):
    begin(submission, attempt="7.0")
    resubmitted(submission, attempt="7.0", job_id="8")
    resubmitted(submission, attempt="7.0", job_id="8")
    assert read_record(submission).job_ids == ("7", "8")
    (attempt,) = attempts_of(_lines(submission), submission="0001", task=None)
    assert attempt.outcome == Outcome(next=AGAIN, why="nodes were unfit; job 8 goes on without them", excused=True)
    assert begin(submission, attempt="8.0") == GO_ON


def test_a_job_that_goes_on_without_unfit_nodes_may_begin_before_that_is_noted(submission):
    """Two nodes were lost before a checkpoint was there: a third start would be of no use, and this one was none."""
    begin(submission, attempt="7.0")
    assert end(submission, attempt="7.0", code=1) == 10
    begin(submission, attempt="7.1")
    write_json(submission / "preflight" / "7.1.json", {"code": 30, "unfit": ["node2"]})
    assert begin(submission, attempt="8.0") == GO_ON
    resubmitted(submission, attempt="7.1", job_id="8")
    attempts = attempts_of(_lines(submission), submission="0001", task=None)
    assert [(a.name, a.counts) for a in attempts] == [("7.0", True), ("7.1", False), ("8.0", True)]


def test_a_submission_is_counted_by_itself(submission):
    begin(submission, attempt="7.0")
    _say(submission, "7.0", E, E)
    assert end(submission, attempt="7.0", code=1) == 11
    second = submission.with_name("0002")
    record = read_record(submission)
    values = {**json.loads((submission / "submission.json").read_text())}
    values["job"]["folder"] = str(second)
    write_json(second / "submission.json", values)
    assert record.job.folder == submission
    assert begin(second, attempt="9.0") == GO_ON


def test_tasks_of_an_array_are_counted_apart(tmp_path):
    submission = _submission(tmp_path, kind="prepare", max_requeues=1)
    assert begin(submission, attempt="7.0", task="1-0") == begin(submission, attempt="8.0", task="1-1") == GO_ON
    assert end(submission, attempt="7.0", code=0, task="1-0") == 0
    assert end(submission, attempt="8.0", code=138, task="1-1") == 10
    assert begin(submission, attempt="8.1", task="1-1") == GO_ON
    assert end(submission, attempt="8.1", code=138, task="1-1") == 11, "one too many"
    assert begin(submission, attempt="9.0", task="2-0") == GO_ON


@pytest.mark.parametrize("ends, code, follows", [((), 0, 0), ((), 1, 11), ((), 137, 10), ((K, L), 1, 10), ((E, L), 1, 11)])
def test_a_benchmark_is_run_again_where_a_node_failed(tmp_path, ends, code, follows):
    submission = _submission(tmp_path, kind="bench")
    begin(submission, attempt="7.0")
    _say(submission, "7.0", *ends)
    assert end(submission, attempt="7.0", code=code) == follows


def test_a_full_disk_costs_lines_and_not_the_bound(submission, monkeypatch, capsys, caplog):
    def full(handle, data):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("opensora_dist.resilience.attempts.os.write", full)
    begun = [begin(submission, attempt=f"7.{restart}") for restart in range(5)]
    assert begun == [GO_ON] * 4 + [REFUSED], "Slurm's own count stands in for lines that could not be written"
    assert end(submission, attempt="7.2", code=1) == 10
    assert end(submission, attempt="7.3", code=1) == 11
    assert "No space left on device" in caplog.text and '"attempt": "7.3"' in caplog.text


_WRITER = """
import sys
from pathlib import Path
from opensora_dist.resilience.attempts import append_line
for n in range(50):
    append_line(Path(sys.argv[1]), {"writer": int(sys.argv[2]), "n": n, "said": "x" * 3000})
"""


def test_lines_of_jobs_that_write_at_once_are_whole(tmp_path):
    path = tmp_path / "launch" / "attempts.jsonl"
    writers = [subprocess.Popen([sys.executable, "-c", _WRITER, str(path), str(n)]) for n in range(4)]
    assert [w.wait(timeout=60) for w in writers] == [0] * 4
    lines = [json.loads(text) for text in path.read_text().splitlines()]
    assert sorted((x["writer"], x["n"]) for x in lines) == [(w, n) for w in range(4) for n in range(50)]


def test_a_line_that_a_crash_cut_off_costs_itself_alone(tmp_path):
    path = tmp_path / "attempts.jsonl"
    append_line(path, {"event": "begin", "submission": "0001", "task": None, "attempt": "7.0", "step": 0, "starts_before": 0})
    with open(path, "a") as handle:
        handle.write('{"event": "end", "subm')
    append_line(path, {"event": "begin", "submission": "0001", "task": None, "attempt": "7.1", "step": 5, "starts_before": 1})
    assert [a.name for a in attempts_of(read_lines(path), submission="0001", task=None)] == ["7.0", "7.1"]


def test_the_verbs_take_slurms_name_of_the_attempt(submission, monkeypatch, capsys):
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    assert main(["node", "begin", str(submission)]) == 0
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    assert main(["node", "begin", str(submission)]) == 0
    assert main(["node", "end", str(submission), "--code", "1"]) == 11
    assert main(["node", "resubmitted", str(submission), "8", "--attempt", "7.1"]) == 0
    assert [x["attempt"] for x in _lines(submission)] == ["7.0", "7.0", "7.1", "7.1", "7.1"]
    capsys.readouterr()


def test_nodes_that_did_not_report_are_named_and_the_verdict_is_kept(submission, capsys):
    assert main(["node", "verdict", str(submission), "--attempt", "7.0", "node1", "node2"]) == 31
    assert capsys.readouterr().out == "node1,node2\n"
    assert json.loads((submission / "preflight" / "7.0.json").read_text()) == {"code": 31, "unfit": ["node1", "node2"]}


def test_a_folder_that_is_no_submission_is_named(tmp_path, capsys):
    assert main(["node", "begin", str(tmp_path), "--attempt", "7.0"]) == 2
    assert "submission.json doesn't exist" in capsys.readouterr().err


def test_paths_are_the_ones_that_scripts_export():
    assert endings_folder(Path("/run/launch/0001"), "7.0") == Path("/run/launch/0001/endings/7.0")
