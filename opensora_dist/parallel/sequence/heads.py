"""Schemes that deal heads out to ranks: their rule, and how rows are packed on the way to the heads and back."""

# l positions on this rank, G sequences, N heads, n of one rank, K head dim; u ranks of the group, R rows of a message

from __future__ import annotations

import torch
from torch import Tensor, nn


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


def pack_heads(x_lGNK: Tensor, *, parts: int) -> Tensor:
    """One message for each rank of a group, each of all rows with that rank's heads.

    Args:
        x_lGNK: Position first; dims between G and N, such as those of keys and values, go along.
        parts: Ranks of the group; divides N.
    Returns:
        [u l G, ... n K], contiguous; a view where there is one part.
    """
    *rows, N, K = x_lGNK.shape
    x_ulGnK = x_lGNK.view(*rows, parts, N // parts, K).movedim(-3, 0)
    return x_ulGnK.reshape(parts * rows[0] * rows[1], -1)


def unpack_heads(rows_RD: Tensor, *, parts: int, sequences: int, head_dim: int) -> Tensor:
    """Back from what each rank of a group gives of its heads: [u l G, n K] to [l, G, N K].

    Args:
        parts: Ranks of the group.
        sequences: G.
        head_dim: K.
    """
    n = rows_RD.shape[1] // head_dim
    return rows_RD.view(parts, -1, sequences, n, head_dim).permute(1, 2, 0, 3, 4).flatten(2)


def split_q_kv(qkv: nn.Linear) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """(weight, bias) of the queries, and those of keys and values together; views, whose gradients come back in one piece."""
    width = qkv.in_features
    (q_weight, kv_weight), (q_bias, kv_bias) = (torch.split(p, [width, 2 * width]) for p in (qkv.weight, qkv.bias))
    return (q_weight, q_bias), (kv_weight, kv_bias)
