"""report.html: one page that needs nothing else, whatever the run has so far."""

from __future__ import annotations

import base64
import json
import math
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from opensora_dist.core.errors import DataError
from opensora_dist.core.io import write_json, write_text
from opensora_dist.core.video import write_video
from opensora_dist.observe.charts import Series, line_chart, log_ticks, nice_ticks, smooth, thin
from opensora_dist.observe.events import EventLog
from opensora_dist.observe.metrics import MetricLog, StepMetrics
from opensora_dist.observe.report import write_report

NASTY = "<script>alert('x')</script> & \"quotes\""


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    root = tmp_path / "run"
    write_text(root / "config.yaml", f"run:\n  name: {json.dumps(NASTY)}\n  steps: 500\n# {NASTY}\nmodel:\n  name: stdit\n")
    write_json(root / "environment.json", {"python": "3.11", "packages": {"torch": "2"}, "gpus": [], "host": NASTY})
    metrics = MetricLog(root, steps_done=0)
    for step in range(1, 301):
        metrics.log(
            StepMetrics(
                step=step, loss=math.nan if step == 77 else math.exp(-step / 50), grad_norm=1.0 + step % 7, lr=1e-4, samples=16,
                tokens=1000, step_s=0.5, data_wait_s=0.05, mfu=0.31, memory_bytes=2**30, batch_digest="ab",
            )
        )  # fmt: skip
    metrics.close()
    events = EventLog(root)
    events.log("started", {"parameters": 759_620_768, "note": NASTY})
    events.log("finished", {"step": 300})
    events.close()
    frames = np.random.default_rng(0).integers(0, 255, (4, 16, 16, 3)).astype(np.uint8)
    for step in (100, 200):
        folder = root / "samples" / f"step-{step:08d}"
        write_video(folder / "000.mp4", frames, fps=8)
        write_json(folder / "index.json", [{"file": "000.mp4", "prompt": NASTY}, {"file": "001.mp4", "prompt": "not there"}])
    write_json(
        root / "evaluation.json",
        {"rates": {"colour": 0.953}, "sampling": {"steps": 31}, "rows": [{"prompt": NASTY, "colour": True, "direction": False}]},
    )
    return root


class _Page(HTMLParser):
    """Tags, their nesting, and what they would load."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.loads: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.loads += [v for k, v in attrs if k in ("src", "href", "data", "poster")]
        if tag not in ("meta", "path", "circle", "br", "input"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag, f"</{tag}> closes another element"


def test_the_page_is_well_formed_and_loads_nothing(run_dir: Path) -> None:
    path = write_report(run_dir)
    assert path == run_dir / "report.html"
    page = _Page(path.read_text())
    assert page.open == []
    assert page.tags.count("script") == 1
    assert all(load.startswith("data:video/mp4;base64,") for load in page.loads)
    assert "http" not in re.sub(r"http-equiv", "", path.read_text())


def test_it_shows_tiles_curves_videos_evaluation_config_environment_and_events(run_dir: Path) -> None:
    text = write_report(run_dir).read_text()
    for said in (
        "of 500",
        "760M",
        "759,620,768",
        ">32<",
        "2m30s",
        "10.0%",
        "31.0%",
        "1.00 GiB",
        "Step 200",
        ">95%<",
        "sampling.steps 31",
    ):
        assert said in text, said
    for title in ("Loss", "Gradient norm", "Learning rate", "Throughput", "Data wait"):
        assert f"<figcaption>{title}" in text
    assert "1 of 300 steps had a loss or gradient that was not finite: step 77." in text
    assert text.count("not written") == 2
    video = (run_dir / "samples" / "step-00000200" / "000.mp4").read_bytes()
    assert base64.b64encode(video).decode() in text
    assert "packages.torch" in text


def test_it_shows_what_auto_chose_predicted_and_measured(run_dir: Path) -> None:
    assert "Sequence parallelism" not in write_report(run_dir).read_text()
    events = EventLog(run_dir)
    chosen = {"bucket": "16x8x8", "scheme": "dsp", "degree": 2, "predicted_ms": 12.34}
    events.log("sequence_prediction", {**chosen, "predicted_ms": 99.9, "runner_up": "ring x 2, 15 ms"})
    events.log("sequence_prediction", {**chosen, "runner_up": f"ulysses x 2, 14 ms {NASTY}"})
    events.log("sequence_prediction", {**chosen, "bucket": "1x8x8", "scheme": "local", "degree": 1})
    events.log("sequence_measured", {**chosen, "measured_ms": 56.78})
    events.close()
    text = write_report(run_dir).read_text()
    section = text[text.index("Sequence parallelism") : text.index("Validation videos")]
    for said in ("16x8x8", ">dsp<", ">2<", ">12.34<", ">56.78<", "ulysses x 2, 14 ms", "1x8x8", ">local<"):
        assert said in section, said
    assert "99.9" not in section and NASTY not in section
    assert _Page(text).open == []


def test_every_text_is_escaped(run_dir: Path) -> None:
    text = write_report(run_dir).read_text()
    assert "<script>alert" not in text
    # title, heading, config value and comment, environment, event, two captions, evaluation row
    assert text.count("&lt;script&gt;alert") >= 9


@pytest.mark.parametrize(
    "left_out", ["metrics.jsonl", "events.jsonl", "config.yaml", "environment.json", "samples", "evaluation.json"]
)
def test_what_is_missing_is_said_or_left_out(run_dir: Path, left_out: str) -> None:
    target = run_dir / left_out
    shutil.rmtree(target) if target.is_dir() else target.unlink()
    text = write_report(run_dir).read_text()
    said = {"metrics.jsonl": "No steps yet", "samples": "None drawn", "evaluation.json": ""}.get(left_out, "Not recorded")
    assert said in text
    assert _Page(text).open == []


def test_a_run_that_has_only_started_has_a_page(tmp_path: Path) -> None:
    EventLog(tmp_path).log("started")
    assert "No steps yet" in write_report(tmp_path).read_text()


def test_one_step_and_only_nonfinite_steps_have_a_page(tmp_path: Path) -> None:
    log = MetricLog(tmp_path, steps_done=0)
    values = {"grad_norm": 0.0, "lr": 0.0, "samples": 1, "tokens": 1, "step_s": 0.0, "data_wait_s": 0.0, "mfu": None}
    log.log(StepMetrics(step=1, loss=math.nan, memory_bytes=None, batch_digest="", **values))
    log.close()
    assert "No values yet" in write_report(tmp_path).read_text()


def test_a_folder_that_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"has none of config\.yaml"):
        write_report(tmp_path)
    with pytest.raises(DataError, match="no such folder"):
        write_report(tmp_path / "absent")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["evaluation.json", "environment.json", "config.yaml", "samples/step-00000100/index.json"])
def test_a_damaged_file_is_named(run_dir: Path, name: str) -> None:
    (run_dir / name).write_text("{ broken: [")
    with pytest.raises(DataError, match=re.escape(name)):
        write_report(run_dir)


def test_an_index_cannot_show_files_from_elsewhere(run_dir: Path) -> None:
    secret = b"not for the page"
    (run_dir.parent / "secret.mp4").write_bytes(secret)
    write_json(run_dir / "samples" / "step-00000200" / "index.json", [{"file": "../../../secret.mp4", "prompt": "p"}])
    assert base64.b64encode(secret).decode() not in write_report(run_dir).read_text()


def test_ticks_are_round_and_inside() -> None:
    assert nice_ticks(0.0, 1.0) == [0.0, 0.2, 0.4, 0.6, 0.8, 1.0]
    assert nice_ticks(3, 997) == [200.0, 400.0, 600.0, 800.0]
    assert nice_ticks(2.0, 2.0) == [2.0]
    assert log_ticks(0.009, 1.5) == [0.01, 0.1, 1.0]
    assert log_ticks(0.15, 3.0) == pytest.approx([0.2, 0.5, 1.0, 2.0])


def test_a_wide_range_is_drawn_on_a_log_axis_unless_it_starts_at_zero() -> None:
    series = [Series(name="x", steps=[1, 2, 3], values=[0.001, 0.1, 10.0])]
    assert "log scale" in line_chart("x", series)
    assert "log scale" not in line_chart("x", series, from_zero=True)


def test_smoothing_does_not_lag_and_keeps_gaps() -> None:
    line = [float(i) for i in range(50)]
    assert smooth(line, span=9)[10:40] == line[10:40]
    assert smooth([1.0, None, 3.0], span=3) == [1.0, None, 3.0]
    assert smooth([5.0, 7.0], span=1) == [5.0, 7.0]


def test_thinning_keeps_the_ends_and_every_spike() -> None:
    values: list[float | None] = [1.0] * 100_000
    values[54_321] = 99.0
    values[12_345] = -9.0
    thinned = thin(Series(name="x", steps=range(100_000), values=values))
    assert len(thinned.steps) <= 610
    assert (thinned.steps[0], thinned.steps[-1]) == (0, 99_999)
    assert {54_321, 12_345} <= set(thinned.steps)
