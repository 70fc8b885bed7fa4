"""Everything random about a training batch, drawn by what is drawn: equal under every layout."""

# B batch, C latent channels, T H W latent frames (those asked for), height, width

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from opensora_dist.core.types import Thw
from opensora_dist.diffusion.base import Objective
from opensora_dist.parallel.keys import Keys


@dataclass(frozen=True, kw_only=True)
class Draws:
    """The draws of one micro-batch, on the CPU.

    Args:
        noise_BCTHW: float32.
        level_B: float64, as ``Objective`` defines it.
        drop_caption_B: bool, True where the sample is trained without its caption.
    """

    noise_BCTHW: Tensor
    level_B: Tensor
    drop_caption_B: Tensor


def draw(
    keys: Keys,
    objective: Objective,
    *,
    samples: Sequence[int],
    step: int,
    channels: int,
    latent: Thw,
    frames: Sequence[int] | None = None,
) -> Draws:
    """Draws noise, level and caption dropout of each sample.

    Args:
        samples: ``keys.sample_id`` of each sample.
        step: Global step.
        channels: Latent channels.
        latent: Latent shape of the whole samples.
        frames: Latent frames to draw noise for, where a rank owns some only; default all.
    """
    frames = range(latent.t) if frames is None else frames
    shape = (channels, latent.h, latent.w)
    levels = [objective.draw_level(keys, sample=s, step=step, latent=latent) for s in samples]
    drops = [_uniform(keys, sample=s, step=step) < objective.caption_dropout for s in samples]
    return Draws(
        noise_BCTHW=torch.stack([keys.normal_frames("noise", s, step, frames=frames, shape=shape) for s in samples]),
        level_B=torch.tensor(levels, dtype=torch.float64),
        drop_caption_B=torch.tensor(drops, dtype=torch.bool),
    )


def _uniform(keys: Keys, *, sample: int, step: int) -> float:
    """In [0, 1)."""
    return float(torch.empty((), dtype=torch.float64).uniform_(generator=keys.generator("caption_dropout", sample, step)))
