"""Signals set a flag; ranks stop together."""

from __future__ import annotations

import contextlib
import json
import os
import signal
from pathlib import Path

import pytest
import torch.distributed as dist

from opensora_dist.resilience.signals import SAVED_AND_STOPPED, StopAgreement, StopFlag, clear_marker, write_marker


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_a_signal_sets_the_flag_and_nothing_else(number: signal.Signals) -> None:
    with StopFlag() as flag:
        assert not flag.requested
        assert flag.signal_name is None
        os.kill(os.getpid(), number)
        assert flag.requested
        assert flag.signal_name == number.name


def test_signals_may_come_twice_and_the_first_is_named() -> None:
    with StopFlag() as flag:
        for number in (signal.SIGUSR1, signal.SIGTERM, signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
            os.kill(os.getpid(), number)
        assert flag.signal_name == "SIGUSR1"


def test_a_second_interrupt_raises() -> None:
    with StopFlag() as flag:
        signal.raise_signal(signal.SIGINT)
        assert flag.requested
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


def test_handlers_are_put_back() -> None:
    before = [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)]
    with contextlib.suppress(ZeroDivisionError), StopFlag():
        assert signal.getsignal(signal.SIGTERM) != before[0]
        raise ZeroDivisionError
    assert [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)] == before


def test_one_process_agrees_with_itself_at_once() -> None:
    agreement = StopAgreement()
    assert [agreement.agree(f) for f in (False, True)] == [False, True]
    agreement.close()


def test_ranks_stop_at_the_same_step_one_after_the_signal(monkeypatch) -> None:
    """Two ranks' calls in lock-step, over a stand-in for the collective that completes only when both have posted."""
    votes: dict[int, list] = {0: [], 1: []}

    class Work:
        def __init__(self, rank: int, index: int) -> None:
            self.rank, self.index = rank, index

        def wait(self) -> None:
            both = [votes[r][self.index] for r in (0, 1)]  # IndexError: waited for a vote that the other rank has not posted
            highest = max(b[0] for b in both)
            votes[self.rank][self.index][1][0] = highest

    def all_reduce(tensor, op, group, async_op):
        assert async_op
        votes[group].append((int(tensor[0]), tensor))
        return Work(group, len(votes[group]) - 1)

    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_world_size", lambda group: 2)
    monkeypatch.setattr(dist, "all_reduce", all_reduce)
    ranks = [StopAgreement(0), StopAgreement(1)]  # type: ignore[arg-type]
    flags = [[False, False, False, False], [False, False, True, True]]
    answers = [[ranks[r].agree(flags[r][step]) for r in (0, 1)] for step in range(4)]
    assert answers == [[False, False], [False, False], [False, False], [True, True]]
    for agreement in ranks:
        agreement.close()
        agreement.close()


def test_the_marker_says_where_the_run_stopped_and_can_be_cleared(tmp_path: Path) -> None:
    path = write_marker(tmp_path, step=120, signal_name="SIGTERM")
    assert path.name == SAVED_AND_STOPPED
    assert json.loads(path.read_text()) == {"step": 120, "signal": "SIGTERM"}
    clear_marker(tmp_path)
    clear_marker(tmp_path)
    assert not path.exists()
