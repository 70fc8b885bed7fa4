"""Rectified flow: straight paths from data to noise, along which the model predicts data minus noise.

Sources: rectified flow, arXiv 2209.03003; logit-normal levels and the resolution shift, arXiv 2403.03206; the shifts of
Open-Sora 1.2 and 2.0 as their public code has them.
"""

# B batch, C latent channels, T H W latent frames, height, width

from __future__ import annotations

import math

import torch
from torch import Tensor

from opensora_dist.config.train import RectifiedFlowConfig
from opensora_dist.core.types import Thw
from opensora_dist.parallel.keys import Keys

TIMESTEP_SCALE = 1000.0
_BASE_PIXELS = 512**2
_LINE = ((256.0, 1.0), (4096.0, 3.0))  # (spatial tokens, ratio) at both ends of shift=token_line
_LINE_TOKEN_LATENTS = 4  # a token of that line covers 2 x 2 latents, whatever the model's own patch


def shift_sigma(sigma: float, ratio: float) -> float:
    """Moves a noise level towards noise (ratio > 1) or data (ratio < 1); 0 and 1 stay."""
    return ratio * sigma / (1 + (ratio - 1) * sigma)


class RectifiedFlow:
    """Objective ``rectified_flow``: x_t = (1 - sigma) x0 + sigma noise, target x0 - noise; a level is sigma, in (0, 1).

    Args:
        config: The objective's section.
        spatial_factor: Pixels per latent of the codec; shift=resolution_frames is defined on pixels.
    """

    name = "rectified_flow"
    channel_multiplier = 1

    def __init__(self, config: RectifiedFlowConfig, *, spatial_factor: int) -> None:
        self.caption_dropout = config.caption_dropout
        self.config = config
        self.spatial_factor = spatial_factor

    def shift_ratio(self, latent: Thw) -> float:
        """The ratio r by which the levels of a sample of this latent shape are shifted, in training and in sampling.

        ``resolution_frames``: sqrt(H W / 512^2) sqrt(latent frames), H and W in pixels. ``token_line``: the line through 1 at 256
        and 3 at 4096 spatial tokens, a token being 2 x 2 latents, held at 1 and 3 outside: extended, it would reach 0.
        """
        match self.config.shift:
            case "none":
                return 1.0
            case "constant":
                return self.config.shift_value
            case "resolution_frames":
                pixels = latent.h * latent.w * self.spatial_factor**2
                return math.sqrt(pixels / _BASE_PIXELS) * math.sqrt(latent.t)
            case "token_line":
                (low, low_ratio), (high, high_ratio) = _LINE
                tokens = min(max(latent.h * latent.w / _LINE_TOKEN_LATENTS, low), high)
                return low_ratio + (high_ratio - low_ratio) * (tokens - low) / (high - low)

    def draw_level(self, keys: Keys, *, sample: int, step: int, latent: Thw) -> float:
        """A sigma, logit-normal and then shifted."""
        draw = torch.empty((), dtype=torch.float64)
        draw.normal_(self.config.logit_mean, self.config.logit_std, generator=keys.generator("sigma", sample, step))
        return shift_sigma(float(draw.sigmoid()), self.shift_ratio(latent))

    def corrupt(self, x0_BCTHW: Tensor, noise_BCTHW: Tensor, level_B: Tensor) -> Tensor:
        """(1 - sigma) x0 + sigma noise."""
        sigma = level_B.view(-1, 1, 1, 1, 1)
        return (1 - sigma).to(x0_BCTHW.dtype) * x0_BCTHW + sigma.to(x0_BCTHW.dtype) * noise_BCTHW

    def timestep(self, level_B: Tensor) -> Tensor:
        """1000 sigma."""
        return TIMESTEP_SCALE * level_B

    def loss(self, output_BCTHW: Tensor, *, x0: Tensor, noise: Tensor, level_B: Tensor) -> Tensor:
        """Squared error of the velocity, [B, T, H, W]."""
        return ((output_BCTHW - (x0 - noise)) ** 2).mean(dim=1)
