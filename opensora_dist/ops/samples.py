"""Attention of samples that lie one after the other, each to its own keys: to a caption, or within a pack of any shapes."""

# Q queries of all samples, G samples, Y keys of each, L queries of each of a run, N heads, K head dim

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from opensora_dist.ops.attention import attention, triton_takes
from opensora_dist.ops.choice import current
from opensora_dist.ops.flash import MOST_SEQUENCES, flash_varlen, takes

Runs = Sequence[tuple[int, int]]
"""Samples of a length, one after the other: how many, and tokens of each."""
_SHORT = 512
"""Tokens up to which one call for sequences of many shapes is worth more than kernels made for one: longer sequences fill a GPU shape by
shape, and by tensor core operations that ours has no part in. Not measured yet."""


class Ends:
    """Where samples end, on the device. Of one forward: blocks ask for the same, and it is made once."""

    def __init__(self) -> None:
        self._made: dict[tuple[tuple[int, int], ...], Tensor] = {}

    def of(self, runs: Runs, *, device: torch.device) -> Tensor:
        """int32 [G + 1], 0 and where each sample ends."""
        if torch.compiler.is_compiling():  # nothing made in a graph may be left here
            return _ends(runs, device=device)
        key = tuple(runs)
        if key not in self._made:
            self._made[key] = _ends(runs, device=device)
        return self._made[key]


@dataclass(frozen=True, kw_only=True)
class Captions:
    """Which keys of G captions of Y each take part, and what kernels want to know of that. For all blocks of a forward: ``captions``.

    Args:
        mask_GY: bool, True where a key takes part; None lets all take part.
        k_ends: int32 [G + 1], 0 and where each caption's keys end.
        k_stops: int32 [G]: no key takes part from here on.
        in_order: The same for flash-attn.
        q_ends: Of queries.
    """

    mask_GY: Tensor | None
    k_ends: Tensor | None = None
    k_stops: Tensor | None = None
    in_order: InOrder | None = None
    q_ends: Ends = field(default_factory=Ends)


@dataclass(frozen=True, kw_only=True)
class InOrder:
    """Keys that take part, before those that don't: their order is nothing to attention.

    Args:
        order_M: Keys of all captions. None: as they are.
        real_M2: bool, whether key and value are a caption's: one without any key attends to all, with values of zero, since what a kernel
            does for no key at all is its affair.
        ends: int32 [G + 1], 0 and where those that each caption attends to end.
    """

    order_M: Tensor | None
    real_M2: Tensor | None
    ends: Tensor


def captions(mask_GY: Tensor | None, *, samples: int, keys: int, device: torch.device) -> Captions:
    """Of a forward, for whoever attends by the choice.

    Args:
        mask_GY: bool, True where a key takes part; None lets all take part.
        samples: G.
        keys: Y.
    """
    by_triton, by_flash_attn = current().kernels == "triton", current().attention != "sdpa"
    if not (by_triton or by_flash_attn):
        return Captions(mask_GY=mask_GY)
    k_ends = _ends([(samples, keys)], device=device)
    k_stops = k_ends[1:]
    if mask_GY is not None and by_triton:
        last = (mask_GY * torch.arange(1, keys + 1, dtype=torch.int32, device=device)).amax(dim=1)
        k_stops = k_ends[:-1] + last
    in_order = InOrder(order_M=None, real_M2=None, ends=k_ends)
    if mask_GY is not None and by_flash_attn:
        takes_part_GY = mask_GY | ~mask_GY.any(dim=1, keepdim=True)
        order_M = torch.argsort(~takes_part_GY.flatten(), stable=True)
        real_M2 = torch.stack([takes_part_GY, mask_GY], dim=-1).flatten(0, 1)[order_M]
        ends = F.pad(takes_part_GY.sum(dim=1).cumsum(dim=0), (1, 0)).to(torch.int32)
        in_order = InOrder(order_M=order_M, real_M2=real_M2, ends=ends)
    return Captions(mask_GY=mask_GY, k_ends=k_ends, k_stops=k_stops, in_order=in_order)


def cross_attention(q_QNK: Tensor, kv_GY2NK: Tensor, of: Captions, *, runs: Runs) -> Tensor:
    """Attention of each sample's queries to its keys; zeros for a sample without any.

    Args:
        q_QNK: Queries of all samples.
        kv_GY2NK: Keys and values as a linear gives them.
        of: Made under this choice of operators.
        runs: Of all G samples.
    Returns:
        [Q, N, K].
    """
    if triton_takes(q_QNK, head_dim=q_QNK.shape[-1]):
        return _by_kernel(q_QNK, kv_GY2NK, of, runs=runs)
    if takes(q_QNK) and len(kv_GY2NK) <= MOST_SEQUENCES:
        return _by_flash_attn(q_QNK, kv_GY2NK, of, runs=runs)
    return _by_sdpa(q_QNK, kv_GY2NK, of.mask_GY, runs=runs)


def packed_attention(qkv_Q3NK: Tensor, *, runs: Runs, ends: Ends) -> Tensor:
    """Attention within each of the sequences that lie one after the other: [Q, N, K]."""
    most = max(length for _, length in runs)
    if len(runs) > 1 and most <= _SHORT and triton_takes(qkv_Q3NK, head_dim=qkv_Q3NK.shape[-1]):
        from opensora_kernels.varlen_attention import varlen_attention as kernel

        q_ends = ends.of(runs, device=qkv_Q3NK.device)
        q_Q1NK, kv_Q2NK = torch.split(qkv_Q3NK, [1, 2], dim=1)  # whose gradient is one pass
        packed: Tensor = kernel(q_Q1NK.squeeze(1), kv_Q2NK, q_ends, q_ends, q_ends[1:], None, most, most)[0]
        return packed
    if len(runs) > 1 and takes(qkv_Q3NK) and sum(G for G, _ in runs) <= MOST_SEQUENCES:
        q_ends = ends.of(runs, device=qkv_Q3NK.device)
        return flash_varlen(*qkv_Q3NK.unbind(1), q_ends=q_ends, k_ends=q_ends, most_q=most, most_k=most)
    outs = []
    for (G, length), rows in zip(runs, torch.split(qkv_Q3NK, [G * length for G, length in runs]), strict=True):
        q, k, v = rows.view(G, length, *rows.shape[1:]).permute(2, 0, 3, 1, 4).unbind(0)
        outs.append(attention(q, k, v).transpose(1, 2).flatten(0, 1))
    return outs[0] if len(outs) == 1 else torch.cat(outs)


def _by_kernel(q_QNK: Tensor, kv_GY2NK: Tensor, of: Captions, *, runs: Runs) -> Tensor:
    from opensora_kernels.varlen_attention import varlen_attention as kernel

    assert of.k_ends is not None and of.k_stops is not None
    mask_M = None if of.mask_GY is None else of.mask_GY.flatten()
    q_ends, most = of.q_ends.of(runs, device=q_QNK.device), max(length for _, length in runs)
    kv_M2NK, Y = kv_GY2NK.flatten(0, 1), kv_GY2NK.shape[1]
    out: Tensor = kernel(q_QNK, kv_M2NK, q_ends, of.k_ends, of.k_stops, mask_M, most, Y)[0]
    return out


def _by_flash_attn(q_QNK: Tensor, kv_GY2NK: Tensor, of: Captions, *, runs: Runs) -> Tensor:
    """Putting keys in order costs a copy of them."""
    assert of.in_order is not None
    kv_M2NK, order_M, real_M2 = kv_GY2NK.flatten(0, 1), of.in_order.order_M, of.in_order.real_M2
    if order_M is not None and real_M2 is not None:
        # Elsewhere gradients are undefined, or would be of values that stand for none: these are cut off here.
        kv_M2NK = torch.where(real_M2[:, :, None, None], kv_M2NK[order_M], 0)
    q_ends, most = of.q_ends.of(runs, device=q_QNK.device), max(length for _, length in runs)
    k, v = kv_M2NK.unbind(1)
    return flash_varlen(q_QNK, k, v, q_ends=q_ends, k_ends=of.in_order.ends, most_q=most, most_k=kv_GY2NK.shape[1])


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
    """Made on the device, where a list's way there would be waited for."""
    ends, first = [torch.zeros(1, dtype=torch.int32, device=device)], 0
    for count, length in runs:
        ends.append(torch.arange(1, count + 1, dtype=torch.int32, device=device) * length + first)
        first += count * length
    return torch.cat(ends)
