"""A Chrome trace of one pass of each form: communication on tracks of its own, beside the operators."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch.profiler import ProfilerActivity, profile, record_function

from opensora_dist.core.io import atomic_path
from opensora_dist.recipes.bench.case import Subject
from opensora_dist.recipes.bench.passes import Form, timed_pass

_LANES_FROM = 1_000_000  # above any thread's id
_TRANSFERS = "gloo:"


def write_trace(path: Path, forms: Sequence[Form], subject: Subject) -> None:
    """Runs one pass of each form under the profiler, and writes this rank's trace. Collective.

    A CUDA build's NCCL kernels have a stream of their own in it. gloo's transfers are put on tracks of their own here; its sends and
    receives end when they were waited for, since gloo doesn't tell when they were done.
    """
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # it talks on the standard error about starting and stopping
    cuda = [ProfilerActivity.CUDA] if subject.device.type == "cuda" else []
    with profile(activities=[ProfilerActivity.CPU, *cuda]) as profiler:
        for form in forms:
            region = form.shard.region
            x, dy = subject.tokens("x", region).requires_grad_(), subject.tokens("dy", region)
            name = form.result.name
            timed_pass(subject, form.shard, x, dy, span=lambda direction, name=name: record_function(f"{name} {direction}"))  # type: ignore[misc]
    with atomic_path(path) as partial:
        profiler.export_chrome_trace(str(partial))
        raw = json.loads(partial.read_text())
        partial.write_text(json.dumps(in_lanes(raw)))


def in_lanes(trace: dict[str, Any]) -> dict[str, Any]:
    """The trace with gloo's transfers on as many tracks as are in flight at once, above the threads that compute."""
    events: list[dict[str, Any]] = trace["traceEvents"]
    transfers = sorted(
        (e for e in events if e.get("ph") == "X" and str(e.get("name", "")).startswith(_TRANSFERS)), key=lambda e: e["ts"]
    )
    ends: list[float] = []
    for event in transfers:
        lane = next((i for i, end in enumerate(ends) if end <= event["ts"]), len(ends))
        if lane == len(ends):
            ends.append(0.0)
            named = {"ph": "M", "pid": event["pid"], "tid": _LANES_FROM + lane}
            events.append({**named, "name": "thread_name", "args": {"name": f"in flight {lane + 1}"}})
            events.append({**named, "name": "thread_sort_index", "args": {"sort_index": lane - 1000}})
        ends[lane] = event["ts"] + event["dur"]
        event["tid"] = _LANES_FROM + lane
    trace.pop("traceName", None)  # a path of this machine
    return trace


def hidden_under_products(trace: dict[str, Any], *, form: str) -> float:
    """Share of a form's time in flight in which this rank was inside a matrix product or an attention.

    Args:
        form: As ``SequenceResult.name``.
    """
    events = [e for e in trace["traceEvents"] if e.get("ph") == "X"]
    spans = [(e["ts"], e["ts"] + e["dur"]) for e in events if e["name"] in (f"{form} forward", f"{form} backward")]

    def inside(event: dict[str, Any]) -> bool:
        return any(a <= event["ts"] < b for a, b in spans)

    flights = [(e["ts"], e["ts"] + e["dur"]) for e in events if e["name"].startswith(_TRANSFERS) and inside(e)]
    products = ("aten::mm", "aten::addmm", "aten::bmm", "aten::_scaled_dot_product")
    busy = [(e["ts"], e["ts"] + e["dur"]) for e in events if e["name"].startswith(products) and inside(e)]
    flying = _union(flights)
    together = sum(max(0.0, min(b, d) - max(a, c)) for a, b in flying for c, d in _union(busy))
    total = sum(b - a for a, b in flying)
    return together / total if total else 0.0


def _union(spans: list[tuple[float, float]]) -> list[tuple[float, float]]:
    merged: list[tuple[float, float]] = []
    for begin, end in sorted(spans):
        if merged and begin <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(end, merged[-1][1]))
        else:
            merged.append((begin, end))
    return merged
