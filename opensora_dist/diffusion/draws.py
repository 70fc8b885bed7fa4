"""Everything random about a training batch, drawn by what is drawn: equal under every layout."""

# B batch, C latent channels, t h w latent frames, height, width of the region asked for

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from opensora_dist.core.types import Region, Thw
from opensora_dist.diffusion.base import Objective
from opensora_dist.parallel.keys import Keys


@dataclass(frozen=True, kw_only=True)
class Draws:
    """The draws of one micro-batch, on the CPU.

    Args:
        noise_BCthw: float32, of the region asked for.
        level_B: float64, as ``Objective`` defines it.
        drop_caption_B: bool, True where the sample is trained without its caption.
    """

    noise_BCthw: Tensor
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
    region: Region | None,
) -> Draws:
    """Draws noise, level and caption dropout of each sample.

    Args:
        samples: ``keys.sample_id`` of each sample.
        step: Global step.
        channels: Latent channels.
        latent: Latent shape of the whole samples.
        region: The latents to draw noise for, where a rank holds some only; None: all. Level and caption dropout are the sample's.
    """
    region = Region.whole(latent) if region is None else region
    levels = [objective.draw_level(keys, sample=s, step=step, latent=latent) for s in samples]
    drops = [_uniform(keys, sample=s, step=step) < objective.caption_dropout for s in samples]
    return Draws(
        noise_BCthw=draw_noise(keys, "noise", samples=samples, step=step, channels=channels, latent=latent, region=region),
        level_B=torch.tensor(levels, dtype=torch.float64),
        drop_caption_B=torch.tensor(drops, dtype=torch.bool),
    )


def draw_noise(
    keys: Keys, purpose: str, *, samples: Sequence[int], step: int, channels: int, latent: Thw, region: Region
) -> Tensor:
    """Standard normal noise of a region of each sample, float32 [B, C, t, h, w]: bitwise that part of the whole's.

    A frame is one draw, so where a region is some rows of a frame, all of it is drawn.
    """
    shape = (channels, latent.h, latent.w)
    noise = torch.stack([keys.normal_frames(purpose, s, step, frames=region.frames, shape=shape) for s in samples])
    return noise[..., region.h0 : region.h1, :].contiguous()


def _uniform(keys: Keys, *, sample: int, step: int) -> float:
    """In [0, 1)."""
    return float(torch.empty((), dtype=torch.float64).uniform_(generator=keys.generator("caption_dropout", sample, step)))
