"""Which frozen codec turns pixels into latents, and which text encoder turns captions into vectors."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from opensora_dist.config.base import Section


class DctCodecConfig(Section):
    """Training-free block DCT in YCbCr: needs no weights, so it works anywhere."""

    name: Literal["dct"] = "dct"
    channels: int = Field(16, ge=3, le=768, description="Coefficients kept per block, lowest frequencies first.")
    temporal_factor: Literal[1, 4] = Field(1, description="Frames per latent frame: 1, or 4 to transform time as well.")


class DiffusersCodecConfig(Section):
    """A diffusers autoencoder from a local folder or a hub name."""

    name: Literal["diffusers"] = "diffusers"
    path: str = Field("stabilityai/sd-vae-ft-ema", description="Folder holding config.json and *.safetensors, or a hub name.")
    dtype: Literal["float32", "bfloat16", "float16"] = Field("float32", description="Precision the codec computes in.")
    tile: bool = Field(False, description="Encode and decode in tiles: less memory, slight seams.")


CodecConfig = Annotated[DctCodecConfig | DiffusersCodecConfig, Field(discriminator="name")]


class HashTextConfig(Section):
    """Training-free text encoder: one fixed vector per word and per position."""

    name: Literal["hash"] = "hash"
    width: int = Field(64, ge=8, description="Size of each token vector.")
    max_tokens: int = Field(32, ge=1, description="Longest caption in tokens; longer ones are cut, and counted.")


class HfTextConfig(Section):
    """A text encoder of transformers (T5, UMT5, CLIP, ...) from a local folder or a hub name; safetensors only."""

    name: Literal["hf"] = "hf"
    path: str = Field("DeepFloyd/t5-v1_1-xxl", description="Folder or hub name with tokenizer and *.safetensors.")
    max_tokens: int = Field(120, ge=1, description="Longest caption in tokens; longer ones are cut, and counted.")
    dtype: Literal["float32", "bfloat16", "float16"] = Field("float32", description="Precision the encoder computes in.")


TextConfig = Annotated[HashTextConfig | HfTextConfig, Field(discriminator="name")]
