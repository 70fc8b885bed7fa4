"""The skeleton of the video transformers: embed, blocks, final layer. A model adds its block and where positions go."""

# B batch, C latent channels, T H W latent frames, height, width (token grid after patching), S tokens per frame, D width,
# Y text tokens, E text width

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, overload

import torch
from torch import Tensor, nn

from opensora_dist.config.train import ModelConfig
from opensora_dist.core.errors import ConfigError
from opensora_dist.core.types import Region, Thw
from opensora_dist.models.layers import Block, CaptionEmbedder, FinalLayer, PatchEmbed, TimestepEmbedder, linear_flops
from opensora_dist.models.positions import Positions
from opensora_dist.ops.compiled import begin_forward
from opensora_dist.ops.samples import captions
from opensora_dist.parallel.sequence.base import Shard
from opensora_dist.parallel.sequence.local import whole
from opensora_dist.parallel.sequence.pack import Pack, Part, Tokens
from opensora_dist.parallel.tensor.group import ALONE

# Branches that start as the identity, so that an image model's weights stay what they were, and an output that starts at zero.
_ZERO = ("attn_temp.proj.weight", "cross_attn.proj.weight", "final_layer.linear.weight")
_NARROW = ("t_embedder.mlp.", "t_block.", "y_embedder.y_proj.")


def _autocast_is_on(device: torch.device) -> bool:
    """Under autocast the residual stream is float32, also where FSDP gathers the weights in bfloat16."""
    return torch.amp.is_autocast_available(device.type) and torch.is_autocast_enabled(device.type)


@dataclass(frozen=True, kw_only=True)
class ModelIo:
    """What a model is given and gives, set by codec, text encoder and objective.

    Args:
        in_channels: Latent channels.
        out_channels: Channels of the output (twice as many where sigma is learned).
        text_width: Size of a text token vector.
        max_tokens: Longest caption.
    """

    in_channels: int
    out_channels: int
    text_width: int
    max_tokens: int


class VideoTransformer(nn.Module, ABC):
    """A text-conditioned diffusion transformer over latent video of any frames, height and width.

    Parameters have no meaningful value until ``init.init_weights`` has run, so that a model may be built on the meta device.

    Args:
        config: Section ``model``.
        io: Channels and text.
    """

    block_class: ClassVar[type[Block]]

    def __init__(self, config: ModelConfig, io: ModelIo) -> None:
        super().__init__()
        depth, width, heads = config.shape
        assert width % heads == width % 4 == 0, f"width {width}, heads {heads}: config.rules refuses this"
        self.io = io
        self.tensor = ALONE
        """The ranks that share the linears of the blocks (``models.tensor``)."""
        self.patch = Thw(*config.patch)
        self.positions = Positions(width=width, space_scale=config.space_scale, time_scale=config.time_scale)
        self.x_embedder = PatchEmbed(io.in_channels, width=width, patch=self.patch)
        self.t_embedder = TimestepEmbedder(width)
        self.t_block = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))
        self.y_embedder = CaptionEmbedder(io.text_width, width=width, max_tokens=io.max_tokens)
        self.y_pool = nn.Linear(io.text_width, width) if config.pooled_text else None
        mlp_hidden = int(width * config.mlp_ratio)
        self.blocks = nn.ModuleList(self.block_class(width, heads=heads, mlp_hidden=mlp_hidden) for _ in range(depth))
        self.final_layer = FinalLayer(width, patch_values=self.patch.volume * io.out_channels)

    @abstractmethod
    def add_positions(self, x_BtsD: Tensor, *, grid: Thw, region: Region, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
        """Tokens with the positions that the input carries, and the [t, D] positions that the first block is to add, if any.

        Args:
            grid: Tokens of the whole sample.
            region: Those of ``x_BtsD``.
            dtype: Of the positions, and so of the residual stream, which starts here.
        """

    def positions_of(self, grid: Thw, region: Region, *, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Spatial [s, D] and temporal [t, D] positions of a region."""
        space_SD = self.positions.space(grid.h, grid.w, device=device, dtype=dtype)
        time_TD = self.positions.time(grid.t, device=device, dtype=dtype)
        return space_SD[region.h0 * grid.w : region.h1 * grid.w], time_TD[region.t0 : region.t1]

    @overload
    def forward(
        self,
        x_BCthw: Tensor,
        timestep_B: Tensor,
        text_BYE: Tensor,
        text_mask_BY: Tensor | None,
        *,
        drop_caption_B: Tensor | None = None,
        shard: Shard | None = None,
    ) -> Tensor: ...

    @overload
    def forward(
        self,
        x_BCthw: Sequence[Tensor],
        timestep_B: Tensor,
        text_BYE: Tensor,
        text_mask_BY: Tensor | None,
        *,
        drop_caption_B: Tensor | None = None,
        shard: Sequence[Shard | None] | None = None,
    ) -> list[Tensor]: ...

    def forward(
        self,
        x_BCthw: Tensor | Sequence[Tensor],
        timestep_B: Tensor,
        text_BYE: Tensor,
        text_mask_BY: Tensor | None,
        *,
        drop_caption_B: Tensor | None = None,
        shard: Shard | Sequence[Shard | None] | None = None,
    ) -> Tensor | list[Tensor]:
        """
        Args:
            x_BCthw: Noised latents; of the region of ``shard`` only. A list of them, each of another shape, is a pack: all tokens are one
                sequence, and everything else holds the samples of all shapes in the order of the list.
            timestep_B: What the objective calls the noise level, as given.
            text_BYE: Caption vectors; padding may hold anything.
            text_mask_BY: True (1) where a text token is valid, in any pattern; None if all are.
            drop_caption_B: bool, True where the null caption stands in; the mask stays the sample's.
            shard: Where the samples are spread over ranks: this rank's part of them, of a pack one per shape. None: they are whole.
        Returns:
            [B, out_channels, T, H, W] of the same region, in float32; float64 in a float64 model. Of a pack, a list of them.
        Raises:
            ConfigError: The patch doesn't divide the latents.
        """
        begin_forward()
        packed = not isinstance(x_BCthw, Tensor)
        parts_BCthw = list(x_BCthw) if not isinstance(x_BCthw, Tensor) else [x_BCthw]
        given = list(shard) if isinstance(shard, Sequence) else [shard] * len(parts_BCthw)
        grids = [self.token_grid(Thw(*x.shape[2:])) for x in parts_BCthw]
        shards = [whole(local) if part is None else part for part, local in zip(given, grids, strict=True)]
        assert all(part.region.shape(part.grid) == local for part, local in zip(shards, grids)), (shards, grids)
        tokens: Tokens = shards[0]
        if packed:
            tokens = Pack(parts=tuple(Part(shard=part, batch=len(x)) for part, x in zip(shards, parts_BCthw)))
        x, tpe = self._embed(parts_BCthw, shards, tokens=tokens)
        dtype = self.x_embedder.proj.weight.dtype
        t_BD = self.t_embedder(timestep_B, dtype=dtype)
        if text_mask_BY is not None:
            text_mask_BY = text_mask_BY.bool()  # tokenizers give integers
        text_BYE = self.y_embedder.valid_text(text_BYE.to(dtype), text_mask_BY=text_mask_BY, drop_caption_B=drop_caption_B)
        if self.y_pool is not None:
            t_BD = t_BD + self.y_pool(_mean_text(text_BYE, text_mask_BY=text_mask_BY))
        t_B6D = self.t_block(t_BD).unflatten(-1, (6, -1))
        # Once for all blocks: in backward what they give for the caption is summed over ranks in one piece.
        text_BYD = self.tensor.enter(self.y_embedder(text_BYE))
        of_text = captions(text_mask_BY, samples=len(text_BYD), keys=text_BYD.shape[1], device=text_BYD.device)
        for i, block in enumerate(self.blocks):
            x = block(x, shard=tokens, t_B6D=t_B6D, text_BYD=text_BYD, captions=of_text, tpe_tD=tpe if i == 0 else None)
        x = self.final_layer(x, shard=tokens, t_BD=t_BD)
        pieces = tokens.split(x) if isinstance(tokens, Pack) else [x]
        out_dtype = torch.float64 if dtype == torch.float64 else torch.float32
        outputs = [self._unpatchify(piece, grid=local).to(out_dtype) for piece, local in zip(pieces, grids, strict=True)]
        return outputs if packed else outputs[0]

    def _embed(self, parts_BCthw: Sequence[Tensor], shards: Sequence[Shard], *, tokens: Tokens) -> tuple[Tensor, Tensor | None]:
        """The residual stream with its positions, and those that the first block is to add, as a block takes both."""
        weight = self.x_embedder.proj.weight
        residual_dtype = torch.float32 if _autocast_is_on(parts_BCthw[0].device) else weight.dtype
        embedded = []
        for x_BCthw, shard in zip(parts_BCthw, shards, strict=True):
            x_BtsD = self.x_embedder(x_BCthw.to(weight.dtype), grid=shard.region.shape(shard.grid))
            embedded.append(self.add_positions(x_BtsD, grid=shard.grid, region=shard.region, dtype=residual_dtype))
        if not isinstance(tokens, Pack):
            return embedded[0]
        time = [tpe_tD[:, None].expand(x.shape) for x, tpe_tD in embedded if tpe_tD is not None]
        return tokens.join([x for x, _ in embedded]), tokens.join(time)[0] if time else None

    def _unpatchify(self, x_BTSP: Tensor, *, grid: Thw) -> Tensor:
        pt, ph, pw = self.patch
        x = x_BTSP.reshape(-1, grid.t, grid.h, grid.w, pt, ph, pw, self.io.out_channels).permute(0, 7, 1, 4, 2, 5, 3, 6)
        return x.reshape(-1, self.io.out_channels, grid.t * pt, grid.h * ph, grid.w * pw)

    def token_grid(self, latent: Thw) -> Thw:
        """Tokens of a latent, by frames, rows and columns.

        Raises:
            ConfigError: ``model.patch`` doesn't divide the latent.
        """
        if any(size % patch for size, patch in zip(latent, self.patch)):
            raise ConfigError(
                f"model.patch={self.patch} must divide the latent's frames, height and width, which are {latent}; "
                "choose another patch, or clips whose latents it divides"
            )
        return Thw(latent.t // self.patch.t, latent.h // self.patch.h, latent.w // self.patch.w)

    def flops(self, latent: Thw, *, text_tokens: int) -> int:
        """Forward FLOPs of one sample's matrix products and attention, 2 per multiply-add.

        The one formula behind the planner and the measured use of a device. ``text_tokens`` counts padding too: it is computed.
        """
        grid = self.token_grid(latent)
        block = self.blocks[0]
        assert isinstance(block, Block)
        edges = self.x_embedder.flops(grid.volume) + linear_flops(self.final_layer, tokens=grid.volume)
        conditioning = linear_flops(self.t_embedder, tokens=1) + linear_flops(self.t_block, tokens=1)
        conditioning += linear_flops(self.y_embedder, tokens=text_tokens)
        if self.y_pool is not None:
            conditioning += linear_flops(self.y_pool, tokens=1)
        return edges + conditioning + len(self.blocks) * block.flops(grid, text_tokens=text_tokens)

    def init_parameter(self, name: str, tensor: Tensor, generator: torch.Generator) -> None:
        """Gives one whole parameter or buffer its initial value, in place.

        Args:
            name: As in ``state_dict``.
            tensor: Contiguous, unsharded.
            generator: Of this parameter alone, so that no value depends on which others exist.
        """
        if name.endswith(("scale_shift_table", "y_embedding")):
            tensor.normal_(std=tensor.shape[-1] ** -0.5, generator=generator)
        elif name.endswith((".bias", *_ZERO)):
            tensor.zero_()
        elif name.startswith(_NARROW):
            tensor.normal_(std=0.02, generator=generator)
        else:
            nn.init.xavier_uniform_(tensor.flatten(1), generator=generator)


def _mean_text(text_BYE: Tensor, *, text_mask_BY: Tensor | None) -> Tensor:
    """The mean vector of each caption's valid tokens, [B, E]; padding is zero already. Zero where a caption has no token."""
    if text_mask_BY is None:
        return text_BYE.mean(dim=1)
    return text_BYE.sum(dim=1) / text_mask_BY.sum(dim=1, keepdim=True).clamp(min=1)
