"""Schema of ``opensora-dist data prepare``: raw captioned video to latent shards."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from opensora_dist.config.base import Section
from opensora_dist.config.codec import CodecConfig, DctCodecConfig, HashTextConfig, TextConfig


class InputConfig(Section):
    """Where the videos and captions are."""

    path: str | None = Field(None, description="Folder of videos; captions in metadata.parquet, metadata.csv or a .txt per clip.")


class OutputConfig(Section):
    """Where the shards go."""

    path: str | None = Field(None, description="Folder for the tar shards and the index.")
    shard_samples: int = Field(256, ge=1, description="Samples per tar shard.")
    dtype: Literal["float16", "float32"] = Field("float16", description="Stored precision of latents and text vectors.")


class ClipConfig(Section):
    """How a clip is cut out of a video."""

    fps: float = Field(8.0, gt=0, description="Frames per second after sampling.")
    buckets: tuple[tuple[int, int, int], ...] = Field(
        ((16, 64, 64),), min_length=1, description="Allowed clip shapes [frames, height, width] in pixels."
    )


class PrepareConfig(Section):
    """The whole preparation."""

    input: InputConfig = InputConfig()
    output: OutputConfig = OutputConfig()
    clip: ClipConfig = ClipConfig()
    codec: CodecConfig = DctCodecConfig()
    text: TextConfig = HashTextConfig()
    workers: int = Field(1, ge=1, description="Processes that decode video.")
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="Where codec and text encoder run.")
    seed: int = Field(0, ge=0, description="Keys a sampling codec's posterior; a training-free one draws nothing.")
