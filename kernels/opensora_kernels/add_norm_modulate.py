"""What a branch adds to the residual stream, and the LayerNorm and modulation that the next branch begins with, in one pass.

Apart, the stream is written and read again: five passes over the tokens become four (two read, two written).
"""

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


def reference(
    x_BTSD: Tensor,
    branch_BTSD: Tensor,
    shift_BD: Tensor,
    scale_BD: Tensor,
    out_dtype: torch.dtype,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """``s = x + branch``, and ``LN(s) (1 + scale) + shift``.

    Args:
        out_dtype: Of the second result.
    Returns:
        The stream, in the dtype of x, and what the next branch is given.
    """
    stream = (x_BTSD + branch_BTSD).to(x_BTSD.dtype)
    normal = F.layer_norm(stream, stream.shape[-1:], eps=eps)
    return stream, (normal * (1 + scale_BD[:, None, None]) + shift_BD[:, None, None]).to(out_dtype)


@torch.library.custom_op("opensora::add_norm_modulate", mutates_args=())
def add_norm_modulate(
    x_BTSD: Tensor,
    branch_BTSD: Tensor,
    shift_BD: Tensor,
    scale_BD: Tensor,
    out_dtype: torch.dtype,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """As ``reference``, in float32 inside. The statistics are those of the stream as it is stored.

    Returns:
        The stream with the strides of x, and what the next branch is given, contiguous.
    """
    B, T, S, D = x_BTSD.shape
    assert branch_BTSD.shape == x_BTSD.shape
    x, branch = dense_rows(x_BTSD), dense_rows(branch_BTSD)
    shift, scale = of_samples(x, shift_BD, scale_BD)
    stream, out = torch.empty_like(x), like_contiguous(x, dtype=out_dtype)
    if out.numel():
        _add_norm_modulate_forward[(triton.cdiv(T * S, ROWS_FORWARD), B)](
            x,
            steps_of(x),
            branch,
            steps_of(branch),
            shift,
            shift.stride(0),
            scale,
            scale.stride(0),
            stream,
            steps_of(stream),
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
    return stream, out


@add_norm_modulate.register_fake
def _(
    x_BTSD: Tensor,
    branch_BTSD: Tensor,
    shift_BD: Tensor,
    scale_BD: Tensor,
    out_dtype: torch.dtype,
    eps: float,
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(dense_rows(x_BTSD)), like_contiguous(x_BTSD, dtype=out_dtype)


@torch.library.custom_op("opensora::add_norm_modulate_backward", mutates_args=())
def add_norm_modulate_backward(
    dstream_BTSD: Tensor,
    dout_BTSD: Tensor,
    stream_BTSD: Tensor,
    scale_BD: Tensor,
    branch_dtype: torch.dtype,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradient of x, with its strides, that of the branch, contiguous, and those of shift and scale, float32 [2, B, D]."""
    B, T, S, D = stream_BTSD.shape
    dstream, dout, stream = map(dense_rows, (dstream_BTSD, dout_BTSD, stream_BTSD))
    (scale,) = of_samples(stream, scale_BD)
    dx, dbranch = torch.empty_like(stream), like_contiguous(stream, dtype=branch_dtype)
    rows = rows_per_program(B * T * S, least=FEWEST_ROWS, most=MOST_ROWS)
    sums = partial_sums(2, stream, rows=rows)
    if stream.numel():
        _add_norm_modulate_backward[(sums.shape[2], B)](
            dstream,
            steps_of(dstream),
            dout,
            steps_of(dout),
            stream,
            steps_of(stream),
            scale,
            scale.stride(0),
            dx,
            steps_of(dx),
            dbranch,
            steps_of(dbranch),
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
    return dx, dbranch, sums.sum(dim=2)


@add_norm_modulate_backward.register_fake
def _(
    dstream_BTSD: Tensor,
    dout_BTSD: Tensor,
    stream_BTSD: Tensor,
    scale_BD: Tensor,
    branch_dtype: torch.dtype,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    sums = scale_BD.new_empty((2, *scale_BD.shape), dtype=torch.float32)
    return torch.empty_like(dense_rows(stream_BTSD)), like_contiguous(stream_BTSD, dtype=branch_dtype), sums


def _keep(ctx, inputs, output) -> None:
    _, branch_BTSD, shift_BD, scale_BD, _, ctx.eps = inputs
    ctx.save_for_backward(output[0], scale_BD)  # the stream is kept by what follows, too; the branch is needed no more
    ctx.shift_dtype, ctx.branch_dtype = shift_BD.dtype, branch_BTSD.dtype


def _gradients(ctx, dstream_BTSD: Tensor, dout_BTSD: Tensor):
    stream_BTSD, scale_BD = ctx.saved_tensors
    dx, dbranch, (dshift, dscale) = add_norm_modulate_backward(
        dstream_BTSD, dout_BTSD, stream_BTSD, scale_BD, ctx.branch_dtype, ctx.eps
    )
    return dx, dbranch, dshift.to(ctx.shift_dtype), dscale.to(scale_BD.dtype), None, None


add_norm_modulate.register_autograd(_gradients, setup_context=_keep)


@triton.jit(do_not_specialize=["L", "S"])
def _add_norm_modulate_forward(
    x, x_steps, branch, branch_steps, shift, shift_step, scale, scale_step, stream, stream_steps, out, out_steps,
    L, S, D, eps, BLOCK: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    sample = tl.program_id(1).to(tl.int64)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK)
    inside = (row < L)[:, None] & (column < D)[None, :]
    value = load_rows(x, row_starts(sample, row, S, x_steps), column, inside)
    added = load_rows(branch, row_starts(sample, row, S, branch_steps), column, inside)
    stored = (value + added).to(stream.dtype.element_ty)
    store_rows(stream, row_starts(sample, row, S, stream_steps), column, inside, stored)
    normal, _ = normalised(stored.to(tl.float32), inside, D, eps)
    by = 1.0 + load_row(scale, scale_step, sample, column, D)
    result = normal * by[None, :] + load_row(shift, shift_step, sample, column, D)[None, :]
    store_rows(out, row_starts(sample, row, S, out_steps), column, inside, result)


@triton.jit(do_not_specialize=["rows", "L", "S"])
def _add_norm_modulate_backward(
    dstream, dstream_steps, dout, dout_steps, stream, stream_steps, scale, scale_step,
    dx, dx_steps, dbranch, dbranch_steps, sums, rows, L, S, D, eps, BLOCK: tl.constexpr, ROWS: tl.constexpr,
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
        value = load_rows(stream, row_starts(sample, row, S, stream_steps), column, inside)
        dy = load_rows(dout, row_starts(sample, row, S, dout_steps), column, inside)
        past = load_rows(dstream, row_starts(sample, row, S, dstream_steps), column, inside)
        normal, rstd = normalised(value, inside, D, eps)
        shift_sum += tl.sum(dy, axis=0)
        scale_sum += tl.sum(dy * normal, axis=0)
        total = norm_gradient(dy * by[None, :], normal, rstd, D) + past
        store_rows(dx, row_starts(sample, row, S, dx_steps), column, inside, total)
        store_rows(dbranch, row_starts(sample, row, S, dbranch_steps), column, inside, total)
    store_sum(sums, 0, sample, chunk, tl.num_programs(0), column, D, shift_sum)
    store_sum(sums, 1, sample, chunk, tl.num_programs(0), column, D, scale_sum)
