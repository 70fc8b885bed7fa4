"""Bias and tanh-GELU in one pass; backward computes the activation's slope from what the linear gave, which is kept anyway."""

# R rows, H width of the hidden layer

from __future__ import annotations

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from opensora_kernels.rows import like_contiguous, load_row, load_rows, rows_per_program, store_rows

COLUMNS, ROWS, WARPS = 256, 16, 4
FEWEST_ROWS, MOST_ROWS = 32, 512
"""That a program of backward adds up."""


def reference(x_RH: Tensor, bias_H: Tensor) -> Tensor:
    """``gelu(x + bias)``, by tanh, in the dtype of x."""
    return F.gelu(x_RH + bias_H, approximate="tanh").to(x_RH.dtype)


@torch.library.custom_op("opensora::bias_gelu", mutates_args=())
def bias_gelu(x_RH: Tensor, bias_H: Tensor) -> Tensor:
    """As ``reference``, in float32 inside; contiguous.

    Args:
        x_RH: [..., H], of a linear without its bias.
        bias_H: Of any dtype.
    """
    x, out = x_RH.contiguous(), like_contiguous(x_RH)
    H = x.shape[-1]
    assert bias_H.shape == (H,)
    if out.numel():
        R = x.numel() // H
        _bias_gelu_forward[(triton.cdiv(R, ROWS) * triton.cdiv(H, COLUMNS),)](
            x, bias_H.contiguous(), out, R, H, COLUMNS, ROWS, num_warps=WARPS
        )
    return out


@bias_gelu.register_fake
def _(x_RH: Tensor, bias_H: Tensor) -> Tensor:
    return like_contiguous(x_RH)


@torch.library.custom_op("opensora::bias_gelu_backward", mutates_args=())
def bias_gelu_backward(grad_RH: Tensor, x_RH: Tensor, bias_H: Tensor) -> tuple[Tensor, Tensor]:
    """The gradient of x, contiguous, and that of the bias, float32."""
    grad, x, dx = grad_RH.contiguous(), x_RH.contiguous(), like_contiguous(x_RH)
    H = x.shape[-1]
    R = x.numel() // H
    columns = triton.cdiv(H, COLUMNS)
    rows = rows_per_program(R * columns, least=FEWEST_ROWS, most=MOST_ROWS)
    sums = torch.empty((triton.cdiv(R, rows), H), dtype=torch.float32, device=x.device)
    if x.numel():
        _bias_gelu_backward[(len(sums) * columns,)](
            grad, x, bias_H.contiguous(), dx, sums, rows, R, H, COLUMNS, ROWS, num_warps=WARPS
        )
    return dx, sums.sum(dim=0)


@bias_gelu_backward.register_fake
def _(grad_RH: Tensor, x_RH: Tensor, bias_H: Tensor) -> tuple[Tensor, Tensor]:
    return like_contiguous(x_RH), torch.empty(bias_H.shape, dtype=torch.float32, device=bias_H.device)


def _keep(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs)


def _gradients(ctx, grad_RH: Tensor):
    x_RH, bias_H = ctx.saved_tensors
    dx, dbias = bias_gelu_backward(grad_RH, x_RH, bias_H)
    return dx, dbias.to(bias_H.dtype)


bias_gelu.register_autograd(_gradients, setup_context=_keep)


@triton.jit
def _tanh(u):
    """By the logistic function, which is 0 or 1 where its exponential overflows."""
    return 2.0 * tl.sigmoid(2.0 * u) - 1.0


@triton.jit
def _inner(x):
    """sqrt(2 / pi) (x + 0.044715 x^3)."""
    return (x + x * x * x * 0.044715) * 0.7978845608028654


@triton.jit
def _slope(x):
    """Of the activation."""
    bent = _tanh(_inner(x))
    return 0.5 * (1.0 + bent) + 0.5 * x * (1.0 - bent * bent) * 0.7978845608028654 * (1.0 + 0.134145 * x * x)


@triton.jit(do_not_specialize=["R"])
def _bias_gelu_forward(x, bias, out, R, H, COLUMNS: tl.constexpr, ROWS: tl.constexpr):
    parts = tl.cdiv(H, COLUMNS)  # neighbours in memory are neighbours in time
    row = tl.program_id(0) // parts * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(0) % parts * COLUMNS + tl.arange(0, COLUMNS)
    inside = (row < R)[:, None] & (column < H)[None, :]
    starts = row.to(tl.int64) * H
    value = load_rows(x, starts, column, inside) + load_row(bias, 0, 0, column, H)[None, :]
    store_rows(out, starts, column, inside, 0.5 * value * (1.0 + _tanh(_inner(value))))


@triton.jit(do_not_specialize=["rows", "R"])
def _bias_gelu_backward(grad, x, bias, dx, sums, rows, R, H, COLUMNS: tl.constexpr, ROWS: tl.constexpr):
    parts = tl.cdiv(H, COLUMNS)
    chunk = tl.program_id(0) // parts
    column = tl.program_id(0) % parts * COLUMNS + tl.arange(0, COLUMNS)
    to = load_row(bias, 0, 0, column, H)
    total = tl.zeros([ROWS, COLUMNS], dtype=tl.float32)
    for start in range(chunk * rows, min(R, (chunk + 1) * rows), ROWS):
        row = start + tl.arange(0, ROWS)
        inside = (row < R)[:, None] & (column < H)[None, :]
        starts = row.to(tl.int64) * H
        value = load_rows(x, starts, column, inside) + to[None, :]
        result = load_rows(grad, starts, column, inside) * _slope(value)
        total += result
        store_rows(dx, starts, column, inside, result)
    at = chunk.to(tl.int64) * H + column
    tl.store(sums + at, tl.sum(total, axis=0), mask=column < H)
