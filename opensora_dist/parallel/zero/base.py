"""What a ZeRO backend does for the training loop."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Protocol

from torch import Tensor, nn


class ZeroBackend(Protocol):
    """Owns the wrapped model's parameters, their gradients and the optimizer.

    One gradient rule holds for every backend: the loss given to ``backward`` is this rank's share of the global weighted sum, and
    gradients are summed over ranks and micro-batches with no other factor. A backend undoes its library's averaging.
    """

    model: nn.Module
    """What the loop calls: the wrapped model."""

    params: dict[str, Tensor]
    """Canonical parameter names (those of the unwrapped model) to this rank's parameters; DTensors where sharded."""

    def forward_context(self, *, last_micro: bool) -> AbstractContextManager[None]:
        """Around forward and backward of one micro-batch: precision, and no communication before the last micro-batch."""
        ...

    def inference(self) -> AbstractContextManager[nn.Module]:
        """A model to call without gradients, in eval mode; on leaving, nothing that was gathered for it is kept."""
        ...

    def backward(self, loss: Tensor) -> None:
        """Adds the gradients of ``loss``, this rank's share of the global weighted sum."""
        ...

    def clip(self, max_norm: float) -> Tensor:
        """Scales gradients so that their global norm is at most ``max_norm``; returns the norm before, on the device."""
        ...

    def step(self, *, lr: float) -> None:
        """One optimizer step; skipped on all ranks alike, moments untouched, where the last ``clip`` saw a non-finite norm."""
        ...

    def skipped(self) -> Tensor:
        """1.0 where the last step was skipped, else 0.0; on the device."""
        ...

    def state_dict(self) -> dict[str, Tensor]:
        """Live weights, buffers and moments: ``model.<name>``, ``exp_avg.<name>``, ``exp_avg_sq.<name>``; load in place."""
        ...

    def optimizer_steps(self) -> int:
        """Steps taken, skipped ones left out."""
        ...

    def load_optimizer_steps(self, steps: int) -> None:
        """Sets what ``optimizer_steps`` gave, once ``state_dict`` has been filled."""
        ...
