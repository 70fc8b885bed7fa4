"""Attention of samples that lie one after the other, each to its own keys: to a caption, or within a pack of any shapes."""

# Q queries of all samples, G samples, Y keys of each, L queries of each of a run, N heads, K head dim

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from opensora_dist.ops.attention import attention
from opensora_dist.ops.choice import current
from opensora_dist.ops.flash import flash_varlen, takes

Runs = Sequence[tuple[int, int]]
"""Samples of a length, one after the other: how many, and tokens of each."""
_SHORT = 512
"""Tokens up to which one call for sequences of many shapes is worth more than kernels made for one: longer sequences fill a GPU shape by
shape, and by tensor core operations that ours has no part in. Not measured yet."""


def cross_attention(q_QNK: Tensor, kv_GY2NK: Tensor, mask_GY: Tensor | None, *, runs: Runs) -> Tensor:
    """Attention of each sample's queries to its keys; zeros for a sample without any.

    Args:
        q_QNK: Queries of all samples.
        kv_GY2NK: Keys and values as a linear gives them.
        mask_GY: bool, True where a key takes part; None lets all take part.
        runs: Of all G samples.
    Returns:
        [Q, N, K].
    """
    if current().kernels == "triton" and q_QNK.dtype != torch.float64:
        return _by_kernel(q_QNK, kv_GY2NK, mask_GY, runs=runs)
    if takes(q_QNK):
        return _by_flash_attn(q_QNK, kv_GY2NK, mask_GY, runs=runs)
    return _by_sdpa(q_QNK, kv_GY2NK, mask_GY, runs=runs)


def packed_attention(qkv_Q3NK: Tensor, *, runs: Runs) -> Tensor:
    """Attention within each of the sequences that lie one after the other: [Q, N, K]."""
    if len(runs) > 1:
        ends = [_ends(runs, device=qkv_Q3NK.device)] * 2
        most = max(length for _, length in runs)
        if takes(qkv_Q3NK):
            return flash_varlen(*qkv_Q3NK.unbind(1), q_ends=ends[0], k_ends=ends[1], most_q=most, most_k=most)
        if current().kernels == "triton" and most <= _SHORT and qkv_Q3NK.dtype != torch.float64:
            from opensora_kernels.varlen_attention import varlen_attention as kernel

            q_Q1NK, kv_Q2NK = torch.split(qkv_Q3NK, [1, 2], dim=1)  # whose gradient is one pass
            packed: Tensor = kernel(q_Q1NK.squeeze(1), kv_Q2NK, *ends, ends[0][1:], None, most, most)[0]
            return packed
    outs = []
    for (G, length), rows in zip(runs, torch.split(qkv_Q3NK, [G * length for G, length in runs]), strict=True):
        q, k, v = rows.view(G, length, *rows.shape[1:]).permute(2, 0, 3, 1, 4).unbind(0)
        outs.append(attention(q, k, v).transpose(1, 2).flatten(0, 1))
    return outs[0] if len(outs) == 1 else torch.cat(outs)


def _by_kernel(q_QNK: Tensor, kv_GY2NK: Tensor, mask_GY: Tensor | None, *, runs: Runs) -> Tensor:
    from opensora_kernels.varlen_attention import varlen_attention as kernel

    G, Y = kv_GY2NK.shape[:2]
    q_ends, k_ends = _ends(runs, device=q_QNK.device), _ends([(G, Y)], device=q_QNK.device)
    stops, mask_M = k_ends[1:], None
    if mask_GY is not None:
        last = (mask_GY * torch.arange(1, Y + 1, dtype=torch.int32, device=q_QNK.device)).amax(dim=1)
        stops, mask_M = k_ends[:-1] + last, mask_GY.flatten()
    most = max(length for _, length in runs)
    out: Tensor = kernel(q_QNK, kv_GY2NK.flatten(0, 1), q_ends, k_ends, stops, mask_M, most, Y)[0]
    return out


def _by_flash_attn(q_QNK: Tensor, kv_GY2NK: Tensor, mask_GY: Tensor | None, *, runs: Runs) -> Tensor:
    """Keys that take part are put before the others, which costs a copy of them; their order is nothing to attention."""
    G, Y = kv_GY2NK.shape[:2]
    kv_M2NK, k_ends = kv_GY2NK.flatten(0, 1), _ends([(G, Y)], device=q_QNK.device)
    if mask_GY is not None:
        # What a kernel does for no key at all is its affair: a sample without keys attends to all, with values of zero.
        empty_G1 = ~mask_GY.any(dim=1, keepdim=True)
        takes_part_GY = mask_GY | empty_G1
        order_M = torch.argsort(~takes_part_GY.flatten(), stable=True)
        # Elsewhere gradients are undefined, or would be of values that stand for none: these are cut off here.
        real = torch.stack([takes_part_GY, mask_GY], dim=-1).flatten(0, 1)[order_M]
        kv_M2NK = torch.where(real[:, :, None, None], kv_M2NK[order_M], 0)
        k_ends = F.pad(takes_part_GY.sum(dim=1).cumsum(dim=0), (1, 0)).to(torch.int32)
    q_ends, most = _ends(runs, device=q_QNK.device), max(length for _, length in runs)
    return flash_varlen(q_QNK, *kv_M2NK.unbind(1), q_ends=q_ends, k_ends=k_ends, most_q=most, most_k=Y)


def _by_sdpa(q_QNK: Tensor, kv_GY2NK: Tensor, mask_GY: Tensor | None, *, runs: Runs) -> Tensor:
    counts = [count for count, _ in runs]
    masks = [None] * len(runs) if mask_GY is None else torch.split(mask_GY, counts)
    queries = torch.split(q_QNK, [count * length for count, length in runs])
    outs = []
    for (count, length), q, kv, mask in zip(runs, queries, torch.split(kv_GY2NK, counts), masks, strict=True):
        k, v = kv.permute(2, 0, 3, 1, 4).unbind(0)
        outs.append(
            attention(q.view(count, length, *q.shape[1:]).transpose(1, 2), k, v, mask_BM=mask).transpose(1, 2).flatten(0, 1)
        )
    return outs[0] if len(outs) == 1 else torch.cat(outs)


def _ends(runs: Runs, *, device: torch.device) -> Tensor:
    """int32 [G + 1], 0 and where each sample ends; made on the device, where a list's way there would be waited for."""
    ends, first = [torch.zeros(1, dtype=torch.int32, device=device)], 0
    for count, length in runs:
        ends.append(torch.arange(1, count + 1, dtype=torch.int32, device=device) * length + first)
        first += count * length
    return torch.cat(ends)
