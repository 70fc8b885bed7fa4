"""Scoring a checkpoint on toy prompts it has never seen: does the video show what the caption says?"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from opensora_dist.core.io import write_json
from opensora_dist.core.layout import EVALUATION_NAME
from opensora_dist.core.types import Thw
from opensora_dist.core.video import Frames, contact_sheet
from opensora_dist.prepare.toy.grammar import held_out_prompts
from opensora_dist.prepare.toy.score import ToyScore, ToySummary, score_video, summarise
from opensora_dist.recipes.sample import draw_videos, is_first, load_model, run_dir_of
from opensora_dist.train.generate import SamplingOptions

_SHEET_ROWS = 24


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """Rates over all videos, and where the details are."""

    summary: ToySummary
    result: Path
    contact_sheet: Path


def evaluate(
    checkpoint: Path,
    *,
    count: int,
    num_moves: tuple[int, ...],
    repeats: int,
    out: Path | None,
    clip: Thw | None,
    options: SamplingOptions,
    seed: int,
    batch: int,
    device: str,
    weights: str,
    on_progress: Callable[[int], None],
    scheme: str | None = None,
) -> Evaluation | None:
    """Draws ``count`` held-out toy captions and scores each by classical vision.

    All ranks that a launcher started draw each video together.

    Args:
        count: Captions.
        num_moves: Movements per caption to draw from.
        repeats: Videos per caption.
        out: Folder for ``evaluation.json`` and its contact sheet; None is the run directory.
        on_progress: Called with the number of videos done.
        scheme: How the ranks share a video; None as in ``sampling_sp``.
    Returns:
        None on ranks other than the first, which score and write nothing.
    """
    loaded = load_model(checkpoint, device=device, weights=weights)
    out = out or run_dir_of(loaded.folder)
    clip = clip or loaded.default_clip
    prompts = list(held_out_prompts(count, seed=seed, num_moves=num_moves)) * repeats
    began = time.perf_counter()
    scores: list[ToyScore] = []
    shown: list[Frames] = []
    with loaded.ranks(clip=clip, scheme=scheme) as shard:
        for prompt, frames in draw_videos(loaded, prompts, clip=clip, options=options, seed=seed, batch=batch, shard=shard):
            scores.append(score_video(frames, caption=prompt))
            if len(shown) < _SHEET_ROWS:
                shown.append(frames)
            on_progress(len(scores))
    if not is_first(shard):
        return None
    summary = summarise(scores)
    result: dict[str, Any] = {
        "rates": {name: rate for name, rate in asdict(summary).items() if name != "videos"},
        "videos": summary.videos,
        "checkpoint": loaded.folder.name,
        "weights": weights,
        "clip": str(clip),
        "sampling": asdict(options),
        "seed": seed,
        "seconds": round(time.perf_counter() - began, 1),
        "prompts": [{"prompt": p, **asdict(s), "direction": s.direction} for p, s in zip(prompts, scores, strict=True)],
    }
    write_json(out / EVALUATION_NAME, result)
    sheet = out / "evaluation.png"
    contact_sheet(sheet, shown, captions=prompts[: len(shown)])
    return Evaluation(summary=summary, result=out / EVALUATION_NAME, contact_sheet=sheet)
