"""Pieces of HTML that pages share. Every text that comes in is escaped here."""

from __future__ import annotations

import html
import json
from collections.abc import Mapping, Sequence
from typing import Any


def esc(text: Any) -> str:
    """Text for HTML, inside tags and attributes."""
    return html.escape(str(text), quote=True)


def plain(value: Any) -> str:
    """A JSON value as a reader would write it."""
    if value is None:
        return ""
    if isinstance(value, (list, tuple)) and all(not isinstance(v, (dict, list)) for v in value):
        return " ".join(map(str, value))
    return value if isinstance(value, str) else json.dumps(value)


def flat(values: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    """Leaves of nested dicts with dotted names."""
    leaves: list[tuple[str, Any]] = []
    for name, value in values.items():
        if isinstance(value, dict):
            leaves += flat(value, f"{prefix}{name}.")
        else:
            leaves.append((f"{prefix}{name}", value))
    return leaves


def table(rows: Sequence[Mapping[str, Any]], *, card: bool = True) -> str:
    """Rows under the names of their columns; ``card`` frames them."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    head = "".join(f"<th>{esc(c.replace('_', ' '))}</th>" for c in columns)
    lines = ["<tr>" + "".join(_cell(row.get(c)) for c in columns) + "</tr>" for row in rows]
    framed = f'<div class="scroll tall"><table><thead><tr>{head}</tr></thead><tbody>{"".join(lines)}</tbody></table></div>'
    return f'<div class="card">{framed}</div>' if card else framed


def _cell(value: Any) -> str:
    if isinstance(value, bool):
        return f'<td class="{"yes" if value else "no"}">{"yes" if value else "no"}</td>'
    if isinstance(value, float):
        return f'<td class="num">{value:.4g}</td>'
    return f'<td class="{"num" if isinstance(value, int) else "value"}">{esc(plain(value))}</td>'


def definitions(values: Mapping[str, Any]) -> str:
    """Nested values as lines of dotted name and value."""
    rows = [
        f'<tr><td class="name">{esc(name)}</td><td class="value">{esc(plain(value))}</td></tr>' for name, value in flat(values)
    ]
    return f'<div class="scroll"><table><tbody>{"".join(rows)}</tbody></table></div>'


def details(title: str, content: str) -> str:
    """What opens on a click; the configuration is open, under a heading of its own."""
    if not content:
        return f'<h2>{esc(title)}</h2><p class="empty">Not recorded.</p>'
    heading = "<h2>Record</h2>" if title == "Configuration" else ""
    return f"{heading}<details{' open' if title == 'Configuration' else ''}><summary>{esc(title)}</summary>{content}</details>"


def tile(label: str, value: str, note: str = "", *, bad: bool = False) -> str:
    """One figure with what it is of."""
    small = f"<small>{esc(note)}</small>" if note else ""
    return f'<div class="tile{" bad" if bad else ""}"><span>{esc(label)}</span><b>{esc(value)}</b>{small}</div>'
