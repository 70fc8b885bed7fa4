"""Bars: counts by name as HTML, counts by value as inline SVG. No script, no font, no file beside the page."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from opensora_dist.observe.charts import format_tick, nice_ticks
from opensora_dist.observe.parts import esc

_WIDTH, _HEIGHT = 640, 220
_LEFT, _RIGHT, _TOP, _BOTTOM = 58, 12, 12, 30
_WIDEST = 60.0  # column: where all clips have the same value, a chart would else be one block


@dataclass(frozen=True, kw_only=True)
class Bar:
    """One count.

    Args:
        label: What is counted.
        note: More about it, in small print under the label.
        bad: Drawn as something lost.
    """

    label: str
    value: int
    note: str = ""
    bad: bool = False


def bar_list(bars: Sequence[Bar]) -> str:
    """A line per bar: label, bar, count and share of all."""
    total, most = sum(bar.value for bar in bars) or 1, max((bar.value for bar in bars), default=0) or 1
    lines = []
    for bar in bars:
        note = f"<small>{esc(bar.note)}</small>" if bar.note else ""
        lines.append(
            f'<li class="{"bad" if bar.bad else ""}"><span class="what">{esc(bar.label)}{note}</span>'
            f'<span class="track"><i style="width:{100 * bar.value / most:.2f}%"></i></span>'
            f'<span class="many">{bar.value:,}<small>{100 * bar.value / total:.1f}%</small></span></li>'
        )
    return f'<ul class="bars card">{"".join(lines)}</ul>'


def histogram(
    title: str, *, edges: Sequence[float], kept: Sequence[int], dropped: Sequence[int] = (), unit: str = "", note: str = ""
) -> str:
    """Columns of counts over a range of values, what was dropped stacked on what was kept, as an HTML figure.

    Args:
        edges: Of the bins, ascending, one more than there are bins.
        kept, dropped: Counts, bin by bin; no ``dropped`` where nothing can be.
        note: In small print below.
    """
    assert len(edges) == len(kept) + 1, (len(edges), len(kept))
    lost = list(dropped) or [0] * len(kept)
    most = max((k + d for k, d in zip(kept, lost, strict=True)), default=0) or 1
    low, high = float(edges[0]), float(edges[-1])

    def across(value: float) -> float:
        return _LEFT + (_WIDTH - _LEFT - _RIGHT) * ((value - low) / (high - low) if high > low else 0.5)

    def up(count: float) -> float:
        return _HEIGHT - _BOTTOM - (_HEIGHT - _TOP - _BOTTOM) * count / most

    parts = [f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{esc(title)}: how many clips have which value">']
    for tick in nice_ticks(0, most, count=4):
        if tick == int(tick):
            parts.append(f'<path class="grid" d="M{_LEFT} {up(tick):.1f}H{_WIDTH - _RIGHT}"/>')
            parts.append(
                f'<text class="tick" x="{_LEFT - 8}" y="{up(tick) + 4:.1f}" text-anchor="end">{format_tick(tick)}</text>'
            )
    for i, (k, d) in enumerate(zip(kept, lost, strict=True)):
        left, right = across(edges[i]), across(edges[i + 1])
        spare = max(0.0, right - left - _WIDEST) / 2
        left, right = left + spare, right - spare
        tip = f"{format_tick(edges[i])} to {format_tick(edges[i + 1])}: {k:,} kept" + (f", {d:,} dropped" if dropped else "")
        columns = [(up(k), up(0), "column"), (up(k + d), up(k), "column bad")]
        drawn = "".join(
            f'<rect class="{style}" x="{left + 0.5:.1f}" y="{top:.1f}" width="{max(1.0, right - left - 1):.1f}" '
            f'height="{bottom - top:.1f}"/>'
            for top, bottom, style in columns
            if bottom > top
        )
        parts.append(f"<g><title>{esc(tip)}</title>{drawn}</g>")
    whole = (low + 0.5).is_integer() and (high + 0.5).is_integer()  # bins around whole numbers
    for tick in (t for t in nice_ticks(low, high, count=6) if not whole or t == int(t)):
        parts.append(
            f'<text class="tick" x="{across(tick):.1f}" y="{_HEIGHT - 8}" text-anchor="middle">{format_tick(tick)}</text>'
        )
    parts.append(f'<path class="axis" d="M{_LEFT} {_HEIGHT - _BOTTOM}H{_WIDTH - _RIGHT}"/></svg>')
    key = '<div class="legend"><span class="key main">kept</span><span class="key lost">dropped</span></div>' if any(lost) else ""
    heading = f"<figcaption>{esc(title)}{f' <small>{esc(unit)}</small>' if unit else ''}</figcaption>"
    below = f'<p class="note">{esc(note)}</p>' if note else ""
    return f'<figure class="chart">{heading}{key}{"".join(parts)}{below}</figure>'
