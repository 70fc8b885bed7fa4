"""The moving average of the weights, in fp32, sharded like the weights."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor


class Ema:
    """Exponential moving average; what is sampled from.

    Args:
        weights: Canonical names to live weights, as ``ZeroBackend.weights`` has them; the average starts as a copy of them.
        decay: Upper bound of the decay; update n uses at most (1 + n) / (10 + n), so that short runs forget their start.
    """

    def __init__(self, weights: Mapping[str, Tensor], *, decay: float) -> None:
        self._weights = weights
        self._decay = decay
        self.shadow = {name: w.detach().clone() for name, w in weights.items()}

    @torch.no_grad()
    def update(self, *, step: int, skipped: Tensor) -> None:
        """Moves the average towards the weights after optimizer step ``step`` (from 0).

        Args:
            skipped: 1 where that step moved no weight, so that the average stays as well; else 0. On the device: it is not read here.
        """
        shadows = list(self.shadow.values())
        weight = (1 - min(self._decay, (1 + step) / (10 + step))) * (1 - skipped.to(shadows[0]))
        torch._foreach_lerp_(shadows, list(self._weights.values()), [weight] * len(shadows))
