"""flash-attn 2 and 3, where a user has one: found at run time, never required."""

# B batch, N heads, L queries, M keys, K head dim, Q queries and M keys of all samples together

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from opensora_dist.ops.choice import current

_MAX_HEAD = 256
MOST_SEQUENCES = 65_535
"""Of one call. Flash attention's kernels, torch's and the package's, put sequences on a grid axis on which CUDA allows no more, and
nobody looks at that (torch 2.11 to 2.13; pytorch issue 146704, flash-attention issue 1786): the launch fails with "invalid configuration
argument"."""


def takes(tensor: Tensor) -> bool:
    """Whether the choice is flash-attn, and it computes with tensors like this one, [..., K]."""
    return (
        current().attention in ("flash_attn_2", "flash_attn_3")
        and tensor.dtype in (torch.float16, torch.bfloat16)
        and tensor.shape[-1] <= _MAX_HEAD
        and tensor.shape[-1] % 8 == 0
    )


def flash_attention(q_BNLK: Tensor, k_BNMK: Tensor, v_BNMK: Tensor) -> Tensor:
    """``ops.attention.attention`` by flash-attn, which has tokens before heads. At most ``MOST_SEQUENCES``."""
    q, k, v = dense_rows(*(tensor.transpose(1, 2) for tensor in (q_BNLK, k_BNMK, v_BNMK)))
    return _first(_module().flash_attn_func(q, k, v)).transpose(1, 2)


def flash_varlen(
    q_QNK: Tensor, k_MNK: Tensor, v_MNK: Tensor, *, q_ends: Tensor, k_ends: Tensor, most_q: int, most_k: int
) -> Tensor:
    """Attention of each sample to its own keys; every sample with queries has keys. At most ``MOST_SEQUENCES`` of them.

    Args:
        q_QNK: Queries of all samples, one sample after the other.
        q_ends: int32 [G + 1]: sample g has the queries from q_ends[g] to q_ends[g + 1].
        k_ends: Likewise, of keys; those after the last are nobody's, and what comes as their gradient is undefined.
        most_q: No sample has more.
    Returns:
        [Q, N, K].
    """
    q, k, v = dense_rows(q_QNK, k_MNK, v_MNK)
    return _first(_module().flash_attn_varlen_func(q, k, v, q_ends, k_ends, most_q, most_k))


def _module() -> Any:
    if current().attention == "flash_attn_3":
        import flash_attn_interface  # type: ignore[import-not-found]

        return flash_attn_interface
    import flash_attn  # type: ignore[import-not-found]

    return flash_attn


def _first(given: Tensor | tuple[Tensor, ...]) -> Tensor:
    """The output; builds of version 3 from before autumn 2025 give the log-sum-exp with it, asked or not."""
    return given if isinstance(given, Tensor) else given[0]


def dense_rows(*tensors: Tensor) -> tuple[Tensor, ...]:
    """With the head dim contiguous, which kernels take for granted; gradients that were broadcast come without."""
    return tuple(tensor if tensor.stride(-1) == 1 else tensor.contiguous() for tensor in tensors)
