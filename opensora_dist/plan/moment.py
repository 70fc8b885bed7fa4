"""What one rank holds in memory at one moment of a training step, part by part."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class MemoryEstimate:
    """Bytes on the device of the rank that holds most, at one moment of a step; they add up to ``total``.

    Args:
        moment: When.
        parameters: Weights and buffers as they are between steps.
        gathered: Whole weights for the blocks that compute, or are about to.
        gradients: This rank's, those not yet reduced, and what is on its way.
        optimizer: Moments.
        ema: The moving average.
        activations: Kept for backward, and what the operator at work makes.
        host: In CPU memory instead, because of ``offload`` and ``offload_activations``.
    """

    moment: str
    parameters: int
    gathered: int
    gradients: int
    optimizer: int
    ema: int
    activations: int
    host: int = 0

    @property
    def total(self) -> int:
        """On the device."""
        return self.parameters + self.gathered + self.gradients + self.optimizer + self.ema + self.activations

    def lines(self) -> list[str]:
        """For people: one line for each part."""
        said = {
            "parameters": "weights and buffers of this rank between steps",
            "gathered": "whole weights of the blocks that compute, or are about to",
            "gradients": "summed ones of this rank, whole ones on their way",
            "optimizer": "both moments of AdamW",
            "ema": "moving average of the weights",
            "activations": "kept for backward, and made by the operator at work",
            "total": self.moment,
            "host": "in CPU memory",
        }
        return [f"{name:12} {getattr(self, name) / 2**30:9.3f} GiB  {what}" for name, what in said.items()]
