"""Line charts as SVG, inline or in a file of its own: no script library, no font, no file beside it."""

from __future__ import annotations

import html
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

_WIDTH, _WIDE, _HEIGHT = 640, 1312, 260
_LEFT, _RIGHT, _TOP, _BOTTOM = 58, 12, 10, 30
_MAX_POINTS = 600
_LOG_RATIO = 30.0  # a curve that spans more than this reads better on a logarithmic axis


@dataclass(frozen=True, kw_only=True)
class Series:
    """One line of a chart: ``values[i]`` at ``steps[i]``; None breaks the line.

    Args:
        name: Shown in the legend and under the pointer.
        style: CSS class: "raw" (thin, pale) or "main".
    """

    name: str
    steps: Sequence[int]
    values: Sequence[float | None]
    style: str = "main"


def smooth(values: Sequence[float | None], *, span: int) -> list[float | None]:
    """Mean over the ``span`` values around each, so that the curve doesn't lag; fewer at the ends; a gap stays a gap."""
    sums, counts = [0.0], [0]
    for value in values:
        sums.append(sums[-1] + (value or 0.0))
        counts.append(counts[-1] + (value is not None))
    half = max(0, span // 2)
    out: list[float | None] = []
    for i, value in enumerate(values):
        low, high = max(0, i - half), min(len(values), i + half + 1)
        out.append((sums[high] - sums[low]) / (counts[high] - counts[low]) if value is not None else None)
    return out


def nice_ticks(low: float, high: float, *, count: int = 5) -> list[float]:
    """About ``count`` round numbers (1, 2, 2.5, 5 times a power of ten) within [low, high]."""
    span = high - low
    if span <= 0:
        return [low]
    raw = span / count
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(m * power for m in (1.0, 2.0, 2.5, 5.0, 10.0) if m * power >= raw)
    first = math.ceil(low / step - 1e-9)
    return [round(i * step, 12) for i in range(first, math.floor(high / step + 1e-9) + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """1, 2 and 5 times powers of ten within [low, high]; powers alone where those would be too many."""
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    factors: tuple[float, ...] = (1.0, 2.0, 5.0) if len(decades) <= 3 else (1.0,)
    return [f * 10.0**d for d in decades for f in factors if low <= f * 10.0**d <= high]


def thin(series: Series) -> Series:
    """At most about 600 points, keeping the lowest and the highest of each stretch, so that no spike is lost."""
    count = len(series.steps)
    if count <= _MAX_POINTS:
        return series
    size = math.ceil(count / (_MAX_POINTS // 2))
    keep: set[int] = {0, count - 1}
    for start in range(0, count, size):
        known = [(v, i) for i in range(start, min(count, start + size)) if (v := series.values[i]) is not None]
        keep |= {min(known)[1], max(known)[1]} if known else {start}
    picks = sorted(keep)
    return Series(
        name=series.name, steps=[series.steps[i] for i in picks], values=[series.values[i] for i in picks], style=series.style
    )


def format_tick(value: float) -> str:
    """A short label: 0.002, 15, 12k, 1e-06."""
    if value == 0:
        return "0"
    if abs(value) >= 1e9 or abs(value) < 1e-4:
        return f"{value:.1g}"
    for limit, unit in ((1e6, "M"), (1e3, "k")):
        if abs(value) >= limit:
            return f"{value / limit:g}{unit}"
    return f"{value:g}"


def line_chart(title: str, lines: Sequence[Series], *, unit: str = "", from_zero: bool = False, wide: bool = False) -> str:
    """A chart of one or more lines over steps, as an HTML figure.

    Args:
        title: Heading.
        lines: Drawn in order, the last on top.
        unit: Of the values.
        from_zero: Start the axis at 0, for quantities whose size matters; then it is never logarithmic.
        wide: As wide as the page.
    """
    lines = [thin(s) for s in lines]
    width = _WIDE if wide else _WIDTH
    figure = f'<figure class="chart{" wide" if wide else ""}">'
    known = [(step, v) for s in lines for step, v in zip(s.steps, s.values, strict=True) if v is not None]
    heading = f"<figcaption>{html.escape(title)}{f' <small>{html.escape(unit)}</small>' if unit else ''}</figcaption>"
    if not known:
        return f'{figure}{heading}<p class="empty">No values yet.</p></figure>'
    first, last = min(s for s, _ in known), max(s for s, _ in known)
    low, high = min(v for _, v in known), max(v for _, v in known)
    logarithmic = not from_zero and low > 0 and high / low > _LOG_RATIO
    if from_zero:
        low = min(0.0, low)
    if not logarithmic:
        pad = 0.05 * (high - low) or abs(high) * 0.05 or 1.0
        high += pad
        low -= 0.0 if from_zero and low >= 0 else pad

    def across(step: float) -> float:
        return _LEFT + (width - _LEFT - _RIGHT) * ((step - first) / (last - first) if last > first else 0.5)

    def up(value: float) -> float:
        if logarithmic:
            share = (math.log(value) - math.log(low)) / (math.log(high) - math.log(low))
        else:
            share = (value - low) / (high - low)
        return _HEIGHT - _BOTTOM - (_HEIGHT - _TOP - _BOTTOM) * share

    parts = [
        f'<svg viewBox="0 0 {width} {_HEIGHT}" role="img" aria-label="{html.escape(title, quote=True)} by step"'
        f" data-lines='{_pointer_data(lines, across, up)}'>"
    ]
    for tick in log_ticks(low, high) if logarithmic else nice_ticks(low, high):
        y = up(tick)
        parts.append(f'<path class="grid" d="M{_LEFT} {y:.1f}H{width - _RIGHT}"/>')
        parts.append(f'<text class="tick" x="{_LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{format_tick(tick)}</text>')
    for tick in nice_ticks(first, last, count=6):
        if tick == int(tick):
            parts.append(
                f'<text class="tick" x="{across(tick):.1f}" y="{_HEIGHT - 8}" text-anchor="middle">{format_tick(tick)}</text>'
            )
    parts.append(f'<path class="axis" d="M{_LEFT} {_HEIGHT - _BOTTOM}H{width - _RIGHT}"/>')
    parts += [_path(s, across, up) for s in lines]
    parts.append('<g class="pointer"><path d=""/></g></svg><output></output>')
    legend = "".join(f'<span class="key {s.style}">{html.escape(s.name)}</span>' for s in lines) if len(lines) > 1 else ""
    note = '<span class="key note">log scale</span>' if logarithmic else ""
    return f'{figure}{heading}<div class="legend">{legend}{note}</div>{"".join(parts)}</figure>'


_COLOURS = ("#3559e0", "#e0793d", "#2f9e6e", "#b04ac0", "#98a1b3", "#c0362c", "#7a6a2f", "#1b2130")


def line_svg(title: str, lines: Mapping[str, Sequence[tuple[int, float]]], *, unit: str, across: str) -> str:
    """A picture for a file of its own: lines over a few whole numbers that double, such as nodes; from 0 upwards.

    Args:
        lines: By name, (x, y) points from left to right.
        unit: Of y.
        across: What x counts.
    """
    columns = sorted({x for points in lines.values() for x, _ in points})
    places = {x: math.log2(x) for x in columns}
    low, high = min(places.values(), default=0.0), max(places.values(), default=0.0)
    top = 1.08 * max((y for points in lines.values() for _, y in points), default=1.0) or 1.0
    width, bottom = _WIDTH, 56 + _HEIGHT
    height = bottom + 44 + 18 * len(lines)

    def right(x: int) -> float:
        share = (places[x] - low) / (high - low) if high > low else 0.5
        return _LEFT + 20 + (width - _LEFT - _RIGHT - 40) * share

    def up(y: float) -> float:
        return bottom - _HEIGHT * y / top

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" font-family="system-ui, sans-serif" font-size="12">',
        f'<rect width="{width}" height="{height}" fill="#ffffff"/>',
        f'<text x="16" y="24" font-weight="600" fill="#1b2130">{html.escape(title)}</text>',
        f'<text x="16" y="42" fill="#667085">{html.escape(unit)}</text>',
    ]
    for tick in nice_ticks(0.0, top):
        parts.append(f'<path d="M{_LEFT} {up(tick):.1f}H{width - _RIGHT}" stroke="#e4e7ec"/>')
        parts.append(f'<text x="{_LEFT - 8}" y="{up(tick) + 4:.1f}" text-anchor="end" fill="#667085">{format_tick(tick)}</text>')
    for x in columns:
        parts.append(f'<text x="{right(x):.1f}" y="{bottom + 16}" text-anchor="middle" fill="#667085">{x}</text>')
    parts.append(f'<text x="{width - _RIGHT}" y="{bottom + 16}" text-anchor="end" fill="#667085">{html.escape(across)}</text>')
    for i, (name, points) in enumerate(lines.items()):
        colour = _COLOURS[i % len(_COLOURS)]
        path = "L".join(f"{right(x):.1f} {up(y):.1f}" for x, y in points)
        parts.append(f'<path d="M{path}" fill="none" stroke="{colour}" stroke-width="2"/>')
        parts += [f'<circle cx="{right(x):.1f}" cy="{up(y):.1f}" r="3" fill="{colour}"/>' for x, y in points]
        y = bottom + 40 + 18 * i
        parts.append(f'<rect x="{_LEFT}" y="{y - 9}" width="11" height="11" rx="2" fill="{colour}"/>')
        parts.append(f'<text x="{_LEFT + 18}" y="{y}" fill="#1b2130">{html.escape(name)}</text>')
    return "\n".join([*parts, "</svg>\n"])


def _path(series: Series, across: Callable[[float], float], up: Callable[[float], float]) -> str:
    commands: list[str] = []
    dots: list[str] = []
    values = list(series.values)
    for i, (step, value) in enumerate(zip(series.steps, values, strict=True)):
        if value is None:
            continue
        starts = i == 0 or values[i - 1] is None
        commands.append(f"{'M' if starts else 'L'}{across(step):.1f} {up(value):.1f}")
        if starts and (i + 1 == len(values) or values[i + 1] is None):  # a point without neighbours makes no line
            dots.append(f'<circle class="dot {series.style}" cx="{across(step):.1f}" cy="{up(value):.1f}" r="3"/>')
    return f'<path class="line {series.style}" d="{"".join(commands)}"/>{"".join(dots)}'


def _pointer_data(lines: Sequence[Series], across: Callable[[float], float], up: Callable[[float], float]) -> str:
    """What the page's script needs to show values under the pointer: per line its name and [x, y, step, value] rows."""
    data = [
        {
            "name": s.name,
            "points": [
                [round(across(step), 1), round(up(v), 1), step, float(f"{v:.5g}")]
                for step, v in zip(s.steps, s.values, strict=True)
                if v is not None
            ],
        }
        for s in lines
    ]
    return html.escape(json.dumps(data, separators=(",", ":")), quote=True)
