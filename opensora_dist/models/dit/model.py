"""DiT for video: a block attends over all tokens of a clip at once. The baseline that STDiT's speed is measured against."""

# B batch, T token frames, S tokens per frame, D width

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from opensora_dist.core.types import Axis, Region, Thw
from opensora_dist.models.base import VideoTransformer
from opensora_dist.models.layers import Block
from opensora_dist.ops.fused import gated, norm_modulate
from opensora_dist.parallel.sequence.pack import Tokens
from opensora_dist.parallel.tensor.linear import part_of


class DiTBlock(Block):
    """Joint attention over frames and places."""

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
        assert tpe_tD is None, "DiT's temporal positions enter with the input"

        tp = self.tensor

        def modulated(x: Tensor, _frames: slice) -> Tensor:
            return tp.enter(shard.each(norm_modulate, x, of=(shift_B11D, scale_B11D)))

        return shard.branch(
            part_of(self.attn),
            x_BtsD,
            Axis.JOINT,
            before=modulated,
            then=lambda x, out: then(shard.each(gated, x, tp.leave(out, self.attn.proj, tape=shard.tape), of=(gate_B11D,))),
        )

    def mix_flops(self, grid: Thw) -> int:
        return self.attn.flops(grid, axis=Axis.JOINT)


class DiT(VideoTransformer):
    """Spatial and temporal positions both enter with the input.

    Source: DiT, arXiv 2212.09748, with PixArt-alpha's conditioning.
    """

    block_class = DiTBlock

    def add_positions(self, x_BtsD: Tensor, *, grid: Thw, region: Region, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
        space_sD, time_tD = self.positions_of(grid, region, device=x_BtsD.device, dtype=dtype)
        return x_BtsD + (space_sD + time_tD[:, None]), None
