"""Softmax attention, behind one function so that a faster kernel has one place to go."""

# B batch, N heads, L queries, M keys, K head dim

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

# Flash attention's kernels put the batch on a grid axis on which CUDA allows no more, and torch's choice of a kernel doesn't look
# at that (2.11 to 2.13; pytorch issue 146704): the launch fails with "invalid configuration argument". Attention over time has a
# batch of samples x tokens per frame: 19 clips of 720p are enough. The memory-efficient kernel cuts its batch itself.
_CUDA_MAX_BATCH = 65_535


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
        return _attend_in_parts(q_BNLK, k_BNMK, v_BNMK, max_batch=_CUDA_MAX_BATCH if q_BNLK.is_cuda else len(q_BNLK))
    # A softmax over nothing is NaN in some kernels, forward or backward. So a sample without keys attends to all of them, with
    # values of zero: that costs a copy of the values, not of the (much larger) output.
    empty_B1 = ~mask_BM.any(dim=1, keepdim=True)
    v_BNMK = v_BNMK.masked_fill(empty_B1[:, :, None, None], 0)
    return F.scaled_dot_product_attention(q_BNLK, k_BNMK, v_BNMK, attn_mask=(mask_BM | empty_B1)[:, None, None])


def _attend_in_parts(q_BNLK: Tensor, k_BNMK: Tensor, v_BNMK: Tensor, *, max_batch: int) -> Tensor:
    if len(q_BNLK) <= max_batch:
        return F.scaled_dot_product_attention(q_BNLK, k_BNMK, v_BNMK)
    parts = zip(*(torch.split(tensor, max_batch) for tensor in (q_BNLK, k_BNMK, v_BNMK)))
    return torch.cat([F.scaled_dot_product_attention(*part) for part in parts])
