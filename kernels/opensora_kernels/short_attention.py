"""Attention along a short axis (frames): every sequence fits a tile, so nothing is rescaled, and what the linear gave is read in place.

A flash kernel gives a sequence of 16 a tile of 128 rows, and wants its tokens side by side, which costs a copy of q, k and v each. Here a
program takes all positions of one sequence and head: whole softmax in registers, queries, keys and values by their strides.

What limits it: memory. It moves 3 + 1 numbers per token and channel forward and 4 + 3 backward, for 4 T and 10 T operations: at 64 frames
32 and 46 for each byte in bfloat16, where an H100's tensor cores want 295. So programs next to each other take heads next to each other
(a token's row is read as a whole, though a head of 72 is 144 bytes of it); head dim and heads are constants, or the compiler couldn't know
that every row starts at a multiple of 16 bytes, and would load number by number; and a program asks for all that it will read before it
computes. It has a warp per 16 rows, so that at every T a thread holds as much, and registers bound how many programs run side by side.
Beyond 64 frames a tile of scores takes so many that an A100 spills some in backward.
"""

# B samples, T frames (the sequence), S places of a frame, N heads, K head dim; LO, HI: the two parts of K that are powers of two

from __future__ import annotations

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from opensora_kernels.products import WIDEST_HEAD, head_parts, load_tile, product, rows_of, store_tile
from opensora_kernels.rows import dense_rows

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
        qkv_BTS3NK: As the linear gives it, or rows that came from other ranks: the first three dims may have any strides. T at most
            ``LONGEST``, K at most ``WIDEST_HEAD``. float16 or bfloat16: of float32, products take no tensor core and a
            thread spills kilobytes; that is for Triton's interpreter alone.
    Returns:
        [B, T, S, N, K], dense, its first three dims in memory in the order of those of ``qkv_BTS3NK``.
    """
    B, T, S, _, N, K = qkv_BTS3NK.shape
    assert T <= LONGEST, f"{T} frames; a tile holds {LONGEST}"
    assert K <= WIDEST_HEAD, f"heads of {K}; a tile holds {WIDEST_HEAD}"
    qkv, out = dense_rows(qkv_BTS3NK, dims=3), _like(qkv_BTS3NK, (N, K))
    if out.numel():
        steps = (qkv.stride()[:3], out.stride()[:3])
        _short_attention_forward[(B * S * N,)](qkv, out, S, T, *steps, K**-0.5, N, K, *_tile(T, K), num_warps=_warps(T))
    return out


@short_attention.register_fake
def _(qkv_BTS3NK: Tensor) -> Tensor:
    return _like(qkv_BTS3NK, tuple(qkv_BTS3NK.shape[4:]))


@torch.library.custom_op("opensora::short_attention_backward", mutates_args=())
def short_attention_backward(grad_BTSNK: Tensor, qkv_BTS3NK: Tensor) -> Tensor:
    """Gradient of qkv, in memory as qkv is. Scores are computed again: they were never in memory."""
    B, T, S, _, N, K = qkv_BTS3NK.shape
    grad, qkv, dqkv = dense_rows(grad_BTSNK, dims=2), dense_rows(qkv_BTS3NK, dims=3), _like(qkv_BTS3NK, (3, N, K))
    if qkv.numel():
        steps = (grad.stride()[:3], qkv.stride()[:3], dqkv.stride()[:3])
        _short_attention_backward[(B * S * N,)](grad, qkv, dqkv, S, T, *steps, K**-0.5, N, K, *_tile(T, K), num_warps=_warps(T))
    return dqkv


@short_attention_backward.register_fake
def _(grad_BTSNK: Tensor, qkv_BTS3NK: Tensor) -> Tensor:
    return _like(qkv_BTS3NK, tuple(qkv_BTS3NK.shape[3:]))


def _keep(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs)


def _gradients(ctx, grad_BTSNK: Tensor):
    return short_attention_backward(grad_BTSNK, *ctx.saved_tensors)


short_attention.register_autograd(_gradients, setup_context=_keep)


def _like(qkv_BTS3NK: Tensor, row: tuple[int, ...]) -> Tensor:
    """Dense [B, T, S, *row], tokens in memory in the order of ``qkv_BTS3NK``'s."""
    shape = (*qkv_BTS3NK.shape[:3], *row)
    order = sorted(range(3), key=lambda dim: -qkv_BTS3NK.stride(dim))
    return torch.empty_permuted(shape, (*order, *range(3, len(shape))), dtype=qkv_BTS3NK.dtype, device=qkv_BTS3NK.device)


def _tile(T: int, K: int) -> tuple[int, int, int]:
    return rows_of(T, most=LONGEST), *head_parts(K)


def _warps(T: int) -> int:
    return rows_of(T, most=LONGEST) // 16


@triton.jit
def _probabilities(scores, row, T, scale):
    """Softmax over the columns that are frames."""
    scores = tl.where(row[None, :] < T, scores * scale, float("-inf"))
    p = tl.exp(scores - tl.max(scores, axis=1)[:, None])
    return p / tl.sum(p, axis=1)[:, None]


@triton.jit
def _place(S, N: tl.constexpr):
    """Sample, place and head of a program; heads side by side."""
    program = tl.program_id(0)
    place = program // N
    return (place // S).to(tl.int64), (place % S).to(tl.int64), program % N


@triton.jit(do_not_specialize=["S", "T"])
def _short_attention_forward(
    qkv, out, S, T, qkv_steps, out_steps, scale,
    N: tl.constexpr, K: tl.constexpr, ROWS: tl.constexpr, LO: tl.constexpr, HI: tl.constexpr,
):  # fmt: skip
    b, s, head = _place(S, N)
    q = qkv + b * qkv_steps[0] + s * qkv_steps[2] + head * K
    to = out + b * out_steps[0] + s * out_steps[2] + head * K
    k = q + N * K
    v = k + N * K
    row = tl.arange(0, ROWS)
    low = tl.arange(0, LO)
    q_low = load_tile(q, row, low, qkv_steps[1], T, K)
    k_low = load_tile(k, row, low, qkv_steps[1], T, K)
    v_low = load_tile(v, row, low, qkv_steps[1], T, K)
    if HI > 0:
        high = LO + tl.arange(0, HI)
        q_high = load_tile(q, row, high, qkv_steps[1], T, K)
        k_high = load_tile(k, row, high, qkv_steps[1], T, K)
        v_high = load_tile(v, row, high, qkv_steps[1], T, K)
        scores = product(q_low, tl.trans(k_low)) + product(q_high, tl.trans(k_high))
        p = _probabilities(scores, row, T, scale).to(qkv.dtype.element_ty)
        store_tile(to, row, high, out_steps[1], T, K, product(p, v_high))
    else:
        p = _probabilities(product(q_low, tl.trans(k_low)), row, T, scale).to(qkv.dtype.element_ty)
    store_tile(to, row, low, out_steps[1], T, K, product(p, v_low))


@triton.jit(do_not_specialize=["S", "T"])
def _short_attention_backward(
    grad, qkv, dqkv, S, T, grad_steps, qkv_steps, dqkv_steps, scale,
    N: tl.constexpr, K: tl.constexpr, ROWS: tl.constexpr, LO: tl.constexpr, HI: tl.constexpr,
):  # fmt: skip
    b, s, head = _place(S, N)
    do = grad + b * grad_steps[0] + s * grad_steps[2] + head * K
    q = qkv + b * qkv_steps[0] + s * qkv_steps[2] + head * K
    dq = dqkv + b * dqkv_steps[0] + s * dqkv_steps[2] + head * K
    k = q + N * K
    v = k + N * K
    dk = dq + N * K
    dv = dk + N * K
    row = tl.arange(0, ROWS)
    low = tl.arange(0, LO)
    q_low = load_tile(q, row, low, qkv_steps[1], T, K)
    k_low = load_tile(k, row, low, qkv_steps[1], T, K)
    v_low = load_tile(v, row, low, qkv_steps[1], T, K)
    do_low = load_tile(do, row, low, grad_steps[1], T, K)
    if HI > 0:
        high = LO + tl.arange(0, HI)
        q_high = load_tile(q, row, high, qkv_steps[1], T, K)
        k_high = load_tile(k, row, high, qkv_steps[1], T, K)
        v_high = load_tile(v, row, high, qkv_steps[1], T, K)
        do_high = load_tile(do, row, high, grad_steps[1], T, K)
        scores = product(q_low, tl.trans(k_low)) + product(q_high, tl.trans(k_high))
        dp = product(do_low, tl.trans(v_low)) + product(do_high, tl.trans(v_high))
    else:
        scores = product(q_low, tl.trans(k_low))
        dp = product(do_low, tl.trans(v_low))
    p = tl.where(row[:, None] < T, _probabilities(scores, row, T, scale), 0.0)
    ds = (p * (dp - tl.sum(p * dp, axis=1)[:, None]) * scale).to(qkv.dtype.element_ty)
    p = p.to(qkv.dtype.element_ty)
    store_tile(dv, row, low, dqkv_steps[1], T, K, product(tl.trans(p), do_low))
    store_tile(dq, row, low, dqkv_steps[1], T, K, product(ds, k_low))
    store_tile(dk, row, low, dqkv_steps[1], T, K, product(tl.trans(ds), q_low))
    if HI > 0:
        store_tile(dv, row, high, dqkv_steps[1], T, K, product(tl.trans(p), do_high))
        store_tile(dq, row, high, dqkv_steps[1], T, K, product(ds, k_high))
        store_tile(dk, row, high, dqkv_steps[1], T, K, product(tl.trans(ds), q_high))
