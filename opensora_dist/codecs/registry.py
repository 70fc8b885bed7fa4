"""From a config section to a codec or a text encoder. Closed: a config names an entry, never a class.

Codecs of optional packages are imported on use, so that nobody needs diffusers or transformers for the training-free ones.
"""

from __future__ import annotations

from typing import assert_never

import torch

from opensora_dist.codecs.dct import DctCodec
from opensora_dist.codecs.text_hash import HashTextEncoder
from opensora_dist.config.codec import (
    CodecConfig,
    DctCodecConfig,
    DiffusersCodecConfig,
    HashTextConfig,
    HfTextConfig,
    TextConfig,
)
from opensora_dist.core.protocols import TextEncoder, VideoCodec


def build_codec(config: CodecConfig, *, device: torch.device) -> VideoCodec:
    """The video codec that ``config`` describes.

    Raises:
        ConfigError: Values don't fit together, an optional package is missing, or the checkpoint is of no known class.
        WeightsError: The checkpoint's files are missing or don't fit.
    """
    match config:
        case DctCodecConfig():
            return DctCodec(channels=config.channels, temporal_factor=config.temporal_factor, device=device)
        case DiffusersCodecConfig():
            from opensora_dist.codecs.diffusers_vae import DiffusersCodec

            return DiffusersCodec(path=config.path, dtype=getattr(torch, config.dtype), tile=config.tile, device=device)
        case _:
            assert_never(config)


def check_text_encoder(config: TextConfig) -> None:
    """Refuses a text encoder whose package isn't installed; loads nothing.

    Raises:
        ConfigError: Saying what to install.
    """
    if isinstance(config, HfTextConfig):
        from opensora_dist.codecs.text_hf import require_transformers

        require_transformers()


def build_text_encoder(config: TextConfig, *, device: torch.device) -> TextEncoder:
    """The text encoder that ``config`` describes.

    Raises:
        ConfigError: An optional package is missing.
        WeightsError: The checkpoint's files are missing or don't fit.
    """
    match config:
        case HashTextConfig():
            return HashTextEncoder(width=config.width, max_tokens=config.max_tokens, device=device)
        case HfTextConfig():
            from opensora_dist.codecs.text_hf import HfTextEncoder

            return HfTextEncoder(
                path=config.path, max_tokens=config.max_tokens, dtype=getattr(torch, config.dtype), device=device
            )
        case _:
            assert_never(config)
