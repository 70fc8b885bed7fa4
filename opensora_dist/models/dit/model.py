"""DiT for video: a block attends over all tokens of a clip at once. The baseline that STDiT's speed is measured against."""

# B batch, T token frames, S tokens per frame, D width

from __future__ import annotations

import torch
from torch import Tensor

from opensora_dist.core.types import Thw
from opensora_dist.models.base import VideoTransformer
from opensora_dist.models.layers import Axis, Block, attend, modulate


class DiTBlock(Block):
    """Joint attention over frames and places."""

    def mix_tokens(
        self, x_BTSD: Tensor, *, shift_B11D: Tensor, scale_B11D: Tensor, gate_B11D: Tensor, tpe_TD: Tensor | None
    ) -> Tensor:
        assert tpe_TD is None, "DiT's temporal positions enter with the input"
        attn_in = modulate(self.norm1(x_BTSD), shift_B11D=shift_B11D, scale_B11D=scale_B11D)
        return x_BTSD + gate_B11D * attend(self.attn, attn_in, Axis.JOINT)

    def mix_flops(self, grid: Thw) -> int:
        return self.attn.flops(grid, axis=Axis.JOINT)


class DiT(VideoTransformer):
    """Spatial and temporal positions both enter with the input.

    Source: DiT, arXiv 2212.09748, with PixArt-alpha's conditioning.
    """

    block_class = DiTBlock

    def add_positions(self, x_BTSD: Tensor, *, grid: Thw, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
        device = x_BTSD.device
        space_SD = self.positions.space(grid.h, grid.w, device=device, dtype=dtype)
        time_TD = self.positions.time(grid.t, device=device, dtype=dtype)
        return x_BTSD + (space_SD + time_TD[:, None]), None
