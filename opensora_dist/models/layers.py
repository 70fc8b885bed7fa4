"""The layers of Open-Sora 1.0's transformer, under its parameter names. Models differ only in how a block attends to itself."""

# B batch, T token frames, S tokens per frame, L tokens of a sequence, D width, N heads, K head dim, Y text tokens,
# E text width; t, s: those of T and S that a shard holds

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from opensora_dist.core.types import Axis, Thw
from opensora_dist.ops.compiled import compiles, region, replayed_region
from opensora_dist.ops.fused import add_norm_modulate, gated, linear_gelu, norm_modulate
from opensora_dist.ops.samples import Captions, cross_attention
from opensora_dist.parallel.offload import Around
from opensora_dist.parallel.recompute import Recompute, Store, recompute, recompute_traced, tiled
from opensora_dist.parallel.sequence.base import Shard
from opensora_dist.parallel.sequence.pack import Tokens
from opensora_dist.parallel.tensor.group import ALONE
from opensora_dist.parallel.tensor.linear import weight_and_bias

TIMESTEP_FREQUENCIES = 256


def linear_flops(module: nn.Module, *, tokens: int) -> int:
    """Forward FLOPs of every linear inside ``module``, 2 per multiply-add, when each sees ``tokens`` tokens."""
    return 2 * tokens * sum(m.in_features * m.out_features for m in module.modules() if isinstance(m, nn.Linear))


def over_tokens(region: Callable[..., Tensor], x_BTSD: Tensor, *of_tokens: Tensor, tile_tokens: int | None) -> Tensor:
    """``region`` on each token by itself: on all at once, or on so many at a time (those of all samples counted together).

    Args:
        of_tokens: What else ``region`` is given for each token, or for all tokens of a sample: [B, T or 1, S or 1, D].
    """
    if tile_tokens is None:
        return region(x_BTSD, *of_tokens)
    B, T, S, _ = x_BTSD.shape
    xs_B1LD = (x.flatten(1, 2)[:, None].expand(-1, -1, T * S, -1) for x in (x_BTSD, *of_tokens))
    out_B1LD = tiled(region, *xs_B1LD, dim=2, size=max(1, tile_tokens // B))
    return out_B1LD.view(B, T, S, out_B1LD.shape[-1])


class Mlp(nn.Module):
    """Linear, tanh-GELU, linear."""

    def __init__(self, width: int, *, hidden: int, out: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, out)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.fc2(linear_gelu(x, *weight_and_bias(self.fc1)))
        return out


class SelfAttention(nn.Module):
    """The projections of a multi-head self-attention; who attends to whom, and where, is ``Shard.branch``'s to say."""

    def __init__(self, width: int, *, heads: int) -> None:
        super().__init__()
        self.heads, self.head_dim = heads, width // heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def flops(self, grid: Thw, *, axis: Axis) -> int:
        """Forward FLOPs for one sample of this token grid."""
        length = {Axis.SPACE: grid.h * grid.w, Axis.TIME: grid.t, Axis.JOINT: grid.volume}[axis]
        return linear_flops(self, tokens=grid.volume) + 4 * grid.volume * length * self.proj.in_features


class CrossAttention(nn.Module):
    """Video tokens look at the caption's valid tokens."""

    def __init__(self, width: int, *, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q_linear = nn.Linear(width, width)
        self.kv_linear = nn.Linear(width, 2 * width)
        self.proj = nn.Linear(width, width)

    def keys_and_values(self, text_BYD: Tensor) -> Tensor:
        """Of the caption, [B, Y, 2, N, K]; the same for every token, so computed once however the tokens come."""
        kv_BY2NK: Tensor = self.kv_linear(text_BYD).unflatten(-1, (2, self.heads, -1))
        return kv_BY2NK

    def forward(self, x_BTSD: Tensor, *, shard: Tokens, kv_BY2NK: Tensor, captions: Captions) -> Tensor:
        """
        Args:
            x_BTSD: Tokens of ``shard``, or of a pack all of them.
        """
        q_BTSC = self.q_linear(x_BTSD)
        q_QNK = q_BTSC.flatten(0, 2).unflatten(-1, (self.heads, -1))
        attended = cross_attention(q_QNK, kv_BY2NK, captions, runs=shard.runs(x_BTSD))
        out: Tensor = self.proj(attended.reshape(q_BTSC.shape))
        return out

    def flops(self, tokens: int, *, text_tokens: int) -> int:
        """Forward FLOPs for one sample."""
        video = linear_flops(self.q_linear, tokens=tokens) + linear_flops(self.proj, tokens=tokens)
        text = linear_flops(self.kv_linear, tokens=text_tokens)
        return video + text + 4 * tokens * text_tokens * self.proj.in_features


class Block(nn.Module, ABC):
    """One adaLN-single block: self-attention as the model defines it, cross-attention to the caption, MLP.

    Source: PixArt-alpha, arXiv 2310.00426 (one modulation for all blocks, a learned table per block).
    """

    def __init__(self, width: int, *, heads: int, mlp_hidden: int) -> None:
        super().__init__()
        self.recompute: Recompute = "none"
        """Which activations inside the block are computed again in backward rather than kept."""
        self.offload: Around | None = None
        """Takes what is kept to CPU memory until backward."""
        self.tile_tokens: int | None = None
        """Tokens that the MLP works on at once."""
        self.tensor = ALONE
        """The ranks that share the block's linears: every branch begins with its ``enter`` and ends with its ``leave``."""
        self.attn = SelfAttention(width, heads=heads)
        self.cross_attn = CrossAttention(width, heads=heads)
        self.mlp = Mlp(width, hidden=mlp_hidden, out=width)
        self.scale_shift_table = nn.Parameter(torch.empty(6, width))

    @abstractmethod
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
        """Self-attention as the model defines it, then ``then``, which works on each token by itself.

        Every attention is a ``shard.branch``, so that it is the one place where tokens of a sample meet; the last one is handed
        ``then``, so that there is work to do while its tokens travel.
        """

    @abstractmethod
    def mix_flops(self, grid: Thw) -> int:
        """Forward FLOPs of the self-attentions for one sample."""

    def forward(
        self,
        x_BtsD: Tensor,
        *,
        shard: Tokens,
        t_B6D: Tensor,
        text_BYD: Tensor,
        captions: Captions,
        tpe_tD: Tensor | None = None,
    ) -> Tensor:
        """
        Args:
            x_BtsD: Residual stream, of the tokens of ``shard``; [1, 1, L, D] of a pack, whose samples everything else is of.
            shard: Which tokens these are, and how they meet the others.
            t_B6D: The timestep's part of shift, scale and gate for attention and for the MLP.
            text_BYD: Embedded caption, which has entered ``tensor``.
            captions: Which of its tokens are valid.
            tpe_tD: Temporal positions of these frames, [t, D], for the one block that adds them; of a pack, of each token: [1, L, D].
        """

        def run(x: Tensor, shard: Tokens) -> Tensor:
            return self._run(x, shard=shard, t_B6D=t_B6D, text_BYD=text_BYD, captions=captions, tpe_tD=tpe_tD)

        def kept(store: Store | None) -> Tensor:
            if compiles() and self._is_one_graph(shard):
                return self._traced(x_BtsD, shard, t_B6D, text_BYD, captions, tpe_tD)
            if self.recompute == "none":
                return run(x_BtsD, shard)
            return recompute(lambda x, tape: run(x, shard.taped(tape)), x_BtsD, how=self.recompute, store=store)

        if self.offload is None:
            return kept(None)
        return self.offload(kept, stays=[*self.parameters(), t_B6D, text_BYD])

    def _is_one_graph(self, shard: Tokens) -> bool:
        """Whether nothing that a compiler can't follow happens inside: no communication, no loop over shapes or tiles."""
        return isinstance(shard, Shard) and shard.links is None and self.tensor.alone and self.tile_tokens is None

    @replayed_region
    def _traced(
        self,
        x_BTSD: Tensor,
        shard: Tokens,
        t_B6D: Tensor,
        text_BYD: Tensor,
        captions: Captions,
        tpe_TD: Tensor | None,
    ) -> Tensor:
        """``forward`` as one graph: what is computed again is the compiler's to arrange."""

        def run(x: Tensor) -> Tensor:
            return self._run(x, shard=shard, t_B6D=t_B6D, text_BYD=text_BYD, captions=captions, tpe_tD=tpe_TD)

        return run(x_BTSD) if self.recompute == "none" else recompute_traced(run, x_BTSD, how=self.recompute)

    def _run(
        self,
        x_BtsD: Tensor,
        *,
        shard: Tokens,
        t_B6D: Tensor,
        text_BYD: Tensor,
        captions: Captions,
        tpe_tD: Tensor | None,
    ) -> Tensor:
        modulation_B611D = (self.scale_shift_table + t_B6D)[:, :, None, None]
        shift_msa, scale_msa, gate_msa, shift_mlp, scale_mlp, gate_mlp = modulation_B611D.unbind(1)
        kv_BY2NK = self.cross_attn.keys_and_values(text_BYD)
        tp = self.tensor

        def cross_and_mlp(x: Tensor) -> Tensor:
            part = self.cross_attn(tp.enter(x), shard=shard, kv_BY2NK=kv_BY2NK, captions=captions)
            attended = tp.leave(part, self.cross_attn.proj, tape=shard.tape)
            x, x_mlp = shard.each(add_norm_modulate, x, attended, of=(shift_mlp, scale_mlp))
            # What is sent is outside: a tile is run again in backward.
            hidden = over_tokens(self.mlp, tp.enter(x_mlp), tile_tokens=self.tile_tokens)
            return shard.each(gated, x, tp.leave(hidden, self.mlp.fc2, tape=shard.tape), of=(gate_mlp,))

        return self.mix_tokens(
            x_BtsD,
            shard=shard,
            shift_B11D=shift_msa,
            scale_B11D=scale_msa,
            gate_B11D=gate_msa,
            tpe_tD=tpe_tD,
            then=cross_and_mlp,
        )

    def flops(self, grid: Thw, *, text_tokens: int) -> int:
        """Forward FLOPs for one sample of this token grid."""
        cross = self.cross_attn.flops(grid.volume, text_tokens=text_tokens)
        return self.mix_flops(grid) + cross + linear_flops(self.mlp, tokens=grid.volume)


class PatchEmbed(nn.Module):
    """Latents to tokens. The published weight is a convolution's; since patches don't overlap, it is applied as a linear."""

    def __init__(self, in_channels: int, *, width: int, patch: Thw) -> None:
        super().__init__()
        self.patch = patch
        self.proj = nn.Conv3d(in_channels, width, kernel_size=(patch.t, patch.h, patch.w), stride=(patch.t, patch.h, patch.w))

    def forward(self, x_BCTHW: Tensor, *, grid: Thw) -> Tensor:
        """[B, C, T * pt, H * ph, W * pw] to [B, T, S, D]."""
        B, C, *_ = x_BCTHW.shape
        x = x_BCTHW.reshape(B, C, grid.t, self.patch.t, grid.h, self.patch.h, grid.w, self.patch.w)
        patches = x.permute(0, 2, 4, 6, 1, 3, 5, 7).flatten(4).flatten(2, 3)
        return F.linear(patches, self.proj.weight.flatten(1), self.proj.bias)

    def flops(self, tokens: int) -> int:
        """Forward FLOPs for one sample."""
        return 2 * tokens * self.proj.in_channels * self.patch.volume * self.proj.out_channels


class TimestepEmbedder(nn.Module):
    """Timesteps, as given (0..999 or 1000 sigma), to vectors of the model's width."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(TIMESTEP_FREQUENCIES, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, timestep_B: Tensor, *, dtype: torch.dtype) -> Tensor:
        """
        Args:
            timestep_B: Any real dtype.
            dtype: Of the model. The angles stay in float32 in a bfloat16 model, where 999 would read 1000.
        Returns:
            [B, D].
        """
        exact = torch.float64 if dtype == torch.float64 else torch.float32
        half = TIMESTEP_FREQUENCIES // 2
        # In float32 the order of operations shows: sin(999 w) moves by 6e-5 with the last bit of w. This is the published order.
        frequencies = torch.exp(-math.log(10000) * torch.arange(half, dtype=exact, device=timestep_B.device) / half)
        angle = timestep_B[:, None].to(exact) * frequencies
        out: Tensor = self.mlp(torch.cat([angle.cos(), angle.sin()], dim=1).to(dtype))
        return out


class CaptionEmbedder(nn.Module):
    """Text-encoder vectors to the model's width; holds the null caption that stands in for a dropped one."""

    y_embedding: Tensor

    def __init__(self, text_width: int, *, width: int, max_tokens: int) -> None:
        super().__init__()
        self.y_proj = Mlp(text_width, hidden=width, out=width)
        self.register_buffer("y_embedding", torch.empty(max_tokens, text_width))

    def valid_text(self, text_BYE: Tensor, *, text_mask_BY: Tensor | None, drop_caption_B: Tensor | None) -> Tensor:
        """The vectors that take part: dropped captions replaced by the null caption, padding zero.

        Args:
            text_BYE: Vectors of the text encoder, in the model's dtype; what padding holds doesn't matter.
            text_mask_BY: bool, True where a token is valid; a dropped caption keeps its mask.
            drop_caption_B: bool, True where the null caption replaces the sample's.
        Raises:
            ValueError: A caption to drop has more tokens than the null caption.
        """
        Y = text_BYE.shape[1]
        if drop_caption_B is not None:
            if len(self.y_embedding) < Y:
                raise ValueError(
                    f"text has {Y} tokens, the null caption {len(self.y_embedding)}: a caption can be dropped only if it is no "
                    "longer; cut text to the model's max_tokens"
                )
            text_BYE = torch.where(drop_caption_B[:, None, None], self.y_embedding[:Y].to(text_BYE.dtype), text_BYE)
        if text_mask_BY is not None:
            # Attention gives padding a weight of zero, but zero times infinity is NaN: padding must be finite, too.
            text_BYE = text_BYE.masked_fill(~text_mask_BY[:, :, None], 0)
        return text_BYE

    def forward(self, valid_text_BYE: Tensor) -> Tensor:
        """[B, Y, E], as ``valid_text`` gives it, to [B, Y, D]."""
        out: Tensor = self.y_proj(valid_text_BYE)
        return out


class FinalLayer(nn.Module):
    """Tokens to patches of latents, modulated by the timestep embedding itself (not by ``t_block``)."""

    def __init__(self, width: int, *, patch_values: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, patch_values)
        self.scale_shift_table = nn.Parameter(torch.empty(2, width))
        self.tile_tokens: int | None = None
        """Tokens that it works on at once."""

    def forward(self, x_BTSD: Tensor, *, shard: Tokens, t_BD: Tensor) -> Tensor:
        shift_scale = (self.scale_shift_table + t_BD[:, None])[:, :, None, None].unbind(1)
        return shard.each(partial(over_tokens, self._patches, tile_tokens=self.tile_tokens), x_BTSD, of=shift_scale)

    @region
    def _patches(self, x_BTSD: Tensor, shift_B11D: Tensor, scale_B11D: Tensor) -> Tensor:
        out: Tensor = self.linear(norm_modulate(x_BTSD, shift_B11D, scale_B11D))
        return out
