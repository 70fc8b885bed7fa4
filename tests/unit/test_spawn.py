from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from opensora_dist.parallel import spawn


@pytest.fixture
def program(monkeypatch, tmp_path):
    """Makes ranks run a few lines of Python in place of the package, which takes seconds to import; says how they ended."""
    real = subprocess.Popen

    def use(code, *, before=lambda: None, **more):
        def start(command, **kwargs):
            assert command[:3] == [sys.executable, "-m", "opensora_dist"]
            before()
            return real([sys.executable, "-c", "import os, signal, sys\nrank = int(os.environ['RANK'])\n" + code], **kwargs)

        monkeypatch.setattr(spawn.subprocess, "Popen", start)
        return spawn.run_ranks(["train"], nproc=2, log_dir=tmp_path / "logs", **more)

    return use


def test_ranks_that_all_end_well_give_0(program, tmp_path):
    assert program("print('hello from', rank)") == 0
    assert (tmp_path / "logs" / "rank-1.log").read_text() == "hello from 1\n"


def test_each_rank_learns_who_it_is_and_where_to_meet(program, tmp_path):
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "TORCHELASTIC_USE_AGENT_STORE")
    assert program(f"print(*[os.environ[n] for n in {names}], int(os.environ['MASTER_PORT']) > 0)") == 0
    assert (tmp_path / "logs" / "rank-1.log").read_text().split() == ["1", "1", "2", "2", "127.0.0.1", "True", "True"]


def test_a_rank_that_exits_with_3_gives_3_ends_the_others_and_shows_the_end_of_its_log(program, caplog, tmp_path):
    pid = tmp_path / "pid"
    code = (
        f"if rank == 0:\n    open({str(pid)!r} + '.new', 'w').write(str(os.getpid()))\n    os.rename({str(pid)!r} + '.new', {str(pid)!r})\n    signal.pause()\n"
        f"while not os.path.exists({str(pid)!r}): pass\n"
        "for i in range(100): print('line', i)\nprint('the reason', file=sys.stderr)\nsys.exit(3)"
    )
    with caplog.at_level(logging.ERROR):
        assert program(code) == 3
    assert "rank 1 failed with exit code 3" in caplog.text
    assert "the reason" in caplog.text and "line 99" in caplog.text and "line 50\n" not in caplog.text
    assert not Path(f"/proc/{pid.read_text()}").exists()


def test_a_rank_that_a_signal_ended_gives_1_and_the_signals_name(program, caplog):
    assert program("if rank == 1: os.kill(os.getpid(), signal.SIGKILL)\nsignal.pause()") == 1
    assert "rank 1 was ended by SIGKILL" in caplog.text


def test_a_rank_that_fails_because_of_another_is_not_taken_for_the_reason(program, caplog, tmp_path):
    gone = tmp_path / "gone"
    code = (
        f"if rank == 1:\n    print('why', flush=True)\n    open({str(gone)!r}, 'w').close()\n    os.kill(os.getpid(), signal.SIGKILL)\n"
        f"while not os.path.exists({str(gone)!r}): pass\nsys.exit(3)"
    )
    assert program(code) == 1
    assert caplog.text.index("rank 1 was ended by SIGKILL") < caplog.text.index("rank 0 failed with exit code 3")
    assert "why" in caplog.text


def test_a_rank_that_ignores_the_request_to_end_is_killed(program, monkeypatch):
    monkeypatch.setattr(spawn, "_GRACE_S", 0.2)
    began = time.monotonic()
    assert program("signal.signal(signal.SIGTERM, signal.SIG_IGN)\nif rank == 1: sys.exit(1)\nsignal.pause()") == 1
    assert time.monotonic() - began < 30


def test_signals_to_the_parent_reach_every_rank_and_its_handlers_are_put_back(program, tmp_path):
    before = {s: spawn.signal.getsignal(s) for s in (spawn.signal.SIGTERM, spawn.signal.SIGINT, spawn.signal.SIGUSR1)}
    ready = tmp_path / "ready"
    code = (
        "signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])\n"
        f"open({str(ready)!r} + str(rank), 'w').close()\n"
        f"other = {str(ready)!r} + str(1 - rank)\n"
        "while not os.path.exists(other): pass\n"
        "if rank == 1: os.kill(os.getppid(), signal.SIGTERM)\n"
        "signal.sigwait([signal.SIGTERM])\n"
        "print('asked to stop')"
    )
    assert program(code) == 0
    assert "asked to stop" in (tmp_path / "logs" / "rank-1.log").read_text()
    assert {s: spawn.signal.getsignal(s) for s in before} == before


def _ask_to_stop():
    os.kill(os.getpid(), signal.SIGTERM)


def test_a_rank_that_is_started_during_a_request_to_stop_gets_it_too(program):
    assert program("import time\ntime.sleep(30)\nsys.exit(7)", before=_ask_to_stop) == 1


def test_a_second_run_keeps_what_the_first_one_logged(program, tmp_path):
    program("print('first')")
    program("print('second')")
    assert (tmp_path / "logs" / "rank-1.log").read_text().split() == ["first", "second"]


def test_ranks_die_with_a_parent_that_is_killed(tmp_path):
    """kill -9 of the launcher leaves no rank behind."""
    code = (
        "import os, signal, subprocess, sys\nfrom pathlib import Path\nfrom opensora_dist.parallel import spawn\n"
        "real = subprocess.Popen\n"
        "def start(command, **kwargs):\n"
        "    p = real([sys.executable, '-c', 'import signal; signal.pause()'], **kwargs)\n"
        "    print(p.pid, flush=True)\n"
        "    if kwargs['env']['RANK'] == '1': os.kill(os.getpid(), signal.SIGKILL)\n"
        "    return p\n"
        "spawn.subprocess.Popen = start\n"
        "spawn.run_ranks(['train'], nproc=2, log_dir=Path(sys.argv[1]))\n"
    )
    # Its ranks hold the pipe's other end, so `communicate` returns only when they are gone too.
    ended = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, timeout=60, check=False)
    assert ended.returncode == -9
    assert len(ended.stdout.split()) == 2


def _counting(tmp_path):
    """Lines of a program: how often this rank was started before. It goes on when both ranks are counted: one that fails ends the other."""
    starts = str(tmp_path / "starts-")
    return (
        f"open({starts!r} + str(rank), 'a').write('x')\nbefore = len(open({starts!r} + str(rank)).read()) - 1\n"
        f"while not os.path.exists({starts!r} + str(1 - rank)) or len(open({starts!r} + str(1 - rank)).read()) <= before: pass\n"
    )


def test_ranks_that_fail_are_started_again_and_told_how_often(program, tmp_path):
    code = (
        _counting(tmp_path) + "assert int(os.environ['TORCHELASTIC_RESTART_COUNT']) == before\nsys.exit(3 if before < 2 else 0)"
    )
    assert program(code, max_restarts=2) == 0
    assert (tmp_path / "starts-1").read_text() == "xxx"


@pytest.mark.parametrize(
    "code, more, starts",
    [
        (3, {"max_restarts": 1}, 2),
        (2, {"max_restarts": 5}, 1),
        (3, {"max_restarts": 5, "stuck": iter([None, "no progress"]).__next__}, 2),
    ],
    ids=["the limit", "a bad config", "no progress"],
)
def test_ranks_are_not_started_again_beyond(program, caplog, tmp_path, code, more, starts):
    assert program(_counting(tmp_path) + f"sys.exit({code})", **more) == code
    assert (tmp_path / "starts-0").read_text() == "x" * starts
    assert ("not started again: no progress" in caplog.text) == ("stuck" in more)


def test_ranks_that_fail_after_a_request_to_stop_are_not_started_again(program, tmp_path):
    code = _counting(tmp_path) + "if rank == 0: os.kill(os.getppid(), signal.SIGTERM)\nsignal.pause()"
    assert program(code, max_restarts=3) == 1
    assert (tmp_path / "starts-0").read_text() == "x"


def test_a_request_to_stop_between_two_starts_prevents_the_second(program, caplog, tmp_path):
    assert program(_counting(tmp_path) + "sys.exit(3)", max_restarts=3, stuck=_ask_to_stop) == 3
    assert (tmp_path / "starts-0").read_text() == "x"
