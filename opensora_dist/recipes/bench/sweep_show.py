"""What a sweep found, as a table, as JSON and as pictures over the number of nodes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from opensora_dist.core.io import write_json, write_text
from opensora_dist.observe.charts import line_svg
from opensora_dist.recipes.bench.figures import Spread
from opensora_dist.recipes.bench.show import DASH, megabytes, ms, percent, three
from opensora_dist.recipes.bench.speed import dollars_per_million_tokens

Row = dict[str, Any]
_PICTURES: dict[str, tuple[str, str, Callable[[Row], float | None]]] = {
    "efficiency": (
        "Scaling efficiency",
        "tokens/s per rank, of that on the fewest nodes, %",
        lambda r: _times(100, r["efficiency"]),
    ),
    "tokens": ("Throughput", "tokens/s per rank", lambda r: r["speed"]["tokens_per_s_per_rank"]),
    "mfu": ("Model FLOPs use", "% of the peak", lambda r: _times(100, r["speed"]["mfu"])),
    "exposed": ("Exposed communication", "% of the step", lambda r: _times(100, r["speed"]["exposed_share"])),
    "dollars": ("Price", "dollars per million tokens", lambda r: r["speed"]["dollars_per_million_tokens"]),
}


def sweep_rows(found: Sequence[Mapping[str, Any]], *, dollars_per_gpu_hour: float | None) -> list[Row]:
    """One for each form that was timed at each point, in order.

    Args:
        found: What points came to, as their files have it.
        dollars_per_gpu_hour: Today's price, whatever it was when they ran; None leaves dollars out.
    Returns:
        Each with the point's values, the form's name, ``step_ms``, ``exposed_ms`` (None where it isn't known), ``speed``
        (``bench.speed.Speed``) and ``efficiency``: its tokens/s per rank over those of the same case on the fewest nodes on which it ran.
    """
    rows: list[Row] = []
    for outcome in found:
        if outcome["state"] != "done":
            continue
        for result in outcome["result"]["results"]:
            figures = result["figures"]
            if figures is None:  # a scheme that this case's sizes forbid
                continue
            rows.append(
                {
                    "values": outcome["point"],
                    "world": outcome["result"]["world"],
                    "form": result["name"],
                    "step_ms": figures.get("step_ms") or figures["both_ms"],
                    "exposed_ms": figures["exposed_ms"],
                    "speed": {**figures["speed"], "dollars_per_million_tokens": _price(figures["speed"], dollars_per_gpu_hour)},
                    "memory_bytes": result["memory_bytes"],
                }
            )
    for row in rows:
        alike = [other for other in rows if _case(other) == _case(row)]
        least = min(alike, key=lambda other: int(other["values"]["nodes"]))
        row["efficiency"] = row["speed"]["tokens_per_s_per_rank"] / least["speed"]["tokens_per_s_per_rank"]
    return rows


def write_sweep(found: Sequence[Mapping[str, Any]], *, kind: str, dollars_per_gpu_hour: float | None, out: Path) -> None:
    """``sweep.json``, ``table.md`` and a picture for each quantity that is known."""
    rows = sweep_rows(found, dollars_per_gpu_hour=dollars_per_gpu_hour)
    write_json(out / "sweep.json", {"format": 1, "kind": kind, "points": list(found), "rows": rows})
    write_text(out / "table.md", sweep_table(found, rows))
    varying = _varying(found)
    for name, (title, unit, value) in _PICTURES.items():
        lines: dict[str, list[tuple[int, float]]] = {}
        for row in sorted(rows, key=lambda r: int(r["values"]["nodes"])):
            if (y := value(row)) is not None:
                lines.setdefault(_label(row, varying), []).append((int(row["values"]["nodes"]), y))
        if lines:
            write_text(out / f"{name}.svg", line_svg(title, lines, unit=unit, across="nodes"))


def sweep_table(found: Sequence[Mapping[str, Any]], rows: Sequence[Row]) -> str:
    """Markdown: what was timed, and what was not with the reason."""
    keys = ["nodes", *_varying(found)]
    heads = [
        *keys,
        "form",
        "ranks",
        "step, ms",
        "samples/s",
        "tokens/s/rank",
        "efficiency",
        "MFU",
        "exposed, ms",
        "exposed",
        "$/M tokens",
        "peak, MB",
    ]
    lines = []
    if fixed := _fixed(found, keys):
        lines += ["Everywhere: " + ", ".join(f"{key} {value}" for key, value in fixed.items()) + ".", ""]
    lines += ["| " + " | ".join(heads) + " |", "| --- " * len(heads) + "|"]
    for row in rows:
        fast, values = row["speed"], row["values"]
        cells = [str(values.get(key, DASH)) for key in keys]
        price = fast["dollars_per_million_tokens"]
        cells += [
            row["form"],
            str(row["world"]),
            ms(Spread(**row["step_ms"])),
            three(fast["samples_per_s"]),
            three(fast["tokens_per_s_per_rank"]),
            percent(row["efficiency"]),
            percent(fast["mfu"]),
            DASH if row["exposed_ms"] is None else ms(Spread(**row["exposed_ms"])),
            percent(fast["exposed_share"]),
            DASH if price is None else three(price),
            megabytes(row["memory_bytes"]),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    left_out = [outcome for outcome in found if outcome["state"] != "done"]
    if left_out:
        lines += ["", "Not timed:", ""]
    for outcome in left_out:
        what = ", ".join(f"{key} {outcome['point'].get(key, DASH)}" for key in keys)
        lines.append(f"- {what}: {outcome['state']}: {' '.join(str(outcome['reason']).split())}")
    for outcome in found:
        for result in outcome["result"]["results"] if outcome["state"] == "done" else ():
            if result.get("problem"):
                what = ", ".join(f"{key} {outcome['point'].get(key, DASH)}" for key in keys)
                lines.append(f"- {what}, {result['name']}: {result['problem']}")
    return "\n".join([*lines, ""])


def _case(row: Row) -> tuple[Any, ...]:
    """All but the nodes."""
    return row["form"], *sorted((key, value) for key, value in row["values"].items() if key != "nodes")


def _varying(found: Sequence[Mapping[str, Any]]) -> list[str]:
    """Keys, but nodes, that have more than one value over the points."""
    keys = dict.fromkeys(key for outcome in found for key in outcome["point"] if key != "nodes")
    return [key for key in keys if len({outcome["point"].get(key) for outcome in found}) > 1]


def _fixed(found: Sequence[Mapping[str, Any]], keys: Sequence[str]) -> dict[str, Any]:
    return {key: value for outcome in found[:1] for key, value in outcome["point"].items() if key not in keys}


def _label(row: Row, varying: Sequence[str]) -> str:
    return ", ".join([*(f"{key} {row['values'][key]}" for key in varying if key in row["values"]), row["form"]])


def _price(speed: Mapping[str, Any], dollars_per_gpu_hour: float | None) -> float | None:
    if dollars_per_gpu_hour is None:
        return None
    return dollars_per_million_tokens(speed["tokens_per_s_per_rank"], dollars_per_gpu_hour=dollars_per_gpu_hour)


def _times(factor: float, value: float | None) -> float | None:
    return None if value is None else factor * value
