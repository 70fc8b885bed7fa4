"""STDiT of Open-Sora 1.0: a block attends within each frame, then across frames at each place."""

# B batch, T token frames, S tokens per frame, D width

from __future__ import annotations

import torch
from torch import Tensor

from opensora_dist.config.train import ModelConfig
from opensora_dist.core.types import Thw
from opensora_dist.models.base import ModelIo, VideoTransformer
from opensora_dist.models.layers import Axis, Block, SelfAttention, attend, modulate


class STDiTBlock(Block):
    """Spatial attention as in the image model, then temporal attention, under the same gate."""

    def __init__(self, width: int, *, heads: int, mlp_hidden: int) -> None:
        super().__init__(width, heads=heads, mlp_hidden=mlp_hidden)
        self.attn_temp = SelfAttention(width, heads=heads)

    def mix_tokens(
        self, x_BTSD: Tensor, *, shift_B11D: Tensor, scale_B11D: Tensor, gate_B11D: Tensor, tpe_TD: Tensor | None
    ) -> Tensor:
        spatial_in = modulate(self.norm1(x_BTSD), shift_B11D=shift_B11D, scale_B11D=scale_B11D)
        x = x_BTSD + gate_B11D * attend(self.attn, spatial_in, Axis.SPACE)
        # No norm and no modulation here, and positions reach the attention only, not the residual: that is the published model.
        temporal_in = x if tpe_TD is None else x + tpe_TD[:, None]
        return x + gate_B11D * attend(self.attn_temp, temporal_in, Axis.TIME)

    def mix_flops(self, grid: Thw) -> int:
        return self.attn.flops(grid, axis=Axis.SPACE) + self.attn_temp.flops(grid, axis=Axis.TIME)


class STDiT(VideoTransformer):
    """Spatial positions enter with the input, temporal ones with the first block's temporal attention.

    ``model.temporal_positions=residual`` adds both with the input instead. From scratch that learns faster: in the published form a
    token learns its frame only through temporal attention, whose projection starts at zero.

    Source: Open-Sora 1.0 (STDiT), which adds ``attn_temp`` to PixArt-alpha, arXiv 2310.00426.
    """

    block_class = STDiTBlock

    def __init__(self, config: ModelConfig, io: ModelIo) -> None:
        super().__init__(config, io)
        self._time_in_residual = config.temporal_positions == "residual"

    def add_positions(self, x_BTSD: Tensor, *, grid: Thw, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
        device = x_BTSD.device
        space_SD = self.positions.space(grid.h, grid.w, device=device, dtype=dtype)
        time_TD = self.positions.time(grid.t, device=device, dtype=dtype)
        if self._time_in_residual:
            return x_BTSD + (space_SD + time_TD[:, None]), None
        return x_BTSD + space_SD, time_TD
