"""From prompts to latents to pixels, the same way in validation, ``sample`` and ``evaluate``."""

# B batch, C latent channels, T H W latent frames, height, width; t, h: those of the region that this rank holds; Y text tokens,
# E text width

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from opensora_dist.config.dataset import DatasetSpec
from opensora_dist.core.protocols import VideoCodec
from opensora_dist.core.types import Region, Thw
from opensora_dist.core.video import Frames
from opensora_dist.diffusion.base import Objective
from opensora_dist.diffusion.draws import draw_noise
from opensora_dist.diffusion.samplers import sample_latents
from opensora_dist.parallel.keys import Keys, sample_id
from opensora_dist.parallel.sequence.base import Shard


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
    shard: Shard | None,
) -> Tensor:
    """Draws one latent video per caption. All noise is keyed by ``noise_ids``, so neither batch nor rank changes a video.

    Ranks that share the videos draw their parts side by side, and meet once at the end; collective among them.

    Args:
        model: Called as ``VideoTransformer.forward``; the caller sets precision, eval mode and weights.
        noise_ids: One per video, as ``noise_ids`` gives them.
        texts: Token vectors of the captions, one [tokens, E] per video.
        latent: Latent frames, height, width.
        shard: The tokens of each video that this rank holds; None: all.
    Returns:
        Normalised latents [B, C, T, H, W] of the whole videos, on ``device``, on every rank.
    """
    region = Region.whole(latent) if shard is None else _region(shard, latent=latent)
    text_BYE, mask_BY = (t.to(device) for t in pad_texts(texts))
    noise = draw_noise(keys, "sampling", samples=noise_ids, step=0, channels=spec.channels, latent=latent, region=region)

    def model_fn(x_BCthW: Tensor, timestep_B: Tensor, drop_caption_B: Tensor) -> Tensor:
        copies = len(x_BCthW) // len(text_BYE)
        output = model(
            x_BCthW,
            timestep_B,
            text_BYE.repeat(copies, 1, 1),
            mask_BY.repeat(copies, 1),
            drop_caption_B=drop_caption_B,
            shard=shard,
        )
        assert isinstance(output, Tensor)
        return output

    latents_BCthW = sample_latents(
        model_fn,
        objective=objective,
        sampler=options.sampler,
        steps=options.steps,
        cfg_scale=options.cfg_scale,
        noise_BCthW=noise.to(device),
        latent=latent,
        region=None if shard is None else region,
        guided_channels=options.guided_channels,
        generators=[keys.generator("sampler", i) for i in noise_ids],
    )
    return latents_BCthW if shard is None else gather_region(latents_BCthW, shard=shard)


def _region(shard: Shard, *, latent: Thw) -> Region:
    """The latents of a shard's tokens."""
    return shard.region.times(Thw(*(size // tokens for size, tokens in zip(latent, shard.grid, strict=True))))


def gather_region(latents_BCthW: Tensor, *, shard: Shard) -> Tensor:
    """Whole latents, on every rank that shares them, from the regions that each holds. Collective among them.

    Args:
        latents_BCthW: The latents of this rank's tokens; other ranks may hold more or fewer.
    """
    if shard.links is None:
        return latents_BCthW
    dim = 3 if shard.by_rows else 2
    size = list(latents_BCthW.shape)
    per_token = size[dim] // shard.sizes[shard.rank]
    parts = [latents_BCthW.new_empty([*size[:dim], tokens * per_token, *size[dim + 1 :]]) for tokens in shard.sizes]
    parts[shard.rank] = latents_BCthW.contiguous()
    shard.links.sp.gather(parts[shard.rank], parts=parts).wait()
    return torch.cat(parts, dim=dim)


@torch.no_grad()
def to_frames(latents_BCTHW: Tensor, *, spec: DatasetSpec, codec: VideoCodec) -> list[Frames]:
    """Normalised latents to one uint8 [frames, height, width, 3] per video."""
    std, mean = (torch.tensor(v, device=latents_BCTHW.device).view(1, -1, 1, 1, 1) for v in (spec.latent_std, spec.latent_mean))
    # One video at a time: decoding many at once is what runs out of memory first.
    return [np.asarray(codec.decode(one[None].float() * std + mean)[0].cpu()) for one in latents_BCTHW]
