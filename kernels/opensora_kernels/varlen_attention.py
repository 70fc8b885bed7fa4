"""Block-diagonal attention: queries and keys of many samples side by side, each sample's queries meeting its own keys alone.

For captions of unequal length (cross-attention) and for packs of clips of any shape (self-attention). A tile of queries may hold the end
of one sample and the start of the next: it walks over the keys of all its samples, and a score counts where both are of one sample. So
short samples share tiles, and nothing is padded.
"""

# Q queries and M keys of all samples together, G samples, N heads, K head dim; LO, HI: its two parts

from __future__ import annotations

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from opensora_kernels.products import head_parts, load_tile, product, store_tile

_ROWS, _COLUMNS, _WARPS = 64, 64, 8


def reference(q_QNK: Tensor, k_MNK: Tensor, v_MNK: Tensor, q_ends: Tensor, k_ends: Tensor) -> Tensor:
    """Attention sample by sample; zeros for one that has no key.

    Args:
        q_QNK: Queries of all samples, one sample after the other.
        k_MNK: Keys, likewise.
        v_MNK: Values.
        q_ends: int32 [G + 1]: sample g has the queries from q_ends[g] to q_ends[g + 1].
        k_ends: int32 [G + 1], of keys.
    """
    outs = []
    for g in range(len(q_ends) - 1):
        q = q_QNK[q_ends[g] : q_ends[g + 1]].transpose(0, 1)
        k, v = (t[k_ends[g] : k_ends[g + 1]].transpose(0, 1) for t in (k_MNK, v_MNK))
        outs.append(
            F.scaled_dot_product_attention(q, k, v).transpose(0, 1) if k.shape[1] else torch.zeros_like(q).transpose(0, 1)
        )
    return torch.cat(outs)


@torch.library.custom_op("opensora::varlen_attention", mutates_args=())
def varlen_attention(q_QNK: Tensor, k_MNK: Tensor, v_MNK: Tensor, q_ends: Tensor, k_ends: Tensor) -> tuple[Tensor, Tensor]:
    """As ``reference``, with scores and sums in float32.

    Returns:
        [Q, N, K], and the log of each query's sum of exponentials, float32 [N, Q]; 0 where there is no key.
    """
    (Q, N, K), M = q_QNK.shape, len(k_MNK)
    q, k, v = (t.contiguous() for t in (q_QNK, k_MNK, v_MNK))
    out, lse = torch.empty_like(q), torch.empty((N, Q), dtype=torch.float32, device=q.device)
    of_q, of_k = _samples(q_ends, Q), _samples(k_ends, M)
    if q.numel():
        grid = (triton.cdiv(Q, _ROWS), N)
        _forward[grid](
            q, k, v, out, lse, of_q, of_k, k_ends, Q, M, N, K, K**-0.5, _ROWS, _COLUMNS, *head_parts(K), num_warps=_WARPS
        )
    return out, lse


@varlen_attention.register_fake
def _(q_QNK: Tensor, k_MNK: Tensor, v_MNK: Tensor, q_ends: Tensor, k_ends: Tensor) -> tuple[Tensor, Tensor]:
    Q, N, _ = q_QNK.shape
    return q_QNK.new_empty(q_QNK.shape), q_QNK.new_empty((N, Q), dtype=torch.float32)


@torch.library.custom_op("opensora::varlen_attention_backward", mutates_args=())
def varlen_attention_backward(
    grad_QNK: Tensor, q_QNK: Tensor, k_MNK: Tensor, v_MNK: Tensor, out_QNK: Tensor, lse_NQ: Tensor, q_ends: Tensor, k_ends: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of queries, keys and values."""
    (Q, N, K), M = q_QNK.shape, len(k_MNK)
    grad, q, k, v = (t.contiguous() for t in (grad_QNK, q_QNK, k_MNK, v_MNK))
    dq, dk, dv = torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
    if q.numel() and k.numel():
        weight_NQ = (grad.float() * out_QNK.float()).sum(dim=-1).T.contiguous()
        of_q, of_k = _samples(q_ends, Q), _samples(k_ends, M)
        shape = (Q, M, N, K, K**-0.5, _ROWS, _COLUMNS, *head_parts(K))
        both = (grad, q, k, v, lse_NQ, weight_NQ)
        _backward_q[(triton.cdiv(Q, _ROWS), N)](*both, dq, of_q, of_k, k_ends, *shape, num_warps=_WARPS)
        _backward_k[(triton.cdiv(M, _COLUMNS), N)](*both, dk, dv, of_q, of_k, q_ends, *shape, num_warps=_WARPS)
    return dq, dk, dv


@varlen_attention_backward.register_fake
def _(
    grad_QNK: Tensor, q_QNK: Tensor, k_MNK: Tensor, v_MNK: Tensor, out_QNK: Tensor, lse_NQ: Tensor, q_ends: Tensor, k_ends: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    return q_QNK.new_empty(q_QNK.shape), k_MNK.new_empty(k_MNK.shape), v_MNK.new_empty(v_MNK.shape)


def _keep(ctx, inputs, output) -> None:
    q, k, v, q_ends, k_ends = inputs
    ctx.save_for_backward(q, k, v, *output, q_ends, k_ends)
    ctx.mark_non_differentiable(output[1])


def _gradients(ctx, grad_QNK: Tensor, _):
    return *varlen_attention_backward(grad_QNK, *ctx.saved_tensors), None, None


varlen_attention.register_autograd(_gradients, setup_context=_keep)


def _samples(ends: Tensor, tokens: int) -> Tensor:
    """Which sample each token is of, int32, without a look at the values from the host."""
    return torch.searchsorted(ends[1:], torch.arange(tokens, dtype=ends.dtype, device=ends.device), right=True).to(torch.int32)


@triton.jit
def _scores(q_low, q_high, k, column, step, M, K, LO: tl.constexpr, HI: tl.constexpr):
    low = tl.arange(0, LO)
    scores = product(q_low, tl.trans(load_tile(k, column, low, step, M, K)))
    if HI > 0:
        high = LO + tl.arange(0, HI)
        scores += product(q_high, tl.trans(load_tile(k, column, high, step, M, K)))
    return scores


@triton.jit
def _high(base, row, step, rows, K, LO: tl.constexpr, HI: tl.constexpr):
    """The second part of a head dim; where there is none, a tile that nobody looks at."""
    if HI > 0:
        return load_tile(base, row, LO + tl.arange(0, HI), step, rows, K)
    else:
        return load_tile(base, row, tl.arange(0, 16), step, 0, K)


@triton.jit
def _forward(
    q, k, v, out, lse, of_q, of_k, k_ends, Q, M, N, K, scale,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, LO: tl.constexpr, HI: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(1)
    step = N * K
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    q += head * K
    k += head * K
    v += head * K
    low = tl.arange(0, LO)
    q_low = load_tile(q, row, low, step, Q, K)
    q_high = _high(q, row, step, Q, K, LO, HI)
    mine = tl.load(of_q + row, mask=row < Q, other=-1)
    first = tl.load(k_ends + tl.load(of_q + tl.program_id(0) * ROWS))
    last = tl.load(k_ends + 1 + tl.load(of_q + min(Q, (tl.program_id(0) + 1) * ROWS) - 1))
    most = tl.full([ROWS], float("-inf"), dtype=tl.float32)
    total = tl.zeros([ROWS], dtype=tl.float32)
    sum_low = tl.zeros([ROWS, LO], dtype=tl.float32)
    sum_high = tl.zeros([ROWS, HI if HI > 0 else 16], dtype=tl.float32)
    for start in range(first, last, COLUMNS):
        column = start + tl.arange(0, COLUMNS)
        theirs = tl.load(of_k + column, mask=column < last, other=-2)
        scores = _scores(q_low, q_high, k, column, step, last, K, LO, HI) * scale
        scores = tl.where(mine[:, None] == theirs[None, :], scores, float("-inf"))
        new = tl.maximum(most, tl.max(scores, axis=1))
        safe = tl.where(new == float("-inf"), 0.0, new)  # a row that has met no key of its own yet
        p = tl.exp(scores - safe[:, None])
        shrink = tl.exp(most - safe)
        total = total * shrink + tl.sum(p, axis=1)
        p = p.to(q.dtype.element_ty)
        sum_low = sum_low * shrink[:, None] + product(p, load_tile(v, column, low, step, last, K))
        if HI > 0:
            sum_high = sum_high * shrink[:, None] + product(p, _high(v, column, step, last, K, LO, HI))
        most = new
    keyless = total == 0.0
    over = tl.where(keyless, 1.0, total)
    store_tile(out + head * K, row, low, step, Q, K, sum_low / over[:, None])
    if HI > 0:
        store_tile(out + head * K, row, LO + tl.arange(0, HI), step, Q, K, sum_high / over[:, None])
    tl.store(lse + head.to(tl.int64) * Q + row, tl.where(keyless, 0.0, most + tl.log(over)), mask=row < Q)


@triton.jit
def _slopes(
    q_low, q_high, do_low, do_high, k, v, lse, weight, mine, theirs, column, step, M, K, scale, LO: tl.constexpr, HI: tl.constexpr
):
    """Probabilities, and the gradient of the scores before they were scaled."""
    scores = _scores(q_low, q_high, k, column, step, M, K, LO, HI) * scale
    p = tl.where(mine[:, None] == theirs[None, :], tl.exp(scores - lse[:, None]), 0.0)
    dp = _scores(do_low, do_high, v, column, step, M, K, LO, HI)
    return p, p * (dp - weight[:, None]) * scale


@triton.jit
def _backward_q(
    grad, q, k, v, lse, weight, dq, of_q, of_k, k_ends, Q, M, N, K, scale,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, LO: tl.constexpr, HI: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(1)
    step = N * K
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    k += head * K
    v += head * K
    low = tl.arange(0, LO)
    q_low = load_tile(q + head * K, row, low, step, Q, K)
    q_high = _high(q + head * K, row, step, Q, K, LO, HI)
    do_low = load_tile(grad + head * K, row, low, step, Q, K)
    do_high = _high(grad + head * K, row, step, Q, K, LO, HI)
    mine = tl.load(of_q + row, mask=row < Q, other=-1)
    at = head.to(tl.int64) * Q + row
    lse_rows = tl.load(lse + at, mask=row < Q, other=0.0)
    weight_rows = tl.load(weight + at, mask=row < Q, other=0.0)
    first = tl.load(k_ends + tl.load(of_q + tl.program_id(0) * ROWS))
    last = tl.load(k_ends + 1 + tl.load(of_q + min(Q, (tl.program_id(0) + 1) * ROWS) - 1))
    sum_low = tl.zeros([ROWS, LO], dtype=tl.float32)
    sum_high = tl.zeros([ROWS, HI if HI > 0 else 16], dtype=tl.float32)
    for start in range(first, last, COLUMNS):
        column = start + tl.arange(0, COLUMNS)
        theirs = tl.load(of_k + column, mask=column < last, other=-2)
        _, ds = _slopes(
            q_low, q_high, do_low, do_high, k, v, lse_rows, weight_rows, mine, theirs, column, step, last, K, scale, LO, HI
        )
        ds = ds.to(q.dtype.element_ty)
        sum_low += product(ds, load_tile(k, column, low, step, last, K))
        if HI > 0:
            sum_high += product(ds, _high(k, column, step, last, K, LO, HI))
    store_tile(dq + head * K, row, low, step, Q, K, sum_low)
    if HI > 0:
        store_tile(dq + head * K, row, LO + tl.arange(0, HI), step, Q, K, sum_high)


@triton.jit
def _backward_k(
    grad, q, k, v, lse, weight, dk, dv, of_q, of_k, q_ends, Q, M, N, K, scale,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, LO: tl.constexpr, HI: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(1)
    step = N * K
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    q += head * K
    k += head * K
    v += head * K
    grad += head * K
    low = tl.arange(0, LO)
    theirs = tl.load(of_k + column, mask=column < M, other=-2)
    first = tl.load(q_ends + tl.load(of_k + tl.program_id(0) * COLUMNS))
    last = tl.load(q_ends + 1 + tl.load(of_k + min(M, (tl.program_id(0) + 1) * COLUMNS) - 1))
    dk_low = tl.zeros([COLUMNS, LO], dtype=tl.float32)
    dv_low = tl.zeros([COLUMNS, LO], dtype=tl.float32)
    dk_high = tl.zeros([COLUMNS, HI if HI > 0 else 16], dtype=tl.float32)
    dv_high = tl.zeros([COLUMNS, HI if HI > 0 else 16], dtype=tl.float32)
    for start in range(first, last, ROWS):
        row = start + tl.arange(0, ROWS)
        q_low = load_tile(q, row, low, step, last, K)
        q_high = _high(q, row, step, last, K, LO, HI)
        do_low = load_tile(grad, row, low, step, last, K)
        do_high = _high(grad, row, step, last, K, LO, HI)
        mine = tl.load(of_q + row, mask=row < last, other=-1)
        at = head.to(tl.int64) * Q + row
        lse_rows = tl.load(lse + at, mask=row < last, other=0.0)
        weight_rows = tl.load(weight + at, mask=row < last, other=0.0)
        p, ds = _slopes(
            q_low, q_high, do_low, do_high, k, v, lse_rows, weight_rows, mine, theirs, column, step, M, K, scale, LO, HI
        )
        p = tl.trans(p.to(q.dtype.element_ty))
        ds = tl.trans(ds.to(q.dtype.element_ty))
        dv_low += product(p, do_low)
        dk_low += product(ds, q_low)
        if HI > 0:
            dv_high += product(p, do_high)
            dk_high += product(ds, q_high)
    store_tile(dk + head * K, column, low, step, M, K, dk_low)
    store_tile(dv + head * K, column, low, step, M, K, dv_low)
    if HI > 0:
        store_tile(dk + head * K, column, LO + tl.arange(0, HI), step, M, K, dk_high)
        store_tile(dv + head * K, column, LO + tl.arange(0, HI), step, M, K, dv_high)
