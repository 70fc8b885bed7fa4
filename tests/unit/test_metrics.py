"""metrics.jsonl and events.jsonl: valid JSON whatever the numbers, whole whatever was interrupted."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from opensora_dist.core.errors import DataError
from opensora_dist.core.layout import METRICS_NAME
from opensora_dist.observe.events import EventLog
from opensora_dist.observe.jsonl import read_records
from opensora_dist.observe.metrics import MetricLog, StepMetrics


def _step(step: int, **changes) -> StepMetrics:
    values = {
        "step": step,
        "loss": 1.0 / step,
        "grad_norm": 2.0,
        "lr": 1e-4,
        "samples": 8,
        "tokens": 512,
        "step_s": 0.5,
        "data_wait_s": 0.01,
        "mfu": None,
        "memory_bytes": 123,
        "batch_digest": f"{step:04x}",
    }
    return StepMetrics(**{**values, **changes})


def _write(run_dir: Path, steps: range, *, steps_done: int = 0) -> None:
    log = MetricLog(run_dir, steps_done=steps_done)
    for step in steps:
        log.log(_step(step))
    log.close()
    log.close()


def test_one_object_per_step_with_every_field(tmp_path: Path) -> None:
    log = MetricLog(tmp_path / "run", steps_done=0)
    log.log(_step(1, extra={"skipped": 0}))
    log.flush()
    (record,) = [json.loads(line) for line in (tmp_path / "run" / METRICS_NAME).read_text().splitlines()]
    assert record == {**_step(1).record(), "skipped": 0}
    log.close()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_numbers_that_json_lacks_become_null_and_are_named(tmp_path: Path, value: float) -> None:
    log = MetricLog(tmp_path, steps_done=0)
    log.log(_step(1, loss=value, extra={"sigma": value}))
    log.close()
    text = (tmp_path / METRICS_NAME).read_text()
    record = json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    assert record["loss"] is None
    assert record["nonfinite"] == ["loss", "sigma"]


def test_resuming_removes_later_steps_and_goes_on(tmp_path: Path) -> None:
    _write(tmp_path, range(1, 8))
    _write(tmp_path, range(5, 11), steps_done=4)
    assert [r["step"] for r in read_records(tmp_path / METRICS_NAME)] == list(range(1, 11))
    assert not list(tmp_path.glob(".*partial*"))


def test_a_kept_nonfinite_step_survives_resuming(tmp_path: Path) -> None:
    log = MetricLog(tmp_path, steps_done=0)
    log.log(_step(1, loss=float("nan")))
    log.close()
    before = (tmp_path / METRICS_NAME).read_text()
    _write(tmp_path, range(0), steps_done=1)
    assert (tmp_path / METRICS_NAME).read_text() == before


def test_starting_over_removes_all_steps(tmp_path: Path) -> None:
    _write(tmp_path, range(1, 4))
    _write(tmp_path, range(1, 2))
    assert [r["step"] for r in read_records(tmp_path / METRICS_NAME)] == [1]


@pytest.mark.parametrize("cut", range(1, 40, 6))
def test_a_torn_last_line_is_dropped(tmp_path: Path, cut: int) -> None:
    _write(tmp_path, range(1, 4))
    path = tmp_path / METRICS_NAME
    path.write_bytes(path.read_bytes()[:-cut])
    whole = [1, 2] if cut > 1 else [1, 2, 3]  # without its newline the last line is still whole
    assert [r["step"] for r in read_records(path)] == whole
    _write(tmp_path, range(whole[-1] + 1, 6), steps_done=whole[-1])
    assert [r["step"] for r in read_records(path)] == [1, 2, 3, 4, 5]


def test_damage_before_the_last_line_is_named(tmp_path: Path) -> None:
    _write(tmp_path, range(1, 4))
    path = tmp_path / METRICS_NAME
    lines = path.read_text().splitlines(keepends=True)
    path.write_text(lines[0] + "{broken\n" + lines[2])
    with pytest.raises(DataError, match=r"line 2.*move the file away"):
        MetricLog(tmp_path, steps_done=3)


def test_events_are_on_disk_at_once_and_survive_a_torn_line(tmp_path: Path) -> None:
    log = EventLog(tmp_path / "run")
    log.log("started", {"parameters": 10, "lr": float("nan")})
    path = tmp_path / "run" / "events.jsonl"
    (first,) = read_records(path)
    assert first["event"] == "started"
    assert first["time"].startswith("20")
    assert first["nonfinite"] == ["lr"]
    log.close()
    with open(path, "a") as handle:
        handle.write('{"time": "2026')
    log = EventLog(tmp_path / "run")
    log.log("resumed")
    log.close()
    assert [e["event"] for e in read_records(path)] == ["started", "resumed"]
