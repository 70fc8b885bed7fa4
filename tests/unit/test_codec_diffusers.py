"""Checkpoints are tiny and random, but saved by diffusers itself, so the loading code is the real one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from opensora_dist.codecs.diffusers_vae import DiffusersCodec
from opensora_dist.codecs.registry import build_codec
from opensora_dist.config.codec import DiffusersCodecConfig
from opensora_dist.core.errors import ConfigError, WeightsError
from opensora_dist.core.protocols import LatentStats
from opensora_dist.core.types import Thw
from opensora_dist.parallel.keys import Keys

CPU = torch.device("cpu")
FOUR = (8, 8, 8, 8)
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "kl": (
        "AutoencoderKL",
        dict(
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            block_out_channels=(8, 8),
            norm_num_groups=4,
            latent_channels=4,
            shift_factor=0.5,
            scaling_factor=0.25,
        ),
    ),
    "dc": (
        "AutoencoderDC",
        dict(
            latent_channels=4,
            attention_head_dim=4,
            encoder_block_types=("ResBlock", "ResBlock"),
            decoder_block_types=("ResBlock", "ResBlock"),
            encoder_block_out_channels=(8, 8),
            decoder_block_out_channels=(8, 8),
            encoder_layers_per_block=(1, 1),
            decoder_layers_per_block=(1, 1),
            encoder_qkv_multiscales=((), ()),
            decoder_qkv_multiscales=((), ()),
            scaling_factor=0.5,
        ),
    ),
    "wan": (
        "AutoencoderKLWan",
        dict(
            base_dim=4,
            z_dim=3,
            dim_mult=[1, 1, 1, 1],
            num_res_blocks=1,
            latents_mean=[0.1, 0.2, 0.3],
            latents_std=[1.0, 2.0, 3.0],
        ),
    ),
    "hunyuan": (
        "AutoencoderKLHunyuanVideo",
        dict(latent_channels=4, block_out_channels=FOUR, layers_per_block=1, norm_num_groups=4, scaling_factor=0.5),
    ),
    "cogvideox": (
        "AutoencoderKLCogVideoX",
        dict(latent_channels=4, block_out_channels=FOUR, layers_per_block=1, norm_num_groups=2, scaling_factor=0.5),
    ),
}


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folders = {}
    for name, (cls, options) in MODELS.items():
        torch.manual_seed(0)
        folders[name] = tmp_path_factory.mktemp(name)
        getattr(diffusers, cls)(**options).save_pretrained(folders[name])
    return folders


def load(path: Path, **options: Any) -> DiffusersCodec:
    codec = build_codec(DiffusersCodecConfig(path=str(path), **options), device=CPU)
    assert isinstance(codec, DiffusersCodec)
    return codec


def noise_clip(*shape: int) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8))


@pytest.mark.parametrize("frames", [1, 9])
@pytest.mark.parametrize("name", MODELS)
def test_encode_agrees_with_latent_shape_and_decode_gives_the_clip_shape(
    checkpoints: dict[str, Path], name: str, frames: int
) -> None:
    codec = load(checkpoints[name])
    clip = noise_clip(2, frames, 16, 32, 3)
    latents = codec.encode(clip)
    assert latents.dtype == torch.float32
    assert latents.shape == (2, codec.channels, *codec.latent_shape(Thw(frames, 16, 32)))
    decoded = codec.decode(latents)
    assert decoded.dtype == torch.uint8
    assert decoded.shape == clip.shape


@pytest.mark.parametrize("name", MODELS)
def test_a_clip_does_not_depend_on_its_batch(checkpoints: dict[str, Path], name: str) -> None:
    codec = load(checkpoints[name])
    clips = noise_clip(2, 9, 16, 16, 3)
    assert torch.equal(codec.encode(clips)[1:], codec.encode(clips[1:]))


@pytest.mark.parametrize("name", ["kl", "dc"])
def test_image_autoencoders_see_each_frame_for_itself(checkpoints: dict[str, Path], name: str) -> None:
    codec = load(checkpoints[name])
    clip = noise_clip(1, 19, 8, 8, 3)  # more frames than are encoded at once
    latents = codec.encode(clip)
    alone = torch.cat([codec.encode(clip[:, i : i + 1]) for i in range(19)], dim=2)
    torch.testing.assert_close(latents, alone)
    assert torch.equal(
        codec.decode(latents).shape == clip.shape and codec.decode(latents)[:, :1], codec.decode(latents[:, :, :1])
    )


@pytest.mark.parametrize(
    "name, spatial, temporal, channels",
    [("kl", 2, 1, 4), ("dc", 2, 1, 4), ("wan", 8, 4, 3), ("hunyuan", 8, 4, 4), ("cogvideox", 8, 4, 4)],
)
def test_factors_come_from_the_config(
    checkpoints: dict[str, Path], name: str, spatial: int, temporal: int, channels: int
) -> None:
    codec = load(checkpoints[name])
    assert (codec.spatial_factor, codec.temporal_factor, codec.channels) == (spatial, temporal, channels)


@pytest.mark.parametrize(
    "name, stats",
    [
        ("kl", LatentStats(mean=(0.5,) * 4, std=(4.0,) * 4)),
        ("dc", LatentStats(mean=(0.0,) * 4, std=(2.0,) * 4)),
        ("wan", LatentStats(mean=(0.1, 0.2, 0.3), std=(1.0, 2.0, 3.0))),
        ("hunyuan", LatentStats(mean=(0.0,) * 4, std=(2.0,) * 4)),
        ("cogvideox", LatentStats(mean=(0.0,) * 4, std=(2.0,) * 4)),
    ],
)
def test_scaling_and_shift_become_mean_and_std(checkpoints: dict[str, Path], name: str, stats: LatentStats) -> None:
    assert load(checkpoints[name]).stats == stats


@pytest.mark.parametrize("name", ["kl", "wan"])
def test_posterior_is_sampled_by_the_clips_own_generator(checkpoints: dict[str, Path], name: str) -> None:
    codec = load(checkpoints[name])
    clips, keys = noise_clip(2, 5, 16, 16, 3), Keys(1)
    both = codec.encode(clips, generators=[keys.generator("posterior", s) for s in (7, 8)])
    second = codec.encode(clips[1:], generators=[keys.generator("posterior", 8)])
    assert torch.equal(both[1:], second)
    assert not torch.equal(both, codec.encode(clips))
    assert torch.equal(codec.encode(clips), codec.encode(clips))


def test_posterior_has_the_models_mean_and_std(checkpoints: dict[str, Path]) -> None:
    codec = load(checkpoints["kl"])
    clip = noise_clip(1, 1, 16, 16, 3)
    drawn = torch.cat([codec.encode(clip, generators=[Keys(0).generator("posterior", i)]) for i in range(400)])
    model = diffusers.AutoencoderKL.from_pretrained(checkpoints["kl"])
    with torch.no_grad():
        wanted = model.encode(clip[0].permute(0, 3, 1, 2) / 127.5 - 1).latent_dist
    torch.testing.assert_close(drawn.std(0)[:, 0], wanted.std[0], rtol=0.25, atol=0.02)
    torch.testing.assert_close(drawn.mean(0)[:, 0], wanted.mean[0], rtol=0, atol=float(wanted.std.max()) * 0.25)


@pytest.mark.parametrize(
    "name, clip, named",
    [
        ("wan", Thw(16, 64, 64), "use 13x64x64 or 17x64x64"),
        ("hunyuan", Thw(8, 60, 64), "use 5x56x64 or 9x64x64"),
        ("cogvideox", Thw(13, 64, 64), "use 9x64x64 or 17x64x64"),
        ("kl", Thw(4, 65, 64), "use 4x64x64 or 4x66x64"),
    ],
)
def test_a_shape_that_does_not_fit_names_shapes_that_do(checkpoints: dict[str, Path], name: str, clip: Thw, named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        load(checkpoints[name]).latent_shape(clip)


def test_model_is_frozen_and_computes_in_the_dtype_asked_for(checkpoints: dict[str, Path]) -> None:
    codec = load(checkpoints["kl"], dtype="bfloat16", tile=True)
    assert not codec._model.training
    assert all(not p.requires_grad and p.dtype == torch.bfloat16 for p in codec._model.parameters())
    assert codec.encode(noise_clip(1, 1, 16, 16, 3)).dtype == torch.float32


def test_a_pipelines_folder_is_found_by_its_vae(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "vae").symlink_to(checkpoints["kl"])
    assert load(tmp_path).channels == 4


def test_an_unknown_class_is_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"_class_name": "AutoencoderOobleck"}))
    with pytest.raises(ConfigError, match=r"AutoencoderOobleck.*AutoencoderKLWan"):
        load(tmp_path)


def test_a_missing_folder_is_a_weights_error(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match=r"codec\.path"):
        load(tmp_path / "absent")


def test_pickled_weights_are_not_read(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes((checkpoints["kl"] / "config.json").read_bytes())
    torch.save(load_file(checkpoints["kl"] / "diffusion_pytorch_model.safetensors"), tmp_path / "diffusion_pytorch_model.bin")
    with pytest.raises(WeightsError, match="safetensors"):
        load(tmp_path)


def test_a_lacking_tensor_is_named(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    weights = load_file(checkpoints["kl"] / "diffusion_pytorch_model.safetensors")
    weights.pop("decoder.conv_in.weight")
    save_file(weights, tmp_path / "diffusion_pytorch_model.safetensors")
    (tmp_path / "config.json").write_bytes((checkpoints["kl"] / "config.json").read_bytes())
    with pytest.raises(WeightsError, match=r"decoder\.conv_in\.weight"):
        load(tmp_path)
