"""LayerNorm without affine, then adaLN's shift and scale: one read and one write of the residual stream."""

# B samples, T frames, S tokens per frame, D width

from __future__ import annotations

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from opensora_kernels.rows import (
    ROWS_BACKWARD,
    ROWS_FORWARD,
    block_of,
    dense_rows,
    like_contiguous,
    load_row,
    load_rows,
    norm_gradient,
    normalised,
    of_samples,
    partial_sums,
    row_starts,
    rows_per_program,
    steps_of,
    store_rows,
    store_sum,
    warps_of,
)

FEWEST_ROWS, MOST_ROWS = 8, 128
"""That a program of backward adds up."""


def reference(x_BTSD: Tensor, shift_BD: Tensor, scale_BD: Tensor, out_dtype: torch.dtype, eps: float) -> Tensor:
    """``LN(x) (1 + scale) + shift``.

    Args:
        x_BTSD: Tokens.
        shift_BD: Of each sample.
        scale_BD: Of each sample.
        out_dtype: Of the result.
    """
    normal = F.layer_norm(x_BTSD, x_BTSD.shape[-1:], eps=eps)
    return (normal * (1 + scale_BD[:, None, None]) + shift_BD[:, None, None]).to(out_dtype)


@torch.library.custom_op("opensora::norm_modulate", mutates_args=())
def norm_modulate(x_BTSD: Tensor, shift_BD: Tensor, scale_BD: Tensor, out_dtype: torch.dtype, eps: float) -> Tensor:
    """As ``reference``, with statistics and products in float32; contiguous.

    Nothing but the inputs is kept for backward: mean and deviation of a row are in the row, which is read anyway.
    """
    B, T, S, D = x_BTSD.shape
    x = dense_rows(x_BTSD)
    shift, scale = of_samples(x, shift_BD, scale_BD)
    out = like_contiguous(x, dtype=out_dtype)
    if out.numel():
        _norm_modulate_forward[(triton.cdiv(T * S, ROWS_FORWARD), B)](
            x,
            steps_of(x),
            shift,
            shift.stride(0),
            scale,
            scale.stride(0),
            out,
            steps_of(out),
            T * S,
            S,
            D,
            eps,
            block_of(D),
            ROWS_FORWARD,
            num_warps=warps_of(D),
        )
    return out


@norm_modulate.register_fake
def _(x_BTSD: Tensor, shift_BD: Tensor, scale_BD: Tensor, out_dtype: torch.dtype, eps: float) -> Tensor:
    return like_contiguous(x_BTSD, dtype=out_dtype)


@torch.library.custom_op("opensora::norm_modulate_backward", mutates_args=())
def norm_modulate_backward(grad_BTSD: Tensor, x_BTSD: Tensor, scale_BD: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """The gradient of x, with its strides, and those of shift and scale, float32 [2, B, D]."""
    B, T, S, D = x_BTSD.shape
    grad, x = dense_rows(grad_BTSD), dense_rows(x_BTSD)
    (scale,) = of_samples(x, scale_BD)
    dx = torch.empty_like(x)
    rows = rows_per_program(B * T * S, least=FEWEST_ROWS, most=MOST_ROWS)
    sums = partial_sums(2, x, rows=rows)
    if x.numel():
        _norm_modulate_backward[(sums.shape[2], B)](
            grad,
            steps_of(grad),
            x,
            steps_of(x),
            scale,
            scale.stride(0),
            dx,
            steps_of(dx),
            sums,
            rows,
            T * S,
            S,
            D,
            eps,
            block_of(D),
            ROWS_BACKWARD,
            num_warps=warps_of(D),
        )
    return dx, sums.sum(dim=2)


@norm_modulate_backward.register_fake
def _(grad_BTSD: Tensor, x_BTSD: Tensor, scale_BD: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    return torch.empty_like(dense_rows(x_BTSD)), scale_BD.new_empty((2, *scale_BD.shape), dtype=torch.float32)


def _keep(ctx, inputs, output) -> None:
    x_BTSD, shift_BD, scale_BD, _, ctx.eps = inputs
    ctx.save_for_backward(x_BTSD, scale_BD)
    ctx.shift_dtype = shift_BD.dtype


def _gradients(ctx, grad_BTSD: Tensor):
    x_BTSD, scale_BD = ctx.saved_tensors
    dx, (dshift, dscale) = norm_modulate_backward(grad_BTSD, x_BTSD, scale_BD, ctx.eps)
    return dx, dshift.to(ctx.shift_dtype), dscale.to(scale_BD.dtype), None, None


norm_modulate.register_autograd(_gradients, setup_context=_keep)


@triton.jit(do_not_specialize=["L", "S"])
def _norm_modulate_forward(
    x, x_steps, shift, shift_step, scale, scale_step, out, out_steps, L, S, D, eps, BLOCK: tl.constexpr, ROWS: tl.constexpr
):
    sample = tl.program_id(1).to(tl.int64)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK)
    inside = (row < L)[:, None] & (column < D)[None, :]
    normal, _ = normalised(load_rows(x, row_starts(sample, row, S, x_steps), column, inside), inside, D, eps)
    by = 1.0 + load_row(scale, scale_step, sample, column, D)
    result = normal * by[None, :] + load_row(shift, shift_step, sample, column, D)[None, :]
    store_rows(out, row_starts(sample, row, S, out_steps), column, inside, result)


@triton.jit(do_not_specialize=["rows", "L", "S"])
def _norm_modulate_backward(
    grad, grad_steps, x, x_steps, scale, scale_step, dx, dx_steps, sums, rows, L, S, D, eps,
    BLOCK: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    chunk = tl.program_id(0)
    sample = tl.program_id(1).to(tl.int64)
    column = tl.arange(0, BLOCK)
    by = 1.0 + load_row(scale, scale_step, sample, column, D)
    shift_sum = tl.zeros([BLOCK], dtype=tl.float32)
    scale_sum = tl.zeros([BLOCK], dtype=tl.float32)
    for start in range(chunk * rows, min(L, (chunk + 1) * rows), ROWS):
        row = start + tl.arange(0, ROWS)
        inside = (row < L)[:, None] & (column < D)[None, :]
        value = load_rows(x, row_starts(sample, row, S, x_steps), column, inside)
        dy = load_rows(grad, row_starts(sample, row, S, grad_steps), column, inside)
        normal, rstd = normalised(value, inside, D, eps)
        shift_sum += tl.sum(dy, axis=0)
        scale_sum += tl.sum(dy * normal, axis=0)
        result = norm_gradient(dy * by[None, :], normal, rstd, D)
        store_rows(dx, row_starts(sample, row, S, dx_steps), column, inside, result)
    store_sum(sums, 0, sample, chunk, tl.num_programs(0), column, D, shift_sum)
    store_sum(sums, 1, sample, chunk, tl.num_programs(0), column, D, scale_sum)
