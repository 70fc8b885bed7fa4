"""The moving average of the weights, in fp32, sharded like the weights."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor


class Ema:
    """Exponential moving average; what is sampled from.

    Args:
        params: Canonical names to live parameters; the average starts as a copy of them.
        decay: Upper bound of the decay; update n uses at most (1 + n) / (10 + n), so that short runs forget their start.
    """

    def __init__(self, params: Mapping[str, Tensor], *, decay: float) -> None:
        self._params = params
        self._decay = decay
        self.shadow = {name: _at_least_fp32(p.detach()).clone() for name, p in params.items()}

    @torch.no_grad()
    def update(self, *, step: int) -> None:
        """Moves the average towards the weights after optimizer step ``step`` (from 0)."""
        weight = 1 - min(self._decay, (1 + step) / (10 + step))
        shadows = list(self.shadow.values())
        torch._foreach_lerp_(shadows, [p.detach().to(s.dtype) for s, p in zip(shadows, self._params.values())], weight)

    def state_dict(self) -> dict[str, Tensor]:
        """``ema.<name>`` to live tensors, to be saved or loaded in place."""
        return {f"ema.{name}": tensor for name, tensor in self.shadow.items()}

    @contextmanager
    def applied(self) -> Iterator[None]:
        """The parameters hold the average inside the block, and bitwise their own values after it."""
        with torch.no_grad():
            kept = {name: p.detach().clone() for name, p in self._params.items()}
            for name, p in self._params.items():
                p.copy_(self.shadow[name])
            try:
                yield
            finally:
                for name, p in self._params.items():
                    p.copy_(kept[name])


def _at_least_fp32(tensor: Tensor) -> Tensor:
    return tensor if tensor.dtype in (torch.float32, torch.float64) else tensor.float()
