"""AdamW as every backend has it: which parameters decay, and the fused optimizer over local shards."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from opensora_dist.config.train import OptimConfig


def decays(name: str, *, ndim: int) -> bool:
    """Whether weight decay is for this parameter.

    It is for the weights of linears and convolutions; biases, and tables that are added to a modulation, keep their size.

    Args:
        name: Canonical.
        ndim: Of the whole parameter, not of a shard.
    """
    return name.endswith(".weight") and ndim >= 2


def adamw(weights: Mapping[str, Tensor], ndims: Mapping[str, int], config: OptimConfig) -> torch.optim.AdamW:
    """Fused AdamW, yet without state.

    Args:
        weights: Canonical names to what is stepped: plain tensors on one device.
        ndims: Dims of each whole parameter.
    """
    matrices = [w for name, w in weights.items() if decays(name, ndim=ndims[name])]
    others = [w for name, w in weights.items() if not decays(name, ndim=ndims[name])]
    groups = [{"params": matrices, "weight_decay": config.weight_decay}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW([g for g in groups if g["params"]], lr=config.lr, betas=config.betas, eps=config.eps, fused=True)


def start_moments(optimizer: torch.optim.AdamW, weights: Iterable[Tensor]) -> None:
    """Makes the state of what ``optimizer`` steps, before the first step, so that a checkpoint can be loaded into it."""
    for weight in weights:
        optimizer.state[weight] = {
            "step": torch.zeros((), dtype=torch.float32, device=weight.device),
            "exp_avg": torch.zeros_like(weight, memory_format=torch.preserve_format),
            "exp_avg_sq": torch.zeros_like(weight, memory_format=torch.preserve_format),
        }
