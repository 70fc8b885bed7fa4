"""Block-diagonal attention: queries and keys of many samples side by side, each sample's queries meeting its own keys alone.

For captions of unequal length (cross-attention: keys padded, and masked in any pattern) and for packs of clips of any shape
(self-attention). A program takes a tile of queries of one sample and head, walks over the sample's keys up to the last that takes part,
and reads queries, keys and values where the linears left them.

Backward is two kernels: gradients of queries (and each query's ``sum(grad * out)``), and those of keys and values. Captions have few
keys and very many queries: there queries are dealt out in ``splits``, each with a partial sum in float32, so that more than a handful
of programs have work. No atomics: sums are the same every time.
"""

# Q queries and M keys of all samples together, G samples, N heads, K head dim; LO, HI: its two parts

from __future__ import annotations

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from opensora_kernels.products import WIDEST_HEAD, head_parts, load_tile, product, rows_of, store_tile
from opensora_kernels.rows import dense_rows

_ROWS, _COLUMNS = 64, 64
_COLUMNS_OF_Q = 32
"""Keys at once where gradients of queries are computed: more don't fit an A100's registers beside four tiles of queries."""
_PROGRAMS = 1024
"""Of the gradients of keys and values, wanted at least: some for each of the 132 multiprocessors of an H100."""


def reference(
    q_QNK: Tensor,
    kv_M2NK: Tensor,
    q_ends: Tensor,
    k_ends: Tensor,
    k_stops: Tensor,
    mask_M: Tensor | None,
    most_q: int,
    most_k: int,
) -> Tensor:
    """Attention sample by sample; zeros for one that has no key.

    Args:
        q_QNK: Queries of all samples, one sample after the other.
        kv_M2NK: Keys and values, likewise.
        q_ends: int32 [G + 1]: sample g has the queries from q_ends[g] to q_ends[g + 1], which is Q for the last.
        k_ends: int32 [G + 1], of keys.
        k_stops: int32 [G]: no key of sample g takes part from here on; at most k_ends[g + 1].
        mask_M: bool, True where a key takes part; None: all do.
        most_q: The largest number of queries of a sample; most_k: of keys.
    """
    outs = []
    for g in range(len(q_ends) - 1):
        q = q_QNK[q_ends[g] : q_ends[g + 1]].transpose(0, 1)
        kv = kv_M2NK[k_ends[g] : k_stops[g]]
        kv = kv if mask_M is None else kv[mask_M[k_ends[g] : k_stops[g]]]
        k, v = kv.permute(1, 2, 0, 3)
        outs.append(F.scaled_dot_product_attention(q, k, v).transpose(0, 1) if len(kv) else torch.zeros_like(q).transpose(0, 1))
    return torch.cat(outs)


@torch.library.custom_op("opensora::varlen_attention", mutates_args=())
def varlen_attention(
    q_QNK: Tensor,
    kv_M2NK: Tensor,
    q_ends: Tensor,
    k_ends: Tensor,
    k_stops: Tensor,
    mask_M: Tensor | None,
    most_q: int,
    most_k: int,
) -> tuple[Tensor, Tensor]:
    """As ``reference``, with scores and sums in float32.

    Args:
        q_QNK: Rows at any distance from each other. K at most ``WIDEST_HEAD``. float16 or bfloat16: of float32, products take no
            tensor core and a thread spills kilobytes; that is for Triton's interpreter alone.
        kv_M2NK: Likewise.
    Returns:
        [Q, N, K], dense, and the log of each query's sum of exponentials, float32 [N, Q]; 0 where there is no key.
    """
    Q, N, K = q_QNK.shape
    assert K <= WIDEST_HEAD, f"heads of {K}; a tile holds {WIDEST_HEAD}"
    q, kv = dense_rows(q_QNK, dims=2), dense_rows(kv_M2NK, dims=3)
    out, lse = q.new_empty((Q, N, K)), q.new_empty((N, Q), dtype=torch.float32)
    if q.numel():
        rows, tiles = _tiles(most_q, _ROWS)
        _varlen_attention_forward[(len(k_stops) * tiles * N,)](
            q, kv, out, lse, q_ends, k_ends, k_stops, mask_M, Q, tiles, q.stride(0), kv.stride(0), K**-0.5,
            N, K, rows, _COLUMNS, *head_parts(K), num_warps=_warps(rows),
        )  # fmt: skip
    return out, lse


@varlen_attention.register_fake
def _(q_QNK, kv_M2NK, q_ends, k_ends, k_stops, mask_M, most_q, most_k):
    Q, N, K = q_QNK.shape
    return q_QNK.new_empty((Q, N, K)), q_QNK.new_empty((N, Q), dtype=torch.float32)


@torch.library.custom_op("opensora::varlen_attention_backward", mutates_args=())
def varlen_attention_backward(
    grad_QNK: Tensor,
    q_QNK: Tensor,
    kv_M2NK: Tensor,
    out_QNK: Tensor,
    lse_NQ: Tensor,
    q_ends: Tensor,
    k_ends: Tensor,
    k_stops: Tensor,
    mask_M: Tensor | None,
    most_q: int,
    most_k: int,
) -> tuple[Tensor, Tensor]:
    """Gradients of queries, and of keys and values in one tensor; both dense."""
    (Q, N, K), M, G = q_QNK.shape, len(kv_M2NK), len(k_stops)
    grad, q, kv = dense_rows(grad_QNK, dims=2), dense_rows(q_QNK, dims=2), dense_rows(kv_M2NK, dims=3)
    dq, weight_NQ = q.new_empty((Q, N, K)), torch.empty_like(lse_NQ)
    if not q.numel():
        return dq, kv.new_zeros((M, 2, N, K))
    of_samples, sizes = (q_ends, k_ends, k_stops, mask_M), (N, K)
    rows, tiles = _tiles(most_q, _ROWS)
    _varlen_attention_backward_q[(G * tiles * N,)](
        grad, q, kv, out_QNK, lse_NQ, weight_NQ, dq, *of_samples, Q, tiles,
        grad.stride(0), q.stride(0), kv.stride(0), K**-0.5, *sizes, rows, _COLUMNS_OF_Q, *head_parts(K), num_warps=_warps(rows),
    )  # fmt: skip
    columns, tiles_k = _tiles(most_k, _COLUMNS)
    splits = max(1, min(tiles, triton.cdiv(_PROGRAMS, max(1, G * tiles_k * N))))
    parts = kv.new_empty((splits, M, 2, N, K), dtype=torch.float32 if splits > 1 else kv.dtype)
    if kv.numel():
        _varlen_attention_backward_k[(G * tiles_k * N, splits)](
            grad, q, kv, lse_NQ, weight_NQ, parts, *of_samples, Q, M, tiles_k,
            grad.stride(0), q.stride(0), kv.stride(0), K**-0.5, *sizes, rows, columns, *head_parts(K), num_warps=_warps(columns),
        )  # fmt: skip
    return dq, parts.sum(dim=0).to(kv.dtype) if splits > 1 else parts[0]


@varlen_attention_backward.register_fake
def _(grad_QNK, q_QNK, kv_M2NK, out_QNK, lse_NQ, q_ends, k_ends, k_stops, mask_M, most_q, most_k):
    return q_QNK.new_empty(q_QNK.shape), kv_M2NK.new_empty(kv_M2NK.shape)


def _keep(ctx, inputs, output) -> None:
    q, kv, *of_samples, mask, most_q, most_k = inputs
    ctx.save_for_backward(q, kv, *output, *of_samples, mask)
    ctx.most = most_q, most_k
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)  # or zeros would be made for it


def _gradients(ctx, grad_QNK: Tensor | None, _):
    if grad_QNK is None:
        return (None,) * 8
    return *varlen_attention_backward(grad_QNK, *ctx.saved_tensors, *ctx.most), *(None,) * 6


varlen_attention.register_autograd(_gradients, setup_context=_keep)


def _tiles(tokens: int, most: int) -> tuple[int, int]:
    """Of how many rows, and how many of them for so many tokens."""
    rows = rows_of(tokens, most=most)
    return rows, triton.cdiv(tokens, rows)


def _warps(rows: int) -> int:
    """A warp to 16 rows: on Hopper and Blackwell four of them feed one tensor core operation of 64 rows."""
    return rows // 16


@triton.jit
def _program(tiles, N: tl.constexpr):
    """Sample, tile and head of a program; heads side by side: they read neighbouring parts of the same rows."""
    program = tl.program_id(0)
    return program // N // tiles, program // N % tiles, program % N


@triton.jit
def _tile(base, row, step, rows, K: tl.constexpr, LO: tl.constexpr, HI: tl.constexpr):
    """Rows of one head in its two parts; where it has one, a second that nobody looks at."""
    low = load_tile(base, row, tl.arange(0, LO), step, rows, K)
    if HI > 0:
        return low, load_tile(base, row, LO + tl.arange(0, HI), step, rows, K)
    else:
        return low, low


@triton.jit
def _put(base, row, step, rows, value_low, value_high, K: tl.constexpr, LO: tl.constexpr, HI: tl.constexpr):
    store_tile(base, row, tl.arange(0, LO), step, rows, K, value_low)
    if HI > 0:
        store_tile(base, row, LO + tl.arange(0, HI), step, rows, K, value_high)


@triton.jit
def _inner(a_low, a_high, b_low, b_high, HI: tl.constexpr):
    """``a b^T`` over both parts of the head dim."""
    scores = product(a_low, tl.trans(b_low))
    if HI > 0:
        scores += product(a_high, tl.trans(b_high))
    return scores


@triton.jit
def _takes_part(mask, column, stop):
    inside = column < stop
    if mask is not None:
        inside = inside & (tl.load(mask + column, mask=inside, other=0) != 0)
    return inside


@triton.jit(do_not_specialize=["Q", "tiles"])
def _varlen_attention_forward(
    q, kv, out, lse, q_ends, k_ends, k_stops, mask, Q, tiles, q_step, kv_step, scale,
    N: tl.constexpr, K: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, LO: tl.constexpr, HI: tl.constexpr,
):  # fmt: skip
    sample, tile, head = _program(tiles, N)
    end = tl.load(q_ends + sample + 1)
    first_row = tl.load(q_ends + sample) + tile * ROWS
    if first_row < end:
        row = first_row + tl.arange(0, ROWS)
        k = kv + head * K
        v = k + N * K
        q_low, q_high = _tile(q + head * K, row, q_step, end, K, LO, HI)
        stop = tl.load(k_stops + sample)
        most = tl.full([ROWS], float("-inf"), dtype=tl.float32)
        total = tl.zeros([ROWS], dtype=tl.float32)
        sum_low = tl.zeros([ROWS, LO], dtype=tl.float32)
        sum_high = tl.zeros([ROWS, HI if HI > 0 else LO], dtype=tl.float32)
        for start in range(tl.load(k_ends + sample), stop, COLUMNS):
            column = start + tl.arange(0, COLUMNS)
            k_low, k_high = _tile(k, column, kv_step, stop, K, LO, HI)
            scores = _inner(q_low, q_high, k_low, k_high, HI) * scale
            scores = tl.where(_takes_part(mask, column, stop)[None, :], scores, float("-inf"))
            new = tl.maximum(most, tl.max(scores, axis=1))
            safe = tl.where(new == float("-inf"), 0.0, new)  # no key so far that takes part
            p = tl.exp(scores - safe[:, None])
            shrink = tl.exp(most - safe)
            total = total * shrink + tl.sum(p, axis=1)
            p = p.to(q.dtype.element_ty)
            v_low, v_high = _tile(v, column, kv_step, stop, K, LO, HI)
            sum_low = sum_low * shrink[:, None] + product(p, v_low)
            if HI > 0:
                sum_high = sum_high * shrink[:, None] + product(p, v_high)
            most = new
        keyless = total == 0.0
        over = tl.where(keyless, 1.0, total)[:, None]
        _put(out + head * K, row, N * K, end, sum_low / over, sum_high / over, K, LO, HI)
        at = lse + head.to(tl.int64) * Q + row
        tl.store(at, tl.where(keyless, 0.0, most + tl.log(tl.where(keyless, 1.0, total))), mask=row < end)


@triton.jit
def _slopes(q_low, q_high, do_low, do_high, k_low, k_high, v_low, v_high, lse, weight, inside, scale, HI: tl.constexpr):
    """Probabilities, and the gradient of the scores before they were scaled."""
    scores = _inner(q_low, q_high, k_low, k_high, HI) * scale
    p = tl.where(inside, tl.exp(scores - lse[:, None]), 0.0)
    return p, p * (_inner(do_low, do_high, v_low, v_high, HI) - weight[:, None]) * scale


@triton.jit(do_not_specialize=["Q", "tiles"])
def _varlen_attention_backward_q(
    grad, q, kv, out, lse, weight, dq, q_ends, k_ends, k_stops, mask, Q, tiles, grad_step, q_step, kv_step, scale,
    N: tl.constexpr, K: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, LO: tl.constexpr, HI: tl.constexpr,
):  # fmt: skip
    sample, tile, head = _program(tiles, N)
    end = tl.load(q_ends + sample + 1)
    first_row = tl.load(q_ends + sample) + tile * ROWS
    if first_row < end:
        row = first_row + tl.arange(0, ROWS)
        k = kv + head * K
        v = k + N * K
        q_low, q_high = _tile(q + head * K, row, q_step, end, K, LO, HI)
        do_low, do_high = _tile(grad + head * K, row, grad_step, end, K, LO, HI)
        out_low, out_high = _tile(out + head * K, row, N * K, end, K, LO, HI)
        of_row = tl.sum(do_low.to(tl.float32) * out_low.to(tl.float32), axis=1)
        if HI > 0:
            of_row += tl.sum(do_high.to(tl.float32) * out_high.to(tl.float32), axis=1)
        at = head.to(tl.int64) * Q + row
        tl.store(weight + at, of_row, mask=row < end)
        lse_row = tl.load(lse + at, mask=row < end, other=0.0)
        stop = tl.load(k_stops + sample)
        sum_low = tl.zeros([ROWS, LO], dtype=tl.float32)
        sum_high = tl.zeros([ROWS, HI if HI > 0 else LO], dtype=tl.float32)
        for start in range(tl.load(k_ends + sample), stop, COLUMNS):
            column = start + tl.arange(0, COLUMNS)
            k_low, k_high = _tile(k, column, kv_step, stop, K, LO, HI)
            v_low, v_high = _tile(v, column, kv_step, stop, K, LO, HI)
            inside = _takes_part(mask, column, stop)[None, :]
            _, ds = _slopes(q_low, q_high, do_low, do_high, k_low, k_high, v_low, v_high, lse_row, of_row, inside, scale, HI)
            ds = ds.to(q.dtype.element_ty)
            sum_low += product(ds, k_low)
            if HI > 0:
                sum_high += product(ds, k_high)
        _put(dq + head * K, row, N * K, end, sum_low, sum_high, K, LO, HI)


@triton.jit(do_not_specialize=["Q", "M", "tiles"])
def _varlen_attention_backward_k(
    grad, q, kv, lse, weight, dkv, q_ends, k_ends, k_stops, mask, Q, M, tiles, grad_step, q_step, kv_step, scale,
    N: tl.constexpr, K: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, LO: tl.constexpr, HI: tl.constexpr,
):  # fmt: skip
    sample, tile, head = _program(tiles, N)
    own_end = tl.load(k_ends + sample + 1)  # keys of the sample; gradients of those that take no part are zeros, and written, too
    first_column = tl.load(k_ends + sample) + tile * COLUMNS
    if first_column < own_end:
        stop = tl.load(k_stops + sample)
        column = first_column + tl.arange(0, COLUMNS)
        k = kv + head * K
        k_low, k_high = _tile(k, column, kv_step, stop, K, LO, HI)
        v_low, v_high = _tile(k + N * K, column, kv_step, stop, K, LO, HI)
        inside = _takes_part(mask, column, stop)[None, :]
        first, end = tl.load(q_ends + sample), tl.load(q_ends + sample + 1)
        share = tl.cdiv(tl.cdiv(end - first, ROWS), tl.num_programs(1)) * ROWS
        first += tl.program_id(1) * share
        end = tl.where(first_column < stop, tl.minimum(end, first + share), first)
        dk_low = tl.zeros([COLUMNS, LO], dtype=tl.float32)
        dv_low = tl.zeros([COLUMNS, LO], dtype=tl.float32)
        dk_high = tl.zeros([COLUMNS, HI if HI > 0 else LO], dtype=tl.float32)
        dv_high = tl.zeros([COLUMNS, HI if HI > 0 else LO], dtype=tl.float32)
        for start in range(first, end, ROWS):
            row = start + tl.arange(0, ROWS)
            q_low, q_high = _tile(q + head * K, row, q_step, end, K, LO, HI)
            do_low, do_high = _tile(grad + head * K, row, grad_step, end, K, LO, HI)
            at = head.to(tl.int64) * Q + row
            lse_row = tl.load(lse + at, mask=row < end, other=0.0)
            of_row = tl.load(weight + at, mask=row < end, other=0.0)
            p, ds = _slopes(q_low, q_high, do_low, do_high, k_low, k_high, v_low, v_high, lse_row, of_row, inside, scale, HI)
            p = tl.trans(p.to(q.dtype.element_ty))
            ds = tl.trans(ds.to(q.dtype.element_ty))
            dv_low += product(p, do_low)
            dk_low += product(ds, q_low)
            if HI > 0:
                dv_high += product(p, do_high)
                dk_high += product(ds, q_high)
        to = dkv + tl.program_id(1).to(tl.int64) * M * 2 * N * K + head * K
        _put(to, column, 2 * N * K, own_end, dk_low, dk_high, K, LO, HI)
        _put(to + N * K, column, 2 * N * K, own_end, dv_low, dv_high, K, LO, HI)
