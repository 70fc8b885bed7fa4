"""Attention over few tokens that lie far apart in memory: frames, of one place each."""

# B samples, T frames, S places of a frame, N heads, K head dim, C = N K

from __future__ import annotations

from torch import Tensor

from opensora_dist.ops.attention import attention, triton_takes

_LONGEST = 128
"""Of ``opensora_kernels.short_attention``, which is imported only where it is used."""


def reads_in_place(frames: int, like: Tensor, *, head_dim: int) -> bool:
    """Whether ``frames_attention`` of so many frames reads what a QKV linear gives where it lies: then nobody need transpose its input.

    Args:
        like: What the linear is given.
    """
    return frames <= _LONGEST and triton_takes(like, head_dim=head_dim)


def frames_attention(qkv_BTS3NK: Tensor) -> Tensor:
    """Attention among the frames of each place.

    Args:
        qkv_BTS3NK: What the QKV linear gave; the first three dims may have any strides.
    Returns:
        [B, T, S, C]; where it was read in place, in memory as ``qkv`` is, else with frames innermost.
    """
    B, T, S = qkv_BTS3NK.shape[:3]
    if reads_in_place(T, qkv_BTS3NK, head_dim=qkv_BTS3NK.shape[-1]):
        from opensora_kernels.short_attention import short_attention as kernel

        out: Tensor = kernel(qkv_BTS3NK)
        return out.flatten(3)
    qkv_3GNTK = qkv_BTS3NK.permute(3, 0, 2, 4, 1, 5).flatten(1, 2)
    out_GTC = attention(*qkv_3GNTK.unbind(0)).transpose(1, 2).flatten(2)
    return out_GTC.view(B, S, *out_GTC.shape[1:]).transpose(1, 2)
