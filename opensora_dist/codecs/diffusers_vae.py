"""Autoencoders of diffusers as codecs: the image VAE of Open-Sora 1.0, and the causal video VAEs of today."""

# B batch, C latent channels, T H W pixel frames, height, width; t h w latent frames, height, width; N images or one clip

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import torch
from torch import Tensor

from opensora_dist.core.errors import ConfigError, WeightsError
from opensora_dist.core.logging import get_logger
from opensora_dist.core.protocols import LatentStats
from opensora_dist.core.registry import nearest
from opensora_dist.core.types import Thw

_log = get_logger(__name__)
_IMAGES_AT_ONCE = 16  # bounds the memory of a per-frame autoencoder on a long clip


@dataclass(frozen=True, kw_only=True)
class _Family:
    """What differs between autoencoders: how a config names its sizes, and which clip lengths come back whole.

    Args:
        video: Takes [N, 3, T, H, W]; an image autoencoder sees each frame for itself.
        spatial, temporal, channels: From the model's config.
        frame_step: Clips have ``1 + k * frame_step`` frames; a multiple of ``temporal``.
    """

    video: bool
    spatial: Callable[[Mapping[str, Any]], int]
    temporal: Callable[[Mapping[str, Any]], int]
    channels: Callable[[Mapping[str, Any]], int]
    frame_step: Callable[[Mapping[str, Any]], int]


# Closed: `_class_name` of a config.json picks a row here, never an attribute of a module.
_FAMILIES: dict[str, _Family] = {
    "AutoencoderKL": _Family(
        video=False,
        spatial=lambda c: 2 ** (len(c["block_out_channels"]) - 1),
        temporal=lambda c: 1,
        channels=lambda c: c["latent_channels"],
        frame_step=lambda c: 1,
    ),
    "AutoencoderDC": _Family(
        video=False,
        spatial=lambda c: 2 ** (len(c["encoder_block_out_channels"]) - 1),
        temporal=lambda c: 1,
        channels=lambda c: c["latent_channels"],
        frame_step=lambda c: 1,
    ),
    "AutoencoderKLWan": _Family(
        video=True,
        spatial=lambda c: c["scale_factor_spatial"],
        temporal=lambda c: c["scale_factor_temporal"],
        channels=lambda c: c["z_dim"],
        frame_step=lambda c: c["scale_factor_temporal"],
    ),
    "AutoencoderKLHunyuanVideo": _Family(
        video=True,
        spatial=lambda c: c["spatial_compression_ratio"],
        temporal=lambda c: c["temporal_compression_ratio"],
        channels=lambda c: c["latent_channels"],
        frame_step=lambda c: c["temporal_compression_ratio"],
    ),
    "AutoencoderKLCogVideoX": _Family(
        video=True,
        spatial=lambda c: 2 ** (len(c["block_out_channels"]) - 1),
        temporal=lambda c: int(c["temporal_compression_ratio"]),
        channels=lambda c: c["latent_channels"],
        # It decodes latent frames in pairs after the first, so an even number of latents comes back with frames too many.
        frame_step=lambda c: 2 * int(c["temporal_compression_ratio"]),
    ),
}


def _latent_stats(config: Mapping[str, Any], channels: int) -> LatentStats:
    """The affine map that the pipelines of diffusers apply before the diffusion model, as mean and std per channel."""
    scale = config.get("scaling_factor") or 1.0  # Wan has none
    shift = config.get("shift_factor") or 0.0
    mean = config.get("latents_mean") or [shift] * channels
    std = config.get("latents_std") or [1.0] * channels
    return LatentStats(mean=tuple(float(m) for m in mean), std=tuple(float(s) / scale for s in std))


def _locate(path: str) -> tuple[str, str | None]:
    """(folder or hub name, subfolder): a pipeline's folder holds its autoencoder in ``vae/``; a hub name may end in it."""
    folder = Path(path)
    if folder.is_dir():
        inner = not (folder / "config.json").is_file() and (folder / "vae" / "config.json").is_file()
        return path, "vae" if inner else None
    parts = path.split("/", 2)
    return ("/".join(parts[:2]), parts[2]) if len(parts) == 3 and not folder.is_absolute() else (path, None)


class DiffusersCodec:
    """A frozen autoencoder of diffusers, safetensors only.

    Clips are encoded and decoded one by one, so a clip's latents don't depend on what shares its batch.

    Args:
        path: Folder with config.json and *.safetensors (or a pipeline's folder with those in ``vae/``), or a hub name, to which
            a subfolder may be added ("owner/name/vae").
        dtype: Precision of the autoencoder.
        tile: Encode and decode in tiles.
        device: Where it runs.
    Raises:
        ConfigError: Its ``_class_name`` is none of the known autoencoders.
        WeightsError: Files are missing, not safetensors, or lack weights of the model.
    """

    stats: LatentStats | None

    def __init__(self, *, path: str, dtype: torch.dtype, tile: bool, device: torch.device) -> None:
        root, subfolder = _locate(path)
        options = {} if subfolder is None else {"subfolder": subfolder}
        try:
            name = str(diffusers.AutoencoderKL.load_config(root, **options).get("_class_name"))
        except (OSError, ValueError) as error:
            raise WeightsError(
                f"codec.path={path!r}: no config.json can be read there ({error}); give a folder saved by diffusers' "
                "save_pretrained, or a hub name this machine can reach"
            ) from error
        if name not in _FAMILIES:
            raise ConfigError(
                f"codec.path={path!r} holds a {name}, which is none of the known autoencoders: "
                f"{', '.join(sorted(_FAMILIES))}{nearest(name, _FAMILIES)}"
            )
        self._family = _FAMILIES[name]
        self._name = name
        self._model = _load(getattr(diffusers, name), path, root=root, options=options, dtype=dtype).to(device)
        if tile:
            self._model.enable_tiling()
        self._dtype, self._device = dtype, device
        config: Mapping[str, Any] = self._model.config
        self.channels = self._family.channels(config)
        self.spatial_factor = self._family.spatial(config)
        self.temporal_factor = self._family.temporal(config)
        self._frame_step = self._family.frame_step(config)
        self.stats = _latent_stats(config, self.channels)

    def latent_shape(self, clip: Thw) -> Thw:
        """Latent (t, h, w) of a clip of pixels (T, H, W).

        Raises:
            ConfigError: Height or width is no multiple of the spatial factor, or T is not 1 + k * step.
        """
        step, space = self._frame_step, self.spatial_factor
        if min(clip) < 1 or (clip.t - 1) % step or clip.h % space or clip.w % space:

            def fitting(rounded: Callable[[float], int]) -> Thw:
                return Thw(
                    1 + max(rounded((clip.t - 1) / step), 0) * step,
                    max(rounded(clip.h / space), 1) * space,
                    max(rounded(clip.w / space), 1) * space,
                )

            rule = f"frames must be 1 + k * {step}, " if step > 1 else ""
            raise ConfigError(
                f"clip {clip} (frames x height x width) doesn't fit {self._name}: {rule}height and width must be multiples of "
                f"{space}; use {fitting(math.floor)} or {fitting(math.ceil)}"
            )
        return Thw(1 + (clip.t - 1) // self.temporal_factor, clip.h // space, clip.w // space)

    @torch.no_grad()
    def encode(self, frames_BTHW3: Tensor, *, generators: Sequence[torch.Generator] | None = None) -> Tensor:
        """uint8 [B, T, H, W, 3] to float32 latents [B, C, t, h, w].

        Args:
            generators: One CPU generator per clip samples the posterior; None takes its mode. AutoencoderDC has no posterior.
        Raises:
            ConfigError: As ``latent_shape``.
        """
        assert generators is None or len(generators) == len(frames_BTHW3), "one generator per clip"
        self.latent_shape(Thw(*frames_BTHW3.shape[1:4]))
        clips = []
        for i, frames_THW3 in enumerate(frames_BTHW3):
            pixels = frames_THW3.to(self._device).to(self._dtype) / 127.5 - 1
            mean, std = self._posterior(pixels.permute(3, 0, 1, 2))
            if generators is not None and std is not None:
                # On the CPU in float32: CUDA's generators give other numbers than the CPU's.
                noise = torch.empty(mean.shape).normal_(generator=generators[i])
                mean = mean + std * noise.to(mean.device)
            clips.append(mean)
        return torch.stack(clips)

    @torch.no_grad()
    def decode(self, latents_BCthw: Tensor) -> Tensor:
        """Latents [B, C, t, h, w] to uint8 frames [B, T, H, W, 3]."""
        clips = []
        for latents_Cthw in latents_BCthw.to(self._device, self._dtype):
            inputs = self._inputs(latents_Cthw)
            pixels = self._join([self._model.decode(part).sample for part in inputs])
            clips.append(((pixels.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8).permute(1, 2, 3, 0))
        return torch.stack(clips)

    def _posterior(self, pixels_3THW: Tensor) -> tuple[Tensor, Tensor | None]:
        """Mean and std of one clip's latents, float32 [C, t, h, w]; std is None for an autoencoder without one."""
        outputs = [self._model.encode(part) for part in self._inputs(pixels_3THW)]
        if self._name == "AutoencoderDC":
            return self._join([out.latent for out in outputs]).float(), None
        means = self._join([out.latent_dist.mean for out in outputs])
        return means.float(), self._join([out.latent_dist.std for out in outputs]).float()

    def _inputs(self, clip_CTHW: Tensor) -> tuple[Tensor, ...]:
        """What the model takes for one clip: [1, C, T, H, W], or images [N, C, H, W] a few at a time."""
        return (clip_CTHW[None],) if self._family.video else torch.split(clip_CTHW.transpose(0, 1), _IMAGES_AT_ONCE)

    def _join(self, parts: list[Tensor]) -> Tensor:
        """The inverse of ``_inputs``."""
        return parts[0][0] if self._family.video else torch.cat(parts).transpose(0, 1)


def _load(cls: Any, path: str, *, root: str, options: Mapping[str, str], dtype: torch.dtype) -> Any:
    """The frozen model in eval mode.

    Raises:
        WeightsError: No safetensors file, or one that lacks weights or has them in other shapes.
    """
    try:
        model, found = cls.from_pretrained(root, use_safetensors=True, torch_dtype=dtype, output_loading_info=True, **options)
    except (OSError, ValueError, RuntimeError) as error:
        raise WeightsError(
            f"codec.path={path!r}: {cls.__name__} can't be loaded ({error}); "
            "the folder must hold *.safetensors that fit its config.json"
        ) from error
    if lacking := [*found["missing_keys"], *found["mismatched_keys"]]:
        raise WeightsError(
            f"codec.path={path!r}: the weights lack {len(lacking)} tensors of {cls.__name__}: "
            f"{', '.join(sorted(map(str, lacking))[:8])}{', ...' if len(lacking) > 8 else ''}; fetch the checkpoint again"
        )
    if found["unexpected_keys"]:
        _log.warning(
            "codec.path=%r: %d tensors belong to no part of %s and are not used",
            path,
            len(found["unexpected_keys"]),
            cls.__name__,
        )
    return model.eval().requires_grad_(False)
