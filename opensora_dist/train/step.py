"""One optimizer step: what is drawn, what is lost, what is summed."""

# B batch, C latent channels, T H W latent frames, height, width

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from opensora_dist.core.types import Thw
from opensora_dist.data.loader import MicroBatch, StepData
from opensora_dist.diffusion.base import Objective
from opensora_dist.diffusion.draws import draw
from opensora_dist.parallel.keys import Keys
from opensora_dist.parallel.zero.base import ZeroBackend


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


def micro_loss(model: nn.Module, micro: MicroBatch, *, objective: Objective, keys: Keys, step: int) -> Tensor:
    """The weighted loss sum of one micro-batch: this rank's share, to be summed over ranks and micro-batches as it is."""
    x0_BCTHW = micro.latents_BCTHW
    _, channels, *latent = x0_BCTHW.shape
    draws = draw(keys, objective, samples=micro.samples, step=step, channels=channels, latent=Thw(*latent))
    noise, level_B, drop_caption_B = (
        _to_device(t, x0_BCTHW.device) for t in (draws.noise_BCTHW, draws.level_B, draws.drop_caption_B)
    )
    noise = noise.to(x0_BCTHW.dtype)
    output = model(
        objective.corrupt(x0_BCTHW, noise, level_B),
        objective.timestep(level_B),
        micro.text_BYE,
        micro.text_mask_BY,
        drop_caption_B=drop_caption_B,
    )
    loss_BTHW = objective.loss(output, x0=x0_BCTHW, noise=noise, level_B=level_B)
    return (loss_BTHW.sum(dim=(1, 2, 3)) * micro.weight_B.to(loss_BTHW)).sum()


def _to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """To the device without waiting for it: a copy from pageable memory would make the host wait for the step before."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor


def train_step(
    backend: ZeroBackend, data: StepData, *, objective: Objective, keys: Keys, lr: float, clip_norm: float
) -> StepResult:
    """Forward and backward over the micro-batches, clip once, one optimizer step."""
    losses = []
    for i, micro in enumerate(data.micros):
        with backend.forward_context(last_micro=i == len(data.micros) - 1):
            loss = micro_loss(backend.model, micro, objective=objective, keys=keys, step=data.step)
            backend.backward(loss)
        losses.append(loss.detach())
    grad_norm = backend.clip(clip_norm)
    backend.step(lr=lr)
    return StepResult(loss=torch.stack(losses).sum(), grad_norm=grad_norm, skipped=backend.skipped())
