"""One self-contained page about a data set: what is in it, what was left out and why, and what a training makes of it."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from opensora_dist.core.io import write_text
from opensora_dist.observe.bars import Bar, bar_list, histogram
from opensora_dist.observe.data_stats import DataStats, Distribution, TrainingStats
from opensora_dist.observe.page import page
from opensora_dist.observe.parts import definitions, details, esc, table, tile
from opensora_dist.observe.progress import format_count, format_seconds

_DROPS_SHOWN = 40
"""Reasons with a bar of their own."""


@dataclass(frozen=True, kw_only=True)
class Picture:
    """Some frames of a clip.

    Args:
        jpeg: The file.
        title: What is said about the clip.
        note: Where it is from, how large it is.
    """

    jpeg: bytes
    title: str
    note: str


def write_stats_page(
    path: Path, stats: DataStats, *, kept: Sequence[Picture] = (), dropped: Mapping[str, Sequence[Picture]] | None = None
) -> Path:
    """Writes the page.

    Args:
        path: Of the HTML file.
        kept: Of samples.
        dropped: Reason to clips that were left out for it.
    """
    name = Path(stats.path.rstrip("/")).name or stats.path
    body = "\n".join(
        [
            _header(name, stats),
            _tiles(stats),
            _buckets(stats),
            _training(stats.training),
            _drops(stats, dropped or {}),
            _distributions("Scores", stats.scores, "Every clip that was scored, whether it was kept or not."),
            _classes(stats),
            _distributions("Captions and tokens", stats.distributions, "Of the samples."),
            _gallery("Samples", kept),
            f"<h2>Record</h2>{details('What it is made of', definitions(stats.spec))}",
            f"<footer>Written by opensora-dist, {datetime.now(UTC):%Y-%m-%d %H:%M} UTC.</footer>",
        ]
    )
    write_text(path, page(f"{name}: opensora-dist data", body))
    return path


def _header(name: str, stats: DataStats) -> str:
    problem = stats.training.problem if stats.training else None
    warnings = [f"{esc(stats.training.config)} can't train on this: {esc(problem)}"] if stats.training and problem else []
    empty = [bucket.bucket for bucket in stats.training.buckets if not bucket.used] if stats.training and not problem else []
    if empty:
        warnings.append(f"No batch comes from {esc(', '.join(empty))}: see Training.")
    if not stats.samples:
        warnings.append("Every clip was left out, so there is no data set.")
    if stats.empty_captions:
        warnings.append(f"{stats.empty_captions:,} samples have an empty caption.")
    shown = "".join(f'<p class="warn">{text}</p>' for text in warnings)
    return f'<header><h1>{esc(name)}<span class="badge">data set</span></h1><p>{esc(stats.path)}</p>{shown}</header>'


def _tiles(stats: DataStats) -> str:
    tiles = [tile("Samples", f"{stats.samples:,}", f"in {stats.shards:,} shards")]
    if stats.looked_at:
        tiles.append(tile("Clips looked at", f"{stats.looked_at:,}", f"{100 * stats.samples / stats.looked_at:.1f}% kept"))
    tiles.append(tile("Video", format_seconds(stats.duration_s), f"{stats.duration_s / max(1, stats.samples):.2g} s a clip"))
    tiles.append(
        tile("Size", f"{format_count(stats.num_bytes)}B", f"{format_count(stats.num_bytes / max(1, stats.samples))}B a sample")
    )
    if stats.training:
        no_steps = stats.training.steps_per_epoch == 0
        tiles.append(tile("Steps per epoch", f"{stats.training.steps_per_epoch:,}", stats.training.batch, bad=no_steps))
    return f'<section class="tiles">{"".join(tiles)}</section>'


def _buckets(stats: DataStats) -> str:
    bars = [
        Bar(
            label=bucket.bucket,
            value=bucket.samples,
            note=f"{f'{bucket.seconds:.3g} s' if bucket.seconds else 'images'}, latents {bucket.latent}, {bucket.text_tokens:.1f} text tokens"
            + (f", {bucket.model_tokens:,} model tokens" if bucket.model_tokens else ""),
        )
        for bucket in stats.buckets
    ]
    if not bars:
        return '<h2>Buckets</h2><p class="empty">None: there is no sample.</p>'
    return f'<h2>Buckets</h2>{bar_list(bars)}<p class="note">Frames x height x width in pixels.</p>'


def _training(training: TrainingStats | None) -> str:
    if training is None:
        return '<h2>Training</h2><p class="empty">No training config was given: with --config, this says what each bucket yields.</p>'
    rows = [
        {
            "bucket": bucket.bucket,
            "samples": bucket.samples,
            "used per epoch": bucket.used,
            "share": f"{100 * bucket.used / max(1, bucket.samples):.1f}%",
            "steps per epoch": bucket.steps,
            "gives batches": bucket.used > 0,
            "left out because": bucket.reason,
        }
        for bucket in training.buckets
    ]
    tiles = []
    if training.efficiency is not None:
        tiles.append(tile("Tokens of the budget used", f"{100 * training.efficiency:.1f}%"))
    if training.imbalance is not None:
        tiles.append(tile("Imbalance", f"{100 * training.imbalance:.1f}%", "of the costliest pack above the mean"))
    shown = f'<section class="tiles">{"".join(tiles)}</section><h3></h3>' if tiles else ""
    left = [Bar(label=what, value=count, bad=True) for what, count in training.left_out.items()]
    rest = f"<h3>Left out of each epoch</h3>{bar_list(left)}" if left else ""
    return f"<h2>Training</h2>{shown}{table(rows)}{rest}<p class='note'>{esc(training.config)}: {esc(training.batch)}.</p>"


def _drops(stats: DataStats, pictures: Mapping[str, Sequence[Picture]]) -> str:
    heading = "<h2>Left out by the preparation</h2>"
    if stats.looked_at is None:
        return f'{heading}<p class="empty">The preparation left no record here (clips.parquet, report.json).</p>'
    if not stats.drops:
        return f'{heading}<p class="empty">Nothing: every clip that was looked at is a sample.</p>'
    bars = [
        Bar(label=drop.said, value=drop.count, note=f"{drop.stage}: " * bool(drop.stage) + ", ".join(drop.examples), bad=True)
        for drop in stats.drops[:_DROPS_SHOWN]
    ]
    more = f'<p class="note">And {len(stats.drops) - _DROPS_SHOWN} reasons more.</p>' if len(stats.drops) > _DROPS_SHOWN else ""
    groups = "".join(f"<h3>{esc(reason)}</h3>{_pictures(some)}" for reason, some in pictures.items() if some)
    return f"{heading}{bar_list(bars)}{more}{groups}"


def _distributions(title: str, distributions: Sequence[Distribution], note: str) -> str:
    if not distributions:
        return ""
    charts = []
    for d in distributions:
        below = f"{d.lowest:.4g} to {d.highest:.4g}, median {d.median:.4g}" + (
            f"; not known of {d.unknown:,}" if d.unknown else ""
        )
        charts.append(histogram(d.name, edges=d.edges, kept=d.kept, dropped=d.dropped, unit=d.unit, note=below))
    return f'<h2>{esc(title)}</h2><section class="charts">{"".join(charts)}</section><p class="note">{esc(note)}</p>'


def _classes(stats: DataStats) -> str:
    return "".join(
        f"<h3>{esc(name)}</h3>{bar_list([Bar(label=label, value=count) for label, count in counts.items()])}"
        for name, counts in stats.classes.items()
    )


def _gallery(title: str, pictures: Sequence[Picture]) -> str:
    return f"<h2>{esc(title)}</h2>{_pictures(pictures)}" if pictures else ""


def _pictures(pictures: Sequence[Picture]) -> str:
    cards = [
        f'<figure class="clip"><img alt="{esc(p.title)}" src="data:image/jpeg;base64,{base64.b64encode(p.jpeg).decode()}">'
        f"<p>{esc(p.title)}</p><small>{esc(p.note)}</small></figure>"
        for p in pictures
    ]
    return f'<div class="clips">{"".join(cards)}</div>'
