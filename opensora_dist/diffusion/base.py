"""What an objective is: how data is corrupted, what the model is told, and what its output is compared with."""

# B batch, C latent channels, T H W latent frames, height, width; a rank may hold some of the frames only

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from opensora_dist.core.types import Thw
from opensora_dist.parallel.keys import Keys


class Objective(Protocol):
    """One way to train a denoiser.

    A sample's *level* is the one number that says how noisy it is: the timestep for ``iddpm``, sigma for ``rectified_flow``.
    Levels are float64, so that a float64 run and a float32 run corrupt alike.
    """

    @property
    def name(self) -> str:
        """The name in the config."""
        ...

    @property
    def channel_multiplier(self) -> int:
        """The model's output channels over its input channels."""
        ...

    @property
    def caption_dropout(self) -> float:
        """Probability that a sample is trained without its caption, for classifier-free guidance."""
        ...

    def draw_level(self, keys: Keys, *, sample: int, step: int, latent: Thw) -> float:
        """The level of one sample at one step, keyed by both; ``latent`` is the whole sample's shape, also under sharding."""
        ...

    def corrupt(self, x0_BCTHW: Tensor, noise_BCTHW: Tensor, level_B: Tensor) -> Tensor:
        """The noisy latents [B, C, T, H, W] the model is shown, in the dtype of ``x0_BCTHW``."""
        ...

    def timestep(self, level_B: Tensor) -> Tensor:
        """What the model is given for these levels: float64 [B], between 0 and 1000."""
        ...

    def loss(self, output_BCTHW: Tensor, *, x0: Tensor, noise: Tensor, level_B: Tensor) -> Tensor:
        """The loss of each latent position: mean over channels, no reduction over anything else.

        Args:
            output_BCTHW: The model's output, [B, channel_multiplier * C, T, H, W].
            x0: Normalised latents, [B, C, T, H, W].
            noise: The noise they were corrupted with.
            level_B: The levels they were corrupted at.
        Returns:
            [B, T, H, W].
        """
        ...
