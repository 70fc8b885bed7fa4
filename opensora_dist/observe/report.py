"""``report.html``: one self-contained page about a run, from the files in its directory."""

from __future__ import annotations

import base64
import json
import re
import statistics
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import yaml

from opensora_dist.core.errors import DataError
from opensora_dist.core.io import read_json, write_text
from opensora_dist.core.layout import (
    CONFIG_NAME,
    ENVIRONMENT_NAME,
    EVALUATION_NAME,
    EVENTS_NAME,
    METRICS_NAME,
    REPORT_NAME,
    SAMPLES_DIR,
)
from opensora_dist.observe.charts import Series, line_chart, smooth
from opensora_dist.observe.jsonl import Record, read_records
from opensora_dist.observe.page import page
from opensora_dist.observe.parts import definitions, details, esc, flat, plain, table, tile
from opensora_dist.observe.progress import format_count, format_seconds

# Bytes of video in the page; a browser takes more, a mail server doesn't. The newest steps come first.
_VIDEO_BUDGET_BYTES = 24 << 20
_LAST_EVENTS = 200


def write_report(run_dir: Path) -> Path:
    """Writes ``report.html`` into a run directory, of whatever the run has so far. Validation videos are inside the page.

    Raises:
        DataError: The folder is no run, or a file in it is damaged; the message names it.
    """
    run_dir = Path(run_dir)
    known = (CONFIG_NAME, METRICS_NAME, EVENTS_NAME, ENVIRONMENT_NAME)
    if not any((run_dir / name).is_file() for name in known):
        state = "no such folder" if not run_dir.is_dir() else f"has none of {', '.join(known)}"
        raise DataError(f"{run_dir}: {state}; give the run directory of a training run (run.dir in its config)")
    metrics = read_records(run_dir / METRICS_NAME)
    events = read_records(run_dir / EVENTS_NAME)
    environment = _read_object(run_dir / ENVIRONMENT_NAME)
    config_text, run = _read_config(run_dir / CONFIG_NAME)
    name = str(run.get("name", run_dir.resolve().name))
    body = "\n".join(
        [
            _header(name, run_dir, metrics, events),
            _tiles(metrics, events, planned_steps=run.get("steps")),
            _curves(metrics),
            _sequence(events),
            _samples(run_dir / SAMPLES_DIR),
            _evaluation(_read_object(run_dir / EVALUATION_NAME)),
            details("Configuration", f"<pre>{_yaml(config_text)}</pre>" if config_text else ""),
            details("Environment", definitions(environment) if environment else ""),
            _events(events),
            f"<footer>Written by opensora-dist, {datetime.now(UTC):%Y-%m-%d %H:%M} UTC. "
            "Move the pointer over a chart to read its values.</footer>",
        ]
    )
    path = run_dir / REPORT_NAME
    write_text(path, page(f"{name}: opensora-dist report", body))
    return path


def _header(name: str, run_dir: Path, metrics: Sequence[Record], events: Sequence[Record]) -> str:
    state = str(events[-1]["event"]).replace("_", " ") if events else "no events"
    since = f" · started {_time(events[0]['time'])}" if events else ""
    until = f" · last event {_time(events[-1]['time'])}" if events else ""
    bad = [m["step"] for m in metrics if m.get("nonfinite")]
    warning = ""
    if bad:
        shown = ", ".join(map(str, bad[:10])) + (", ..." if len(bad) > 10 else "")
        warning = (
            f'<p class="warn">{len(bad)} of {len(metrics)} steps had a loss or gradient that was not finite: step {shown}.</p>'
        )
    return (
        f'<header><h1>{esc(name)}<span class="badge">{esc(state)}</span></h1>'
        f"<p>{esc(run_dir.name)}{esc(since)}{esc(until)}</p>{warning}</header>"
    )


def _tiles(metrics: Sequence[Record], events: Sequence[Record], *, planned_steps: Any) -> str:
    tiles: list[str] = []

    def add(value: str, label: str, note: str = "", *, bad: bool = False) -> None:
        tiles.append(tile(label, value, note, bad=bad))

    if metrics:
        last = metrics[-1]
        add(f"{last['step']:,}", "Steps", f"of {planned_steps:,}" if isinstance(planned_steps, int) else "")
        losses = smooth(_column(metrics, "loss"), span=_span(metrics))
        loss = next((v for v in reversed(losses) if v is not None), None)
        add(f"{loss:.4f}" if loss is not None else "none", "Loss", "smoothed", bad=bool(last.get("nonfinite")))
        seconds = [m["step_s"] for m in metrics if m.get("step_s")]
        if seconds:
            rates = [m["samples"] / m["step_s"] for m in metrics if m.get("step_s") and m.get("samples")]
            tokens = [m["tokens"] / m["step_s"] for m in metrics if m.get("step_s") and m.get("tokens")]
            if rates:
                add(format_count(statistics.median(rates)), "Samples/s", "median")
            if tokens:
                add(format_count(statistics.median(tokens)), "Tokens/s", "median")
            wait = 100 * sum(m.get("data_wait_s") or 0.0 for m in metrics) / sum(seconds)
            add(f"{wait:.1f}%", "Waiting for data", "of step time")
            add(format_seconds(sum(seconds)), "Training time", f"median step {statistics.median(seconds):.3g} s")
        mfu = [v for v in _column(metrics, "mfu") if v is not None]
        if mfu:
            add(f"{100 * statistics.median(mfu):.1f}%", "MFU", "median")
        memory = [v for v in _column(metrics, "memory_bytes") if v is not None]
        if memory:
            add(f"{max(memory) / 2**30:.2f} GiB", "Peak memory", "per rank")
    parameters = next((e["parameters"] for e in reversed(events) if isinstance(e.get("parameters"), int)), None)
    if parameters is not None:
        add(format_count(parameters), "Parameters", f"{parameters:,}")
    return f'<section class="tiles">{"".join(tiles)}</section>' if tiles else ""


def _curves(metrics: Sequence[Record]) -> str:
    if not metrics:
        return '<h2>Training</h2><p class="empty">No steps yet: metrics.jsonl is empty or absent.</p>'
    steps = [m["step"] for m in metrics]
    span = _span(metrics)

    def pair(values: list[float | None]) -> list[Series]:
        raw = Series(name="each step", steps=steps, values=values, style="raw")
        return [raw, Series(name="smoothed", steps=steps, values=smooth(values, span=span))]

    def per_second(name: str) -> list[float | None]:
        return [m[name] / m["step_s"] if m.get(name) is not None and m.get("step_s") else None for m in metrics]

    wait = [100 * (m.get("data_wait_s") or 0.0) / m["step_s"] if m.get("step_s") else None for m in metrics]
    charts = [
        line_chart("Loss", pair(_column(metrics, "loss")), wide=True),
        line_chart("Gradient norm", pair(_column(metrics, "grad_norm")), unit="before clipping"),
        line_chart("Learning rate", [Series(name="lr", steps=steps, values=_column(metrics, "lr"))], from_zero=True),
        line_chart("Throughput", pair(per_second("samples")), unit="samples/s", from_zero=True),
        line_chart("Data wait", pair(wait), unit="% of the step", from_zero=True),
    ]
    return f'<h2>Training</h2><section class="charts">{"".join(charts)}</section>'


def _samples(folder: Path) -> str:
    steps = sorted((p for p in folder.glob("step-*") if (p / "index.json").is_file()), reverse=True)
    if not steps:
        return '<h2>Validation videos</h2><p class="empty">None drawn: set validation.every_steps and validation.prompts.</p>'
    groups: list[str] = []
    left = _VIDEO_BUDGET_BYTES
    for i, step in enumerate(steps):
        figures: list[str] = []
        listing = _read(step / "index.json")
        if not isinstance(listing, list) or not all(isinstance(e, dict) and {"file", "prompt"} <= e.keys() for e in listing):
            raise DataError(f"{step / 'index.json'}: expected a list of {{file, prompt}}; remove {step} to leave it out")
        for entry in listing:
            # The name only: an index must not make the page show files from elsewhere.
            video = step / Path(str(entry["file"])).name
            content = '<div class="empty">not written</div>'
            if video.is_file() and video.stat().st_size <= left:
                data = video.read_bytes()
                left -= len(data)
                play = "autoplay " if i == 0 else ""
                source = f"data:video/mp4;base64,{base64.b64encode(data).decode()}"
                content = f'<video {play}controls loop muted playsinline preload="auto" src="{source}"></video>'
            elif video.is_file():
                content = '<div class="empty">left out: the page is large enough</div>'
            figures.append(f'<figure class="video">{content}<p>{esc(entry["prompt"])}</p></figure>')
        label = step.name.removeprefix("step-").lstrip("0") or "0"
        groups.append(f'<h3>Step {esc(label)}</h3><div class="videos">{"".join(figures)}</div>')
    older = f"<details><summary>Earlier steps ({len(groups) - 1})</summary>" if len(groups) > 1 else ""
    rest = f'{older}<div style="padding: 0 16px 16px">{"".join(groups[1:])}</div></details>' if older else ""
    return f"<h2>Validation videos</h2>{groups[0]}{'<h3></h3>' if rest else ''}{rest}"


def _evaluation(result: Mapping[str, Any] | None) -> str:
    if result is None:
        return ""
    tiles = [tile(name, f"{100 * rate:.0f}%") for name, rate in result.get("rates", {}).items()]
    parts = [f'<section class="tiles">{"".join(tiles)}</section>'] if tiles else []
    rest = {name: value for name, value in result.items() if name != "rates" and not isinstance(value, list)}
    if rest:
        parts.append(f'<p class="note">{esc(", ".join(f"{n} {plain(v)}" for n, v in flat(rest) if v is not None))}</p>')
    for name, value in result.items():
        if isinstance(value, list) and value and all(isinstance(row, dict) for row in value):
            parts.append(f"<h3>{esc(name.replace('_', ' '))}</h3>{table(value)}")
    return f"<h2>Evaluation</h2>{''.join(parts)}" if parts else ""


def _sequence(events: Sequence[Record]) -> str:
    """What ``parallel.sp.scheme=auto`` chose for each bucket; a later start's choice stands in for an earlier one's."""
    rows: dict[str, dict[str, Any]] = {}
    for event in events:
        if event["event"] not in ("sequence_prediction", "sequence_measured"):
            continue
        row = rows.setdefault(str(event.get("bucket")), {})
        if event["event"] == "sequence_prediction":
            row.clear()
        row.update({k: v for k, v in event.items() if k not in ("time", "event", "bucket")})
    if not rows:
        return ""
    lines = [
        {
            "bucket (tokens)": bucket,
            "scheme": row.get("scheme"),
            "ranks per sample": row.get("degree"),
            "predicted ms a step": row.get("predicted_ms"),
            "measured ms a step": row.get("measured_ms"),
            "next best, predicted": row.get("runner_up"),
        }
        for bucket, row in rows.items()
    ]
    note = (
        "parallel.sp.scheme=auto takes the shortest predicted step: matrix products and what is not hidden of the transfers, so a "
        "measured step is longer by norms, softmax, the optimizer and all else. Measured is the median of a bucket's third to tenth step; "
        "on a GPU, of windows between two log lines in which no other bucket came, and not its first."
    )
    return f'<h2>Sequence parallelism</h2>{table(lines)}<p class="note">{esc(note)}</p>'


def _events(events: Sequence[Record]) -> str:
    if not events:
        return details("Events", "")
    rows = [
        {
            "time": _time(e["time"]),
            "event": str(e["event"]).replace("_", " "),
            "details": ", ".join(f"{k}={plain(v)}" for k, v in e.items() if k not in ("time", "event")),
        }
        for e in events[-_LAST_EVENTS:]
    ]
    left_out = f" (last {_LAST_EVENTS} of {len(events)})" if len(events) > _LAST_EVENTS else f" ({len(events)})"
    return details(f"Events{left_out}", table(rows, card=False))


def _yaml(text: str) -> str:
    """YAML with its keys and comments coloured."""
    lines = []
    for line in text.splitlines():
        match = re.match(r"^(\s*(?:- )?)([\w.-]+)(:)(\s.*|)$", line)
        if line.lstrip().startswith("#"):
            lines.append(f'<span class="c">{esc(line)}</span>')
        elif match:
            lines.append(f'{esc(match[1])}<span class="k">{esc(match[2])}</span>:{esc(match[4])}')
        else:
            lines.append(esc(line))
    return "\n".join(lines)


def _column(metrics: Sequence[Record], name: str) -> list[Any]:
    return [m.get(name) for m in metrics]


def _span(metrics: Sequence[Record]) -> int:
    """Steps that smoothing averages over: a thirtieth of the run."""
    return max(1, min(200, len(metrics) // 30))


def _read_config(path: Path) -> tuple[str, dict[str, Any]]:
    """The config as it stands in the file, and its ``run`` section."""
    if not path.is_file():
        return "", {}
    text = path.read_text()
    try:
        values = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise DataError(f"{path}: damaged ({error}); repair it, or move it away") from error
    run = values.get("run") if isinstance(values, dict) else None
    return text, run if isinstance(run, dict) else {}


def _read(path: Path) -> Any:
    try:
        return read_json(path)
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise DataError(f"{path}: damaged ({error}); repair it, or move it away") from error


def _read_object(path: Path) -> dict[str, Any] | None:
    if not path.is_file():
        return None
    value = _read(path)
    if not isinstance(value, dict):
        raise DataError(f"{path}: expected a JSON object, got {type(value).__name__}; repair it, or move it away")
    return value


def _time(text: Any) -> str:
    return str(text)[:19].replace("T", " ")
