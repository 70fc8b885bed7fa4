"""What a ZeRO backend does for the training loop."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from typing import Protocol

from torch import Tensor, nn


class ZeroBackend(Protocol):
    """Owns the wrapped model's parameters, their gradients and the optimizer; its constructor wraps.

    One gradient rule holds for every backend: the loss given to ``backward`` is this rank's share of the global weighted sum, and
    gradients are summed over ranks and micro-batches with no other factor. A backend undoes its library's averaging.
    """

    model: nn.Module
    """What the loop calls: the wrapped model."""

    weights: dict[str, Tensor]
    """Canonical parameter names (those of the unwrapped model) to what the optimizer steps on this rank, in float32 (float64): plain
    tensors, live, of any local shape, perhaps empty. What works element by element, as an average does, needs to know no more."""

    num_parameters: int
    """Of the whole model."""

    def forward_context(self, *, last_micro: bool) -> AbstractContextManager[None]:
        """Around forward and backward of one micro-batch: precision, and no needless communication before the last micro-batch."""
        ...

    def inference(self, weights: Mapping[str, Tensor] | None = None) -> AbstractContextManager[nn.Module]:
        """A model to call without gradients, in eval mode; on leaving, nothing that was gathered for it is kept. Collective.

        Args:
            weights: Laid out as ``self.weights``; used instead of them inside the block.
        """
        ...

    def backward(self, loss: Tensor) -> None:
        """Adds the gradients of ``loss``, this rank's share of the global weighted sum."""
        ...

    def clip(self, max_norm: float) -> Tensor:
        """Scales gradients so that their global norm is at most ``max_norm``; returns the norm before, on the device. Collective."""
        ...

    def step(self, *, lr: float) -> None:
        """One optimizer step; skipped on all ranks alike, moments untouched, where the last ``clip`` saw a non-finite norm."""
        ...

    def skipped(self) -> Tensor:
        """1.0 where the last step was skipped, else 0.0; on the device."""
        ...

    def state_dict(self, *, ema: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The canonical state, the same names and global shapes whatever the backend and the layout. Collective.

        Args:
            ema: The moving average, laid out as ``self.weights``.
        Returns:
            ``model.<name>`` (weights and buffers), ``exp_avg.<name>``, ``exp_avg_sq.<name>``, ``ema.<name>``; weights in float32
            (float64). DTensors where sharded; they may alias live memory.
        """
        ...

    def state_parts(self, *, ema: Mapping[str, Tensor]) -> Iterator[dict[str, Tensor]]:
        """``state_dict`` in parts, one after another, where it is no live memory: so that not all of it need be held at once."""
        ...

    def load_state_dict(self, state: Mapping[str, Tensor], *, ema: Mapping[str, Tensor], steps: int) -> None:
        """Puts back what ``state_dict(ema=ema)`` of this backend gave, once its tensors have been filled in place. Collective.

        Args:
            ema: Filled in place.
            steps: Optimizer steps taken, skipped ones left out.
        """
        ...

    def optimizer_steps(self) -> int:
        """Steps taken, skipped ones left out."""
        ...
