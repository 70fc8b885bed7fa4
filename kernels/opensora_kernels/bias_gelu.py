"""Bias and tanh-GELU in one pass; backward computes the activation's slope from what the linear gave, which is kept anyway."""

# R rows, H width of the hidden layer

from __future__ import annotations

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

_COLUMNS, _ROWS, _WARPS = 256, 16, 8


def reference(x_RH: Tensor, bias_H: Tensor) -> Tensor:
    """``gelu(x + bias)``, by tanh."""
    return F.gelu(x_RH + bias_H, approximate="tanh")


@torch.library.custom_op("opensora::bias_gelu", mutates_args=())
def bias_gelu(x_RH: Tensor, bias_H: Tensor) -> Tensor:
    """As ``reference``, in float32 inside.

    Args:
        x_RH: [..., H], of a linear without its bias.
    """
    x_RH, out = x_RH.contiguous(), torch.empty_like(x_RH, memory_format=torch.contiguous_format)
    H = x_RH.shape[-1]
    R = x_RH.numel() // H
    if out.numel():
        _forward[(triton.cdiv(R, _ROWS), triton.cdiv(H, _COLUMNS))](x_RH, bias_H, out, R, H, _COLUMNS, _ROWS, num_warps=_WARPS)
    return out


@bias_gelu.register_fake
def _(x_RH: Tensor, bias_H: Tensor) -> Tensor:
    return torch.empty_like(x_RH, memory_format=torch.contiguous_format)


@torch.library.custom_op("opensora::bias_gelu_backward", mutates_args=())
def bias_gelu_backward(grad_RH: Tensor, x_RH: Tensor, bias_H: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of x and bias."""
    grad_RH, x_RH = grad_RH.contiguous(), x_RH.contiguous()
    H = x_RH.shape[-1]
    R = x_RH.numel() // H
    dx = torch.empty_like(x_RH)
    sums = torch.empty((triton.cdiv(R, _ROWS), H), dtype=torch.float32, device=x_RH.device)
    if x_RH.numel():
        _backward[(len(sums), triton.cdiv(H, _COLUMNS))](grad_RH, x_RH, bias_H, dx, sums, R, H, _COLUMNS, _ROWS, num_warps=_WARPS)
    return dx, sums.sum(dim=0).to(bias_H.dtype)


@bias_gelu_backward.register_fake
def _(grad_RH: Tensor, x_RH: Tensor, bias_H: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x_RH, memory_format=torch.contiguous_format), torch.empty_like(bias_H)


def _keep(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs)


def _gradients(ctx, grad_RH: Tensor):
    return bias_gelu_backward(grad_RH, *ctx.saved_tensors)


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
def _tile(R, H, COLUMNS: tl.constexpr, ROWS: tl.constexpr):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    return row[:, None] * H + column[None, :], (row[:, None] < R) & (column[None, :] < H), column


@triton.jit
def _forward(x, bias, out, R, H, COLUMNS: tl.constexpr, ROWS: tl.constexpr):
    at, inside, column = _tile(R, H, COLUMNS, ROWS)
    value = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    value += tl.load(bias + column, mask=column < H, other=0.0).to(tl.float32)[None, :]
    bent = _tanh(_inner(value))
    tl.store(out + at, 0.5 * value * (1.0 + bent), mask=inside)


@triton.jit
def _backward(grad, x, bias, dx, sums, R, H, COLUMNS: tl.constexpr, ROWS: tl.constexpr):
    at, inside, column = _tile(R, H, COLUMNS, ROWS)
    value = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    value += tl.load(bias + column, mask=column < H, other=0.0).to(tl.float32)[None, :]
    dy = tl.load(grad + at, mask=inside, other=0.0).to(tl.float32)
    square = value * value
    bent = _tanh(_inner(value))
    slope = 0.5 * (1.0 + bent) + 0.5 * value * (1.0 - bent * bent) * 0.7978845608028654 * (1.0 + 0.134145 * square)
    result = tl.where(inside, dy * slope, 0.0)
    tl.store(dx + at, result, mask=inside)
    tl.store(sums + tl.program_id(0).to(tl.int64) * H + column, tl.sum(result, axis=0), mask=column < H)
