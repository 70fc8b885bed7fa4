"""The two frozen networks that stand between pixels, words and the diffusion model, as protocols.

They are here, below every room, because preparation, training and sampling all take one without caring which.
"""

# B batch, C latent channels, T H W pixels frames, height, width; t h w latent frames, height, width; E text width

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from opensora_dist.core.types import Thw


@dataclass(frozen=True, kw_only=True)
class LatentStats:
    """Per-channel mean and standard deviation of a codec's latents."""

    mean: tuple[float, ...]
    std: tuple[float, ...]


class VideoCodec(Protocol):
    """Pixels to latents and back. Latents are the codec's own, not yet normalised."""

    channels: int
    spatial_factor: int
    temporal_factor: int
    stats: LatentStats | None  # None: measured over the data set while it is prepared

    def latent_shape(self, clip: Thw) -> Thw:
        """Latent (t, h, w) of a clip of pixels (T, H, W).

        Raises:
            ConfigError: The codec can't take this clip shape; the message names shapes it can take.
        """
        ...

    def encode(self, frames_BTHW3: Tensor, *, generators: Sequence[torch.Generator] | None = None) -> Tensor:
        """uint8 [B, T, H, W, 3] to float32 latents [B, C, t, h, w].

        Args:
            generators: One per clip, for codecs that sample a posterior; None takes its mode.
        """
        ...

    def decode(self, latents_BCthw: Tensor) -> Tensor:
        """Latents [B, C, t, h, w] to uint8 frames [B, T, H, W, 3]."""
        ...


class TextEncoder(Protocol):
    """Captions to token vectors."""

    width: int
    max_tokens: int

    def encode(self, captions: Sequence[str]) -> list[Tensor]:
        """One float32 [tokens, width] per caption, valid tokens only, 1 <= tokens <= max_tokens (an empty caption has one)."""
        ...

    def num_cut(self) -> int:
        """How many captions were longer than ``max_tokens`` so far."""
        ...
