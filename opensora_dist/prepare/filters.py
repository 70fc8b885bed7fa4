"""Which clips are dropped for what was measured of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from opensora_dist.config.prepare import FilterConfig


def dropped_by(scores: Mapping[str, Any], config: FilterConfig) -> str | None:
    """The first reason to drop a clip, in the order of the filter's fields, with score, value and threshold; None keeps it.

    What isn't measured yet, or can't be of such a clip (the motion of an image), is no reason. Duplicates are a matter of the whole set:
    ``duplicates.near_duplicates``.

    Args:
        scores: What is known: scores by name, ``duration_s`` in seconds, ``min_side`` in pixels of the video.
        config: The thresholds; those that are None are not asked.
    """
    for field in type(config).model_fields:
        threshold = getattr(config, field)
        if threshold is None or field not in _RULES:
            continue
        score, rule = _RULES[field]
        value = scores.get(score)
        if value is not None and (reason := rule(score, value, f"filter.{field}", threshold)) is not None:
            return reason
    return None


def _lowest(score: str, value: float, field: str, threshold: float) -> str | None:
    return f"{score}={value:.4g} is below {field}={threshold:g}" if value < threshold else None


def _highest(score: str, value: float, field: str, threshold: float) -> str | None:
    return f"{score}={value:.4g} is above {field}={threshold:g}" if value > threshold else None


def _within(score: str, value: float, field: str, threshold: tuple[float | None, float | None]) -> str | None:
    lowest, highest = threshold
    if lowest is not None and value < lowest:
        return f"{score}={value:.4g} is below {field}[0]={lowest:g}"
    if highest is not None and value > highest:
        return f"{score}={value:.4g} is above {field}[1]={highest:g}"
    return None


def _one_of(score: str, value: str, field: str, threshold: tuple[str, ...]) -> str | None:
    return f"{score}={value!r} is not in {field}={list(threshold)}" if value not in threshold else None


_RULES: dict[str, tuple[str, Callable[[str, Any, str, Any], str | None]]] = {  # field of the filter: score, rule
    "min_s": ("duration_s", _lowest),
    "min_side": ("min_side", _lowest),
    "brightness": ("brightness", _within),
    "static": ("static", _highest),
    "sharpness": ("sharpness", _lowest),
    "motion": ("motion", _within),
    "text_area": ("text_area", _highest),
    "compression": ("compression", _lowest),
    "camera": ("camera", _one_of),
    "aesthetic": ("aesthetic", _lowest),
    "match": ("match", _lowest),
}
