"""What a prepared data set is made of: the contract between preparation, training and sampling.

It travels in the index of the data set and in every checkpoint, so that a checkpoint can be sampled from without the data.
"""

from __future__ import annotations

from pydantic import Field

from opensora_dist.config.base import Section
from opensora_dist.config.codec import CodecConfig, TextConfig


class DatasetSpec(Section):
    """Codec, text encoder and latent statistics of a data set."""

    codec: CodecConfig
    text: TextConfig
    channels: int = Field(ge=1, description="Latent channels.")
    spatial_factor: int = Field(ge=1, description="Pixels per latent, in height and width.")
    temporal_factor: int = Field(ge=1, description="Frames per latent frame.")
    text_width: int = Field(ge=1, description="Size of a text token vector.")
    max_tokens: int = Field(ge=1, description="Longest caption in tokens.")
    latent_mean: tuple[float, ...] = Field(description="Per channel; the model sees (latent - mean) / std.")
    latent_std: tuple[float, ...] = Field(description="Per channel; all positive.")
    fps: float = Field(gt=0, description="Frames per second of the clips.")
    buckets: tuple[tuple[int, int, int], ...] = Field(
        min_length=1, description="Clip shapes [frames, height, width] that have samples, the one with most first."
    )
