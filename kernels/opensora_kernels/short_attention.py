"""Attention along a short axis (frames): every sequence fits a tile, so nothing is rescaled, and what the linear gave is read in place.

A flash kernel gives a sequence of 16 a tile of 128 rows, and wants its tokens side by side, which costs a copy of q, k and v each. Here a
program takes all positions of one sequence and head: whole softmax in registers, queries, keys and values by their strides. It moves
3 + 1 numbers per token and channel forward, 4 + 3 backward, and is bound by that.
"""

# B samples, T frames (the sequence), S places of a frame, N heads, K head dim; LO, HI: the two parts of K that are powers of two

from __future__ import annotations

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from opensora_kernels.products import head_parts, load_tile, product, rows_of, store_tile

LONGEST = 128
"""Frames at most: a tile of scores of one head has to lie in registers."""


def reference(qkv_BTS3NK: Tensor) -> Tensor:
    """``softmax(q k^T / sqrt(K)) v`` over frames, at each place by itself; [B, T, S, N, K]."""
    q, k, v = qkv_BTS3NK.permute(3, 0, 2, 4, 1, 5).flatten(1, 2)  # [3, BS, N, T, K]
    out = F.scaled_dot_product_attention(q, k, v)
    return out.unflatten(0, (qkv_BTS3NK.shape[0], qkv_BTS3NK.shape[2])).permute(0, 3, 1, 2, 4)


@torch.library.custom_op("opensora::short_attention", mutates_args=())
def short_attention(qkv_BTS3NK: Tensor) -> Tensor:
    """As ``reference``, with scores and sums in float32.

    Args:
        qkv_BTS3NK: As the linear gives it. T at most ``LONGEST``.
    Returns:
        [B, T, S, N, K], contiguous: the next linear reads it as it is.
    """
    B, T, S, _, N, K = qkv_BTS3NK.shape
    assert T <= LONGEST, f"{T} frames; a tile holds {LONGEST}"
    qkv = qkv_BTS3NK.contiguous()
    out = torch.empty((B, T, S, N, K), dtype=qkv.dtype, device=qkv.device)
    if out.numel():
        _forward[(B * S, N)](qkv, out, S, T, N, K, K**-0.5, *_tile(T, K), num_warps=_warps(T))
    return out


@short_attention.register_fake
def _(qkv_BTS3NK: Tensor) -> Tensor:
    B, T, S, _, N, K = qkv_BTS3NK.shape
    return qkv_BTS3NK.new_empty((B, T, S, N, K))


@torch.library.custom_op("opensora::short_attention_backward", mutates_args=())
def short_attention_backward(grad_BTSNK: Tensor, qkv_BTS3NK: Tensor) -> Tensor:
    """Gradient of qkv. Scores are computed again: they were never in memory."""
    B, T, S, _, N, K = qkv_BTS3NK.shape
    qkv, dqkv = qkv_BTS3NK.contiguous(), torch.empty(qkv_BTS3NK.shape, dtype=qkv_BTS3NK.dtype, device=qkv_BTS3NK.device)
    if qkv.numel():
        _backward[(B * S, N)](grad_BTSNK.contiguous(), qkv, dqkv, S, T, N, K, K**-0.5, *_tile(T, K), num_warps=_warps(T))
    return dqkv


@short_attention_backward.register_fake
def _(grad_BTSNK: Tensor, qkv_BTS3NK: Tensor) -> Tensor:
    return qkv_BTS3NK.new_empty(qkv_BTS3NK.shape)


def _keep(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs)


def _gradients(ctx, grad_BTSNK: Tensor):
    return short_attention_backward(grad_BTSNK, *ctx.saved_tensors)


short_attention.register_autograd(_gradients, setup_context=_keep)


def _tile(T: int, K: int) -> tuple[int, int, int]:
    return rows_of(T, most=LONGEST), *head_parts(K)


def _warps(T: int) -> int:
    return 1 if T <= 16 else 4 if T <= 32 else 8


@triton.jit
def _probabilities(scores, row, T, scale):
    """Softmax over the columns that are frames."""
    scores = tl.where(row[None, :] < T, scores * scale, float("-inf"))
    p = tl.exp(scores - tl.max(scores, axis=1)[:, None])
    return p / tl.sum(p, axis=1)[:, None]


@triton.jit
def _forward(qkv, out, S, T, N, K, scale, ROWS: tl.constexpr, LO: tl.constexpr, HI: tl.constexpr):
    place = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    first = (place // S) * T * S + place % S  # token of the first frame
    q = qkv + (first * 3 * N + head) * K
    to = out + (first * N + head) * K
    k = q + N * K
    v = k + N * K
    step = S * 3 * N * K  # to the same place of the next frame
    row = tl.arange(0, ROWS)
    low = tl.arange(0, LO)
    scores = product(load_tile(q, row, low, step, T, K), tl.trans(load_tile(k, row, low, step, T, K)))
    if HI > 0:
        high = LO + tl.arange(0, HI)
        scores += product(load_tile(q, row, high, step, T, K), tl.trans(load_tile(k, row, high, step, T, K)))
    p = _probabilities(scores, row, T, scale).to(qkv.dtype.element_ty)
    store_tile(to, row, low, S * N * K, T, K, product(p, load_tile(v, row, low, step, T, K)))
    if HI > 0:
        high = LO + tl.arange(0, HI)
        store_tile(to, row, high, S * N * K, T, K, product(p, load_tile(v, row, high, step, T, K)))


@triton.jit
def _backward(grad, qkv, dqkv, S, T, N, K, scale, ROWS: tl.constexpr, LO: tl.constexpr, HI: tl.constexpr):
    place = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    first = (place // S) * T * S + place % S
    of_qkv = (first * 3 * N + head) * K
    q = qkv + of_qkv
    k = q + N * K
    v = k + N * K
    dq = dqkv + of_qkv
    dk = dq + N * K
    dv = dk + N * K
    do = grad + (first * N + head) * K
    step = S * 3 * N * K
    row = tl.arange(0, ROWS)
    low = tl.arange(0, LO)
    q_low = load_tile(q, row, low, step, T, K)
    k_low = load_tile(k, row, low, step, T, K)
    do_low = load_tile(do, row, low, S * N * K, T, K)
    scores = product(q_low, tl.trans(k_low))
    dp = product(do_low, tl.trans(load_tile(v, row, low, step, T, K)))
    if HI > 0:
        high = LO + tl.arange(0, HI)
        q_high = load_tile(q, row, high, step, T, K)
        k_high = load_tile(k, row, high, step, T, K)
        do_high = load_tile(do, row, high, S * N * K, T, K)
        scores += product(q_high, tl.trans(k_high))
        dp += product(do_high, tl.trans(load_tile(v, row, high, step, T, K)))
    p = tl.where(row[:, None] < T, _probabilities(scores, row, T, scale), 0.0)
    ds = (p * (dp - tl.sum(p * dp, axis=1)[:, None]) * scale).to(qkv.dtype.element_ty)
    p = p.to(qkv.dtype.element_ty)
    store_tile(dv, row, low, step, T, K, product(tl.trans(p), do_low))
    store_tile(dq, row, low, step, T, K, product(ds, k_low))
    store_tile(dk, row, low, step, T, K, product(tl.trans(ds), q_low))
    if HI > 0:
        high = LO + tl.arange(0, HI)
        store_tile(dv, row, high, step, T, K, product(tl.trans(p), do_high))
        store_tile(dq, row, high, step, T, K, product(ds, k_high))
        store_tile(dk, row, high, step, T, K, product(tl.trans(ds), q_high))
