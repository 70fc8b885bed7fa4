"""The learning rate as a pure function of the step."""

from __future__ import annotations

import math

from opensora_dist.config.train import OptimConfig


def learning_rate(step: int, config: OptimConfig, *, steps: int) -> float:
    """Learning rate of optimizer step ``step`` (from 0) of ``steps``: linear warm-up, then the schedule down to its floor."""
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    if config.schedule == "constant":
        return config.lr
    done = (step - config.warmup_steps) / max(1, steps - config.warmup_steps)
    left = 0.5 * (1 + math.cos(math.pi * done)) if config.schedule == "cosine" else 1 - done
    return config.lr * (config.min_lr_ratio + (1 - config.min_lr_ratio) * left)
