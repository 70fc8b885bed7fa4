"""Randomness keyed by what is drawn, never by who draws it.

Every draw comes from ``(seed, purpose, sample, step, frame)``. So a draw is bitwise the same at any rank count, accumulation or
shard, a rank that owns some frames draws only those, and resuming needs no generator state.

Draws are made on the CPU in float32 and then moved and cast: CUDA's generators give other numbers than the CPU's, and a float64
parity run must see the float32 run's noise.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import xxhash
from torch import Tensor

from opensora_dist.core.io import sample_id as sample_id


class Keys:
    """The source of all randomness of a run.

    Args:
        seed: ``run.seed``.
    """

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def generator(self, purpose: str, sample: int = 0, step: int = 0, frame: int = 0) -> torch.Generator:
        """A CPU generator for one draw; equal arguments give equal numbers.

        Args:
            purpose: What is drawn ("noise", "sigma", "caption_dropout", "init:<parameter>", "order").
            sample: ``sample_id`` of the sample, 0 where a draw belongs to none.
            step: Global step, or epoch for the data order.
            frame: Latent frame within the sample.
        """
        digest = xxhash.xxh3_64_intdigest(f"{self.seed}/{purpose}/{sample}/{step}/{frame}".encode())
        return torch.Generator().manual_seed(digest >> 1)

    def normal_frames(self, purpose: str, sample: int, step: int, *, frames: Sequence[int], shape: tuple[int, ...]) -> Tensor:
        """Standard normal noise of the given latent frames, each keyed by itself.

        Args:
            frames: Indices of the frames to draw, in the sample.
            shape: Shape of one frame, [C, H, W].
        Returns:
            float32 [C, len(frames), H, W].
        """
        draws = [torch.randn(shape, generator=self.generator(purpose, sample, step, f)) for f in frames]
        return torch.stack(draws, dim=1)
