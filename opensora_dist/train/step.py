"""One optimizer step: what is drawn, what is lost, what is summed."""

# B batch, C latent channels, t h w latent frames, height, width of the part of the samples that this rank holds

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from opensora_dist.core.types import Thw
from opensora_dist.data.loader import MicroBatch, StepData
from opensora_dist.diffusion.base import Objective
from opensora_dist.diffusion.draws import Draws, draw
from opensora_dist.parallel.keys import Keys
from opensora_dist.parallel.recompute import tiled
from opensora_dist.parallel.sequence.base import Shard
from opensora_dist.parallel.zero.base import ZeroBackend


@dataclass(frozen=True, kw_only=True)
class TiledLoss:
    """An objective whose loss looks at some latent positions at a time, and again at those in backward.

    Args:
        of: The objective.
        positions: Latent positions of a tile, those of all samples counted together.
    """

    of: Objective
    positions: int

    @property
    def name(self) -> str:
        return self.of.name

    @property
    def channel_multiplier(self) -> int:
        return self.of.channel_multiplier

    @property
    def caption_dropout(self) -> float:
        return self.of.caption_dropout

    def draw_level(self, keys: Keys, *, sample: int, step: int, latent: Thw) -> float:
        return self.of.draw_level(keys, sample=sample, step=step, latent=latent)

    def corrupt(self, x0_BCTHW: Tensor, noise_BCTHW: Tensor, level_B: Tensor) -> Tensor:
        return self.of.corrupt(x0_BCTHW, noise_BCTHW, level_B)

    def timestep(self, level_B: Tensor) -> Tensor:
        return self.of.timestep(level_B)

    def loss(self, output_BCTHW: Tensor, *, x0: Tensor, noise: Tensor, level_B: Tensor) -> Tensor:
        """The objective's, of each position by itself, [B, T, H, W]."""

        def of_positions(*parts_BC11L: Tensor) -> Tensor:
            output, x0, noise = parts_BC11L
            return self.of.loss(output, x0=x0, noise=noise, level_B=level_B)[:, None]

        wholes_BC11L = (tensor.flatten(2)[:, :, None, None] for tensor in (output_BCTHW, x0, noise))
        loss_B111L = tiled(of_positions, *wholes_BC11L, dim=-1, size=max(1, self.positions // len(x0)))
        return loss_B111L.view(len(x0), *x0.shape[2:])


@dataclass(frozen=True, kw_only=True)
class StepResult:
    """What a step leaves on the device, read at log steps only.

    Args:
        loss: This rank's share of the global weighted loss; the sum over ranks is the loss.
        grad_norm: Global gradient norm before clipping.
        skipped: 1.0 where the norm was not finite and no weight moved.
    """

    loss: Tensor
    grad_norm: Tensor
    skipped: Tensor


def micro_loss(
    model: nn.Module,
    parts: Sequence[MicroBatch],
    *,
    objective: Objective,
    keys: Keys,
    step: int,
    shards: Sequence[Shard | None],
) -> Tensor:
    """The weighted loss sum of what is run at once: this rank's share, to be summed over ranks and micro-batches as it is.

    Args:
        parts: One micro-batch; several, each of another shape, are packed into one sequence.
        shards: The tokens of each one's samples that this rank holds, those of its ``region``; None: all.
    """
    draws = [
        draw(keys, objective, samples=m.samples, step=step, channels=m.latents_BCthw.shape[1], latent=m.latent, region=m.region)
        for m in parts
    ]
    return weighted_loss(model, parts, draws, objective=objective, shards=shards)


def weighted_loss(
    model: nn.Module,
    parts: Sequence[MicroBatch],
    draws: Sequence[Draws],
    *,
    objective: Objective,
    shards: Sequence[Shard | None],
) -> Tensor:
    """``micro_loss`` of what has been drawn; works on fake tensors, too, which no number can be drawn of."""
    drawn = [_on_device(d, like=m.latents_BCthw) for m, d in zip(parts, draws, strict=True)]
    noised = [objective.corrupt(m.latents_BCthw, d.noise_BCthw, d.level_B) for m, d in zip(parts, drawn, strict=True)]
    packed = len(parts) > 1
    outputs = model(
        noised if packed else noised[0],
        objective.timestep(torch.cat([d.level_B for d in drawn])),
        torch.cat([m.text_BYE for m in parts]),
        torch.cat([m.text_mask_BY for m in parts]),
        drop_caption_B=torch.cat([d.drop_caption_B for d in drawn]),
        shard=shards if packed else shards[0],
    )
    losses = []
    for micro, d, output in zip(parts, drawn, outputs if packed else [outputs], strict=True):
        loss_Bthw = objective.loss(output, x0=micro.latents_BCthw, noise=d.noise_BCthw, level_B=d.level_B)
        losses.append((loss_Bthw.sum(dim=(1, 2, 3)) * micro.weight_B.to(loss_Bthw)).sum())
    return torch.stack(losses).sum()


def _on_device(draws: Draws, *, like: Tensor) -> Draws:
    """Where the latents are, and noise in their precision."""
    noise, level_B, drop_caption_B = (
        _to_device(t, like.device) for t in (draws.noise_BCthw, draws.level_B, draws.drop_caption_B)
    )
    return Draws(noise_BCthw=noise.to(like.dtype), level_B=level_B, drop_caption_B=drop_caption_B)


def _to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """To the device without waiting for it: a copy from pageable memory would make the host wait for the step before.

    torch keeps pinned memory, and gives a piece out again once the copies from it are over: in a running training none is made anew.
    """
    return tensor if device.type == "cpu" else tensor.pin_memory().to(device, non_blocking=True)


def train_step(
    backend: ZeroBackend,
    data: StepData,
    *,
    objective: Objective,
    keys: Keys,
    shards: Callable[[Thw], Shard],
    agree: Callable[[Sequence[MicroBatch]], list[MicroBatch]],
    lr: float,
    clip_norm: float,
) -> StepResult:
    """Forward and backward over the micro-batches, clip once, one optimizer step.

    Args:
        shards: This rank's part of samples of a latent shape.
        agree: Called before each forward with what is run at once: fails where the ranks that share its samples hold other ones than
            this rank; returns what is to be run, which replaces the micro-batches in ``data``.
    """
    losses = []
    for run in data.runs:
        parts = agree(data.micros[run.start : run.stop])
        data.micros[run.start : run.stop] = parts
        mine = [shards(micro.latent) for micro in parts]
        with backend.forward_context(last_micro=run.stop == len(data.micros)):
            loss = micro_loss(backend.model, parts, objective=objective, keys=keys, step=data.step, shards=mine)
            backend.backward(loss)
        losses.append(loss.detach())
        del loss  # or its graph would live on while the next micro-batch builds its own
    grad_norm = backend.clip(clip_norm)
    backend.step(lr=lr)
    return StepResult(loss=torch.stack(losses).sum(), grad_norm=grad_norm, skipped=backend.skipped())
