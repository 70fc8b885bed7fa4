"""A video codec without weights: the orthonormal block DCT in YCbCr, truncated to its most energetic coefficients.

It needs no download, so everything can be trained and tested anywhere; its latents are linear in the pixels, so what a model
generates can be judged without a decoder's taste in between.
"""

# B batch, C latent channels, T H W pixel frames, height, width; t h w latent frames, height, width; P = factor * 8 * 8 * 3

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from opensora_dist.core.errors import ConfigError
from opensora_dist.core.protocols import LatentStats
from opensora_dist.core.types import Thw

BLOCK = 8

# BT.601 full range, as in JPEG. Rows Y, Cb, Cr; columns R, G, B.
_YCBCR = (
    (0.299, 0.587, 0.114),
    (-0.168735892, -0.331264108, 0.5),
    (0.5, -0.418687589, -0.081312411),
)


def coefficient_order(temporal_factor: int) -> list[tuple[int, int, int, int]]:
    """All coefficients (colour, k, u, v) of a block, most energetic first; ``channels=N`` keeps the first N.

    colour is 0 Y, 1 Cb, 2 Cr; k, u, v are the frequencies in time, height and width. The table is fixed by a prior, so that the
    channels of two data sets mean the same: energy falls with the squared zig-zag diagonal, 1 / (1 + u + v + k/2)^2, and chroma
    holds 2/7 of the luma energy at the same frequency. Ties go to the rounder frequency, then to luma. It gives whole diagonals
    at 3 (one colour per block), 5, 8, 12 and 16 channels (luma to diagonal 3, chroma to 1) for one frame per latent.

    The two constants were fitted to reconstructions of natural clips at one frame per latent (`benchmarks/codec.py`).
    The comparison is in integers, so the order is the same on every machine.
    """

    def rank(c: int, k: int, u: int, v: int) -> tuple[int, int]:
        return (7 if c else 2) * (2 + 2 * (u + v) + k) ** 2, u * u + v * v + k * k

    every = itertools.product(range(3), range(temporal_factor), range(BLOCK), range(BLOCK))
    return sorted(every, key=lambda i: (*rank(*i), *i))


def _dct_matrix(size: int) -> Tensor:
    """The orthonormal DCT-II, float64 [frequency, position]."""
    frequency, position = torch.arange(size, dtype=torch.float64)[:, None], torch.arange(size, dtype=torch.float64)
    matrix = torch.cos(math.pi / size * (position + 0.5) * frequency) * math.sqrt(2 / size)
    matrix[0] /= math.sqrt(2)
    return matrix


class DctCodec:
    """Blocks of ``temporal_factor`` x 8 x 8 pixels to ``channels`` DCT coefficients, and back.

    Pixels are scaled to [-1, 1] first. The transform of a block, colour included, is one matrix, so encoding and decoding are one
    matrix product each.

    Args:
        channels: Coefficients kept, the first of ``coefficient_order``; at most ``temporal_factor * 192``, which loses nothing.
        temporal_factor: Frames per latent frame, 1 or 4.
        device: Where latents are computed.
    Raises:
        ConfigError: More channels than a block has coefficients.
    """

    spatial_factor = BLOCK
    stats: LatentStats | None = None

    def __init__(self, *, channels: int, temporal_factor: int, device: torch.device) -> None:
        order = coefficient_order(temporal_factor)
        if not 1 <= channels <= len(order):
            raise ConfigError(
                f"codec.channels={channels} must be between 1 and {len(order)}, the coefficients of a block of "
                f"{temporal_factor}x{BLOCK}x{BLOCK} pixels; lower it, or set codec.temporal_factor=4"
            )
        self.channels = channels
        self.temporal_factor = temporal_factor
        self.device = device
        space, time = _dct_matrix(BLOCK), _dct_matrix(temporal_factor)
        colour = torch.tensor(_YCBCR, dtype=torch.float64)
        picks = torch.tensor(order[:channels]).T

        def basis(colours: Tensor) -> Tensor:
            """[channels, P]: kept rows of colours (x) time (x) height (x) width; P runs over (T, H, W, rgb) of a block."""
            whole = torch.einsum("cr,kt,uy,vx->ckuvtyxr", colours, time, space, space)
            return whole[tuple(picks)].flatten(1).float().to(device)

        self._analysis_CP = basis(colour)
        self._synthesis_CP = basis(torch.linalg.inv(colour).T)  # the DCT is orthonormal; the colour matrix is not

    def latent_shape(self, clip: Thw) -> Thw:
        """Latent (t, h, w) of a clip of pixels (T, H, W).

        Raises:
            ConfigError: Height or width is no multiple of 8, or T no multiple of the temporal factor.
        """
        unit = Thw(self.temporal_factor, BLOCK, BLOCK)
        if any(size < 1 or size % step for size, step in zip(clip, unit, strict=True)):
            down = Thw(*(max(size // step, 1) * step for size, step in zip(clip, unit, strict=True)))
            up = Thw(*(max(math.ceil(size / step), 1) * step for size, step in zip(clip, unit, strict=True)))
            raise ConfigError(
                f"clip {clip} (frames x height x width) doesn't fit codec.name=dct: frames must be a multiple of "
                f"codec.temporal_factor={unit.t}, height and width multiples of {BLOCK}; use {down} or {up}"
            )
        return Thw(clip.t // unit.t, clip.h // unit.h, clip.w // unit.w)

    @torch.no_grad()
    def encode(self, frames_BTHW3: Tensor, *, generators: Sequence[torch.Generator] | None = None) -> Tensor:
        """uint8 [B, T, H, W, 3] to float32 latents [B, C, t, h, w]. Draws nothing, so ``generators`` are not used.

        Raises:
            ConfigError: As ``latent_shape``.
        """
        batch, frames, height, width, _ = frames_BTHW3.shape
        t, h, w = self.latent_shape(Thw(frames, height, width))
        pixels = frames_BTHW3.to(self.device).float() / 127.5 - 1
        blocks = pixels.reshape(batch, t, self.temporal_factor, h, BLOCK, w, BLOCK, 3).permute(0, 1, 3, 5, 2, 4, 6, 7)
        return (blocks.reshape(batch, t, h, w, -1) @ self._analysis_CP.T).permute(0, 4, 1, 2, 3).contiguous()

    @torch.no_grad()
    def decode(self, latents_BCthw: Tensor) -> Tensor:
        """Latents [B, C, t, h, w] to uint8 frames [B, T, H, W, 3], clamped and rounded."""
        batch, _, t, h, w = latents_BCthw.shape
        blocks = latents_BCthw.to(self.device).float().permute(0, 2, 3, 4, 1) @ self._synthesis_CP
        blocks = blocks.reshape(batch, t, h, w, self.temporal_factor, BLOCK, BLOCK, 3).permute(0, 1, 4, 2, 5, 3, 6, 7)
        pixels = blocks.reshape(batch, t * self.temporal_factor, h * BLOCK, w * BLOCK, 3)
        return ((pixels + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
