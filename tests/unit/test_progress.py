"""Progress: live on a terminal, lines elsewhere, silence from other ranks."""

from __future__ import annotations

import io
import logging
import sys

import pytest
from rich.console import Console

from opensora_dist.observe.metrics import StepMetrics
from opensora_dist.observe.progress import Bar, TrainProgress, describe_steps, format_count, format_seconds


def _step(step: int, *, step_s: float = 0.5, mfu: float | None = 0.25) -> StepMetrics:
    return StepMetrics(
        step=step, loss=0.5, grad_norm=1.25, lr=1e-4, samples=8, tokens=4000, step_s=step_s, data_wait_s=step_s / 10, mfu=mfu,
        memory_bytes=None, batch_digest="",
    )  # fmt: skip


def _console(*, terminal: bool) -> tuple[Console, io.StringIO]:
    out = io.StringIO()
    return Console(file=out, force_terminal=terminal, width=160), out


@pytest.mark.parametrize(
    ("value", "text"), [(0.5, "0.5"), (950, "950"), (12345, "12.3k"), (759_620_768, "760M"), (2.5e9, "2.5G")]
)
def test_counts_have_three_digits(value: float, text: str) -> None:
    assert format_count(value) == text


@pytest.mark.parametrize(("seconds", "text"), [(-1, "0s"), (59.4, "59s"), (185, "3m05s"), (7380, "2h03m"), (370800, "4d07h")])
def test_durations_have_two_units(seconds: float, text: str) -> None:
    assert format_seconds(seconds) == text


def test_a_line_says_everything_the_user_watches() -> None:
    text = describe_steps([_step(9), _step(10)], total_steps=110)
    assert text == "loss 0.5000  grad 1.25  lr 1.00e-04  16 samples/s  8k tokens/s  MFU 25.0%  wait 10%  ETA 50s"
    assert "MFU" not in describe_steps([_step(1, mfu=None)], total_steps=2)


def test_one_slow_step_does_not_move_the_eta() -> None:
    assert "ETA 50s" in describe_steps([_step(8), _step(9, step_s=60.0), _step(10)], total_steps=110)


def test_without_a_terminal_each_log_step_is_one_line() -> None:
    console, out = _console(terminal=False)
    with TrainProgress(total_steps=30, steps_done=0, enabled=True, console=console) as progress:
        progress.update([_step(10)])
        progress.update([_step(20)])
        progress.update([])
        assert len(out.getvalue().splitlines()) == 2
    assert out.getvalue().startswith("step 10/30  loss 0.5000")


def test_on_a_terminal_the_display_is_live() -> None:
    console, out = _console(terminal=True)
    with TrainProgress(total_steps=30, steps_done=5, enabled=True, console=console) as progress:
        progress.update([_step(10)])
    assert "10/30" in out.getvalue()
    assert "samples/s" in out.getvalue()


@pytest.mark.parametrize("terminal", [True, False])
def test_other_ranks_are_silent(terminal: bool) -> None:
    console, out = _console(terminal=terminal)
    with TrainProgress(total_steps=30, steps_done=0, enabled=False, console=console) as progress:
        progress.update([_step(10)])
    with Bar("work", total=3, enabled=False, console=console) as bar:
        bar.advance(3)
    assert out.getvalue() == ""


@pytest.mark.parametrize("terminal", [True, False])
def test_a_bar_counts_what_is_done(terminal: bool) -> None:
    console, out = _console(terminal=terminal)
    with Bar("encoding", total=3, console=console) as bar:
        for _ in range(3):
            bar.advance()
    assert "encoding" in out.getvalue()
    assert "3/3" in out.getvalue()


def test_a_bar_counts_up_where_the_number_of_items_is_unknown() -> None:
    console, out = _console(terminal=False)
    with Bar("encoding", total=None, console=console) as bar:
        bar.advance(3)
    assert out.getvalue().splitlines()[-1].startswith("encoding 3 ")


def test_an_error_in_the_work_passes_through_and_claims_no_end() -> None:
    console, out = _console(terminal=False)

    def fail() -> None:
        with Bar("work", total=2, console=console):
            raise OSError("disk")

    with pytest.raises(OSError, match="disk"):
        fail()
    assert out.getvalue() == ""


def test_log_lines_go_above_a_live_bar_and_handlers_are_put_back(monkeypatch) -> None:
    console, _ = _console(terminal=True)
    handler = logging.StreamHandler(sys.stderr)
    monkeypatch.setattr(sys, "__stderr__", sys.stderr)
    logger = logging.getLogger("opensora_dist")
    monkeypatch.setattr(logger, "handlers", [handler])
    before = handler.stream
    with Bar("work", total=1, console=console):
        assert handler.stream is not before
    assert handler.stream is before
