"""A sequence benchmark's results as a table, as JSON and as a picture."""

from __future__ import annotations

import html
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

from rich.console import Console
from rich.table import Table

from opensora_dist.observe.charts import format_tick, nice_ticks
from opensora_dist.observe.environment import describe_environment
from opensora_dist.parallel.sequence.base import Traffic
from opensora_dist.recipes.bench.case import SequenceCase
from opensora_dist.recipes.bench.figures import Figures, Spread, baseline_of, figures
from opensora_dist.recipes.bench.passes import SequenceResult
from opensora_dist.recipes.bench.sequence import Options
from opensora_dist.recipes.bench.speed import Speed, Work, speed

WIDE = 220  # columns of a table that goes to a file
DASH = "-"


def print_table(case: SequenceCase, results: Sequence[SequenceResult], *, world: int, console: Console | None = None) -> None:
    """To the standard output; rows that were not timed follow with their reasons."""
    console = console or Console()
    if not console.is_terminal:
        console = Console(width=WIDE, file=console.file)
    baseline = baseline_of(results)
    table = Table(title=title(case, world=world), caption=_CAPTION, caption_justify="left")
    table.add_column("scheme", no_wrap=True)
    against = baseline.scheme if baseline is not None else DASH
    times = ("forward ms", "backward ms", "both ms", f"x {against}", "exposed f + b ms", "wait ms", "hidden wall, wait")
    for column in (*times, "MB sent f + b", "= formula", "peak MB"):
        table.add_column(column, justify="right", no_wrap=not console.is_terminal)
    for result in results:
        found = figures(result, results)
        if found is not None:
            table.add_row(result.name, *_cells(result, found))
    console.print(table)
    for result in results:
        if result.problem is not None:
            console.print(f"{result.name}: left out: {result.problem}", markup=False, highlight=False)


_CAPTION = (
    "Medians over rounds, in brackets the quartiles; a round's time is its slowest rank's. Exposed: beyond the same form without "
    "communication. Hidden: of what the scheme's blocking form exposes and waits. Peak: beyond weights and inputs."
)


def title(case: SequenceCase, *, world: int) -> str:
    """The case in a line."""
    how = f", recompute {case.recompute}" if case.recompute != "none" else ""
    return (
        f"One {case.model} block over {world} rank{'s' if world > 1 else ''}: batch {case.batch}, {case.grid} tokens, width {case.width}, "
        f"{case.heads} heads, {case.text_tokens} text tokens, {case.dtype}{how}"
    )


def _cells(result: SequenceResult, found: Figures) -> list[str]:
    hidden = found.hidden["both"] if found.hidden is not None else None
    exposed = DASH
    if found.exposed_forward_ms is not None and found.exposed_backward_ms is not None:
        exposed = f"{three(found.exposed_forward_ms.median)} + {three(found.exposed_backward_ms.median)}"
    sent = result.sent or Traffic(forward=0, backward=0)
    return [
        ms(found.forward_ms),
        ms(found.backward_ms),
        ms(found.both_ms),
        f"{found.ratio.median:.3f} [{found.ratio.low:.3f}, {found.ratio.high:.3f}]" if found.ratio is not None else DASH,
        exposed,
        three(found.wait_ms) if result.silent else DASH,
        f"{percent(hidden.wall)}, {percent(hidden.wait)}" if hidden is not None else DASH,
        f"{sent.forward / 1e6:.3f} + {sent.backward / 1e6:.3f}",
        "yes" if result.bytes_match else "NO",
        megabytes(result.memory_bytes),
    ]


def ms(spread: Spread) -> str:
    return f"{three(spread.median)} [{three(spread.low)}, {three(spread.high)}]"


def three(value: float) -> str:
    """Three digits, without an exponent."""
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"


def megabytes(count: int | None) -> str:
    return DASH if count is None else f"{count / 1e6:,.1f}"


def percent(share: float | None) -> str:
    return DASH if share is None else f"{100 * share:.0f}%"


def record(
    case: SequenceCase, results: Sequence[SequenceResult], *, options: Options, world: int, peak_flops: float | None
) -> dict[str, Any]:
    """Everything as JSON values: the case, the environment, raw times, and the figures that follow from them.

    Args:
        peak_flops: Of a rank's device, FLOP/s; None where it isn't known.
    """
    work = Work(samples=case.batch, tokens=case.grid.volume, flops=case.flops, world=world, peak_flops=peak_flops)
    return {
        "format": 1,
        "kind": "sequence",
        "case": case.record(),
        "world": world,
        "work": asdict(work),
        "options": {
            "rounds": options.rounds,
            "warmup": options.warmup,
            "sp": options.sp.model_dump(mode="json", include={"chunks", "ulysses", "fastseq_dw"}),
        },
        **about(world),
        "results": [_result(r, results, work=work) for r in results],
    }


def about(world: int) -> dict[str, Any]:
    """Of every record: where it was measured, over what link where that is modelled, and what else the machine was doing."""
    return {
        "environment": describe_environment(world=world),
        "link": os.environ.get("OPENSORA_LINK"),
        "load": list(os.getloadavg()),
    }


def _result(result: SequenceResult, others: Sequence[SequenceResult], *, work: Work) -> dict[str, Any]:
    found = figures(result, others)
    figures_ = None if found is None else {**asdict(found), "speed": asdict(_speed(found, work))}
    return {"name": result.name, **asdict(result), "figures": figures_}


def _speed(found: Figures, work: Work) -> Speed:
    exposed = None
    if found.exposed_forward_ms is not None and found.exposed_backward_ms is not None:
        exposed = (found.exposed_forward_ms.median + found.exposed_backward_ms.median) / 1e3
    return speed(found.both_ms.median / 1e3, work=work, exposed_s=exposed)


_LEFT, _RIGHT, _BAR, _ROW, _TOP, _WIDTH = 168, 24, 13, 40, 64, 860
_COLOURS = {"compute": "#3559e0", "exposed": "#e0793d", "all": "#98a1b3"}
_LEGEND = (("compute", "without communication"), ("exposed", "exposed communication"), ("all", "all, not told apart"))


def picture(case: SequenceCase, results: Sequence[SequenceResult], *, world: int) -> str:
    """An SVG: per form a bar for forward and one for backward, of the time without communication and what is exposed of it."""
    rows = [(r.name, found) for r in results if (found := figures(r, results)) is not None]
    longest = max((max(f.forward_ms.median, f.backward_ms.median) for _, f in rows), default=1.0)
    height = _TOP + _ROW * len(rows) + 40

    def across(ms: float) -> float:
        return _LEFT + (_WIDTH - _LEFT - _RIGHT) * ms / (1.08 * longest)

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {height}" font-family="system-ui, sans-serif" font-size="12">',
        f'<rect width="{_WIDTH}" height="{height}" fill="#ffffff"/>',
        f'<text x="16" y="24" font-weight="600" fill="#1b2130">{html.escape(title(case, world=world))}</text>',
    ]
    x = 16
    for kind, label in _LEGEND:
        parts.append(f'<rect x="{x}" y="36" width="11" height="11" rx="2" fill="{_COLOURS[kind]}"/>')
        parts.append(f'<text x="{x + 16}" y="46" fill="#667085">{label}</text>')
        x += 34 + 7 * len(label)
    parts.append(
        f'<text x="{_WIDTH - _RIGHT}" y="46" text-anchor="end" fill="#667085">upper: forward, lower: backward, ms</text>'
    )
    for tick in nice_ticks(0.0, 1.08 * longest):
        at = across(tick)
        parts.append(f'<path d="M{at:.1f} {_TOP}V{height - 36}" stroke="#e4e7ec"/>')
        parts.append(f'<text x="{at:.1f}" y="{height - 18}" text-anchor="middle" fill="#667085">{format_tick(tick)}</text>')
    for i, (name, found) in enumerate(rows):
        y = _TOP + 6 + _ROW * i
        parts.append(f'<text x="{_LEFT - 10}" y="{y + 18}" text-anchor="end" fill="#1b2130">{html.escape(name)}</text>')
        parts += _bar(found.forward_ms, found.exposed_forward_ms, y=y, across=across)
        parts += _bar(found.backward_ms, found.exposed_backward_ms, y=y + _BAR + 2, across=across)
    return "\n".join([*parts, "</svg>\n"])


def _bar(total: Spread, exposed: Spread | None, *, y: float, across: Callable[[float], float]) -> list[str]:
    def rect(low: float, high: float, kind: str) -> str:
        x, width = across(low), max(0.0, across(high) - across(low))
        return f'<rect x="{x:.1f}" y="{y}" width="{width:.1f}" height="{_BAR}" fill="{_COLOURS[kind]}"/>'

    middle = y + _BAR / 2
    end = min(across(total.high), _WIDTH - _RIGHT / 2)
    whisker = f'<path d="M{across(total.low):.1f} {middle}H{end:.1f}" stroke="#1b2130" stroke-width="1.5"/>'
    if exposed is None:
        return [rect(0, total.median, "all"), whisker]
    floor = total.median - max(0.0, exposed.median)
    return [rect(0, floor, "compute"), rect(floor, total.median, "exposed"), whisker]
