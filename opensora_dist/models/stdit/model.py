"""STDiT of Open-Sora 1.0: a block attends within each frame, then across frames at each place."""

# B batch, T token frames, S tokens per frame, D width

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from opensora_dist.config.train import ModelConfig
from opensora_dist.core.types import Axis, Region, Thw
from opensora_dist.models.base import ModelIo, VideoTransformer
from opensora_dist.models.layers import Block, SelfAttention
from opensora_dist.ops.fused import gated, norm_modulate
from opensora_dist.parallel.sequence.pack import Tokens
from opensora_dist.parallel.tensor.linear import part_of


class STDiTBlock(Block):
    """Spatial attention as in the image model, then temporal attention, under the same gate."""

    def __init__(self, width: int, *, heads: int, mlp_hidden: int) -> None:
        super().__init__(width, heads=heads, mlp_hidden=mlp_hidden)
        self.attn_temp = SelfAttention(width, heads=heads)

    def mix_tokens(
        self,
        x_BtsD: Tensor,
        *,
        shard: Tokens,
        shift_B11D: Tensor,
        scale_B11D: Tensor,
        gate_B11D: Tensor,
        tpe_tD: Tensor | None,
        then: Callable[[Tensor], Tensor],
    ) -> Tensor:
        tp, tape = self.tensor, shard.tape

        def space(x: Tensor) -> Tensor:
            return shard.branch(
                part_of(self.attn),
                x,
                Axis.SPACE,
                before=modulated,
                then=lambda x, out: shard.each(gated, x, tp.leave(out, self.attn.proj, tape=tape), of=(gate_B11D,)),
            )

        def modulated(x: Tensor, _frames: slice) -> Tensor:
            return tp.enter(shard.each(norm_modulate, x, of=(shift_B11D, scale_B11D)))

        def positioned(x: Tensor, frames: slice) -> Tensor:
            # No norm and no modulation here, and positions reach the attention only, not the residual: that is the published model.
            return tp.enter(x if tpe_tD is None else x + tpe_tD[frames, None])

        return shard.branch(
            part_of(self.attn_temp),
            x_BtsD,
            Axis.TIME,
            first=space,
            before=positioned,
            then=lambda x, out: then(shard.each(gated, x, tp.leave(out, self.attn_temp.proj, tape=tape), of=(gate_B11D,))),
        )

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

    def add_positions(self, x_BtsD: Tensor, *, grid: Thw, region: Region, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
        space_sD, time_tD = self.positions_of(grid, region, device=x_BtsD.device, dtype=dtype)
        if self._time_in_residual:
            return x_BtsD + (space_sD + time_tD[:, None]), None
        return x_BtsD + space_sD, time_tD
