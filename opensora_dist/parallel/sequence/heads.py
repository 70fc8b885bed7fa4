"""Schemes that deal heads out to ranks: their rule, and whose rows of a weight are whose."""

# N heads, n of one rank, K head dim

from __future__ import annotations

import torch
from torch import Tensor

from opensora_dist.parallel.sequence.base import BiasedLinear


def heads_problems(name: str, *, size: int, heads: int, joint: bool) -> list[str]:
    """The rule of schemes that give each of ``size`` ranks some of the heads."""
    if heads % size == 0:
        return []
    fits = ", ".join(str(d) for d in range(1, heads + 1) if heads % d == 0)
    other = "ring" if joint else "dsp or ring"
    return [
        f"parallel.sp.degree={size} must divide model.heads={heads} for parallel.sp.scheme={name}, which deals them out; "
        f"use one of {fits}, or parallel.sp.scheme={other}, which has no such rule"
    ]


def rows_of_heads(parameter: Tensor, *, rank: int, size: int) -> Tensor:
    """Of a qkv linear's weight or bias those of one of ``size`` ranks' heads, [3 N K, ...] to [3 n K, ...]; a copy."""
    return parameter.view(3, size, -1, *parameter.shape[1:])[:, rank].flatten(0, 1)


def split_q_kv(qkv: BiasedLinear) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """(weight, bias) of the queries, and those of keys and values together; views, whose gradients come back in one piece."""
    width = len(qkv.weight) // 3
    (q_weight, kv_weight), (q_bias, kv_bias) = (torch.split(p, [width, 2 * width]) for p in (qkv.weight, qkv.bias))
    return (q_weight, q_bias), (kv_weight, kv_bias)
