"""What training and using a model of Sora's size would take: Factorial Funds' estimate, each of its assumptions a parameter.

Source: "Under the hood: how OpenAI's Sora model works", Factorial Funds, March 2024, whose published ends these defaults give.
"""

from __future__ import annotations

from dataclasses import dataclass

_MONTH_S = 30 * 24 * 3600
_HOUR_S = 3600


@dataclass(frozen=True, kw_only=True)
class SoraAssumptions:
    """
    Args:
        base_train_flops: To train DiT-XL, as published; those "GFLOPs" look like multiply-adds, so that real FLOPs are about twice.
        base_forward_flops: Of one step of drawing one image with DiT-XL.
        size: Parameters, over DiT-XL's 675 million: 20 billion.
        data: Training images and videos, over DiT-XL's.
        frames: Latent frames of a video: a minute at 24 per second, at 1/8 of the rate.
        images: Of these FLOPs for video, what is saved as half of all samples are images.
        steps: Of drawing.
        gpu_flops_per_s: H100's peak in bf16.
        use: Of that peak; the published figures have all of it, where 0.4 is usual.
    """

    base_train_flops: float = 1e21
    base_forward_flops: float = 524e9
    size: float = 30.0
    data: float = 4.0
    frames: int = 180
    images: float = 0.5
    steps: int = 250
    gpu_flops_per_s: float = 989.5e12
    use: float = 1.0

    @property
    def train_flops(self) -> float:
        """Of a whole training."""
        return self.base_train_flops * self.size * self.data * self.frames * self.images

    @property
    def train_gpu_months(self) -> float:
        """Months of one GPU."""
        return self.train_flops / (self.gpu_flops_per_s * self.use) / _MONTH_S

    @property
    def flops_per_minute(self) -> float:
        """To draw a video of a minute."""
        return self.base_forward_flops * self.size * self.frames * self.steps

    @property
    def minutes_per_gpu_hour(self) -> float:
        """Of video that a GPU draws."""
        return self.gpu_flops_per_s * self.use * _HOUR_S / self.flops_per_minute

    @property
    def break_even_minutes(self) -> float:
        """Of video, from which on drawing has taken more than training."""
        return self.train_flops / self.flops_per_minute
