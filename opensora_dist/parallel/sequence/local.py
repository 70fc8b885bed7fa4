"""No scheme: the sequences are whole on this rank."""

# B batch, T frames, S tokens per frame, D width, G sequences, L tokens of a sequence, N heads, K head dim

from __future__ import annotations

from torch import Tensor

from opensora_dist.core.types import Axis, Thw
from opensora_dist.ops.attention import attention
from opensora_dist.ops.frames import frames_attention, reads_in_place
from opensora_dist.parallel.sequence.base import Projections, Scheme, Shard, Traffic


def self_attention(attn: Projections, x_GLD: Tensor) -> Tensor:
    """Projections and attention over whole sequences, [G, L, D] to [G, L, D]."""
    qkv_GLE = attn.qkv(x_GLD)
    q_GNLK, k_GNLK, v_GNLK = qkv_GLE.view(*qkv_GLE.shape[:2], 3, attn.heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
    out: Tensor = attn.proj(attention(q_GNLK, k_GNLK, v_GNLK).transpose(1, 2).flatten(2))
    return out


class Local(Scheme):
    """Attention among tokens that are all here."""

    name = "local"

    def problems(self, grid: Thw, *, size: int, heads: int, joint: bool) -> list[str]:
        return []

    def bytes_sent(self, shard: Shard, axis: Axis, *, batch: int, width: int, element_bytes: int) -> Traffic:
        return Traffic(forward=0, backward=0)

    def attend(self, attn: Projections, x_BtsD: Tensor, axis: Axis, shard: Shard) -> Tensor:
        """For ``Axis.TIME`` the result may be a transposed view."""
        B, T, S, _ = x_BtsD.shape
        if axis is Axis.SPACE:
            return self_attention(attn, x_BtsD.flatten(0, 1)).view(x_BtsD.shape)
        if axis is Axis.TIME:
            if reads_in_place(T, x_BtsD, head_dim=attn.head_dim):
                qkv_BTS3NK = attn.qkv(x_BtsD).view(B, T, S, 3, attn.heads, -1)
                out: Tensor = attn.proj(frames_attention(qkv_BTS3NK))
                return out
            # Transposing the input moves D numbers per token; transposing q, k and v would move 3 D.
            return self_attention(attn, x_BtsD.transpose(1, 2).flatten(0, 1)).view(B, S, T, -1).transpose(1, 2)
        return self_attention(attn, x_BtsD.flatten(1, 2)).view(x_BtsD.shape)


def whole(grid: Thw) -> Shard:
    """A sample that is whole on this rank."""
    return Shard(grid=grid, by_rows=False, sizes=(grid.t,), scheme=Local(), local=Local(), links=None)
