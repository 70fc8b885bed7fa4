"""From prompts to latents to pixels, the same way in validation, ``sample`` and ``evaluate``."""

# B batch, C latent channels, T H W latent frames, height, width, Y text tokens, E text width

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from opensora_dist.config.dataset import DatasetSpec
from opensora_dist.core.protocols import VideoCodec
from opensora_dist.core.types import Thw
from opensora_dist.core.video import Frames
from opensora_dist.diffusion.base import Objective
from opensora_dist.diffusion.samplers import sample_latents
from opensora_dist.parallel.keys import Keys, sample_id


@dataclass(frozen=True, kw_only=True)
class SamplingOptions:
    """How latents are drawn from a model.

    Args:
        sampler: One of ``diffusion.samplers``; None takes the objective's default.
        steps: Model evaluations, each of a doubled batch with guidance.
        cfg_scale: Classifier-free guidance; 1 turns it off.
        guided_channels: Leading latent channels that guidance applies to; None: all. Open-Sora 1.0 guides 3 of its 4.
    """

    sampler: str | None = None
    steps: int = 30
    cfg_scale: float = 3.0
    guided_channels: int | None = None


def pad_texts(texts: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Token vectors [tokens, E] of several captions as one [B, Y, E] with a mask [B, Y], True where a token is valid."""
    mask_BY = torch.zeros(len(texts), max(len(t) for t in texts), dtype=torch.bool)
    for row, text in zip(mask_BY, texts):
        row[: len(text)] = True
    return nn.utils.rnn.pad_sequence(list(texts), batch_first=True), mask_BY


def noise_ids(prompts: Sequence[str]) -> list[int]:
    """What the noise of each video is keyed by: its caption, and how often that came before, so that repeats differ."""
    return [sample_id(f"{list(prompts[:i]).count(p)}/{p}") for i, p in enumerate(prompts)]


def generate_latents(
    model: nn.Module,
    *,
    noise_ids: Sequence[int],
    texts: Sequence[Tensor],
    latent: Thw,
    spec: DatasetSpec,
    objective: Objective,
    options: SamplingOptions,
    keys: Keys,
    device: torch.device,
) -> Tensor:
    """Draws one latent video per caption. All noise is keyed by ``noise_ids``, so neither batch nor rank changes a video.

    Args:
        model: Called as ``VideoTransformer.forward``; the caller sets precision, eval mode and weights.
        noise_ids: One per video, as ``noise_ids`` gives them.
        texts: Token vectors of the captions, one [tokens, E] per video.
        latent: Latent frames, height, width.
    Returns:
        Normalised latents [B, C, T, H, W], on ``device``.
    """
    text_BYE, mask_BY = (t.to(device) for t in pad_texts(texts))
    shape = (spec.channels, latent.h, latent.w)
    noise = [keys.normal_frames("sampling", i, 0, frames=range(latent.t), shape=shape) for i in noise_ids]

    def model_fn(x_BCTHW: Tensor, timestep_B: Tensor, drop_caption_B: Tensor) -> Tensor:
        copies = len(x_BCTHW) // len(text_BYE)
        output = model(
            x_BCTHW, timestep_B, text_BYE.repeat(copies, 1, 1), mask_BY.repeat(copies, 1), drop_caption_B=drop_caption_B
        )
        assert isinstance(output, Tensor)
        return output

    return sample_latents(
        model_fn,
        objective=objective,
        sampler=options.sampler,
        steps=options.steps,
        cfg_scale=options.cfg_scale,
        noise_BCTHW=torch.stack(noise).to(device),
        latent=latent,
        guided_channels=options.guided_channels,
        generators=[keys.generator("sampler", i) for i in noise_ids],
    )


@torch.no_grad()
def to_frames(latents_BCTHW: Tensor, *, spec: DatasetSpec, codec: VideoCodec) -> list[Frames]:
    """Normalised latents to one uint8 [frames, height, width, 3] per video."""
    std, mean = (torch.tensor(v, device=latents_BCTHW.device).view(1, -1, 1, 1, 1) for v in (spec.latent_std, spec.latent_mean))
    # One video at a time: decoding many at once is what runs out of memory first.
    return [np.asarray(codec.decode(one[None].float() * std + mean)[0].cpu()) for one in latents_BCTHW]
