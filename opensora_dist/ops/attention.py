"""Softmax attention, behind one function so that a faster kernel has one place to go."""

# B batch, N heads, L queries, M keys, K head dim

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def attention(q_BNLK: Tensor, k_BNMK: Tensor, v_BNMK: Tensor, *, mask_BM: Tensor | None = None) -> Tensor:
    """``softmax(q k^T / sqrt(K)) v`` over the keys that take part.

    Args:
        q_BNLK: Queries; any strides.
        k_BNMK: Keys.
        v_BNMK: Values.
        mask_BM: bool, True where a key takes part; None lets all take part. A sample without any key gets zeros.
    Returns:
        [B, N, L, K].
    """
    if mask_BM is None:
        return F.scaled_dot_product_attention(q_BNLK, k_BNMK, v_BNMK)
    # A softmax over nothing is NaN in some kernels, forward or backward. So a sample without keys attends to all of them, with
    # values of zero: that costs a copy of the values, not of the (much larger) output.
    empty_B1 = ~mask_BM.any(dim=1, keepdim=True)
    v_BNMK = v_BNMK.masked_fill(empty_B1[:, :, None, None], 0)
    return F.scaled_dot_product_attention(q_BNLK, k_BNMK, v_BNMK, attn_mask=(mask_BM | empty_B1)[:, None, None])
