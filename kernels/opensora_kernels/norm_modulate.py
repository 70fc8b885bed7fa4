"""LayerNorm without affine, then adaLN's shift and scale: one read and one write of the residual stream."""

# B samples, L tokens of a sample, D width

from __future__ import annotations

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from opensora_kernels.rows import ROWS_PER_PROGRAM, block_of, chunks_of, norm_gradient, partial_sums, row_statistics, warps_of


def reference(x_BLD: Tensor, shift_BD: Tensor, scale_BD: Tensor, eps: float = 1e-6) -> Tensor:
    """``LN(x) (1 + scale) + shift``.

    Args:
        x_BLD: Tokens.
        shift_BD: Of each sample.
        scale_BD: Of each sample.
    """
    normal = F.layer_norm(x_BLD, x_BLD.shape[-1:], eps=eps)
    return normal * (1 + scale_BD[:, None]) + shift_BD[:, None]


@torch.library.custom_op("opensora::norm_modulate", mutates_args=())
def norm_modulate(x_BLD: Tensor, shift_BD: Tensor, scale_BD: Tensor, eps: float = 1e-6) -> Tensor:
    """As ``reference``, with statistics and products in float32; the result has the dtype of the modulation.

    Nothing but the inputs is kept for backward: mean and deviation of a row are in the row, which is read anyway.
    """
    B, L, D = x_BLD.shape
    x_BLD, out = x_BLD.contiguous(), torch.empty(x_BLD.shape, dtype=shift_BD.dtype, device=x_BLD.device)
    if out.numel():
        _forward[(B * L,)](
            x_BLD, shift_BD.contiguous(), scale_BD.contiguous(), out, L, D, eps, block_of(D), num_warps=warps_of(D)
        )
    return out


@norm_modulate.register_fake
def _(x_BLD: Tensor, shift_BD: Tensor, scale_BD: Tensor, eps: float = 1e-6) -> Tensor:
    return torch.empty(x_BLD.shape, dtype=shift_BD.dtype, device=x_BLD.device)


@torch.library.custom_op("opensora::norm_modulate_backward", mutates_args=())
def norm_modulate_backward(grad_BLD: Tensor, x_BLD: Tensor, scale_BD: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, shift and scale."""
    B, L, D = x_BLD.shape
    x_BLD, grad_BLD = x_BLD.contiguous(), grad_BLD.contiguous()
    dx = torch.empty_like(x_BLD, memory_format=torch.contiguous_format)
    dshift, dscale = (partial_sums(B, rows=L, width=D, like=x_BLD) for _ in range(2))
    if x_BLD.numel():
        _backward[(chunks_of(L), B)](
            grad_BLD,
            x_BLD,
            scale_BD.contiguous(),
            dx,
            dshift,
            dscale,
            L,
            D,
            eps,
            block_of(D),
            ROWS_PER_PROGRAM,
            num_warps=warps_of(D),
        )
    return dx, dshift.sum(dim=1).to(scale_BD.dtype), dscale.sum(dim=1).to(scale_BD.dtype)


@norm_modulate_backward.register_fake
def _(grad_BLD: Tensor, x_BLD: Tensor, scale_BD: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(x_BLD, memory_format=torch.contiguous_format), torch.empty_like(scale_BD), torch.empty_like(scale_BD)


def _keep(ctx, inputs, output) -> None:
    x_BLD, _, scale_BD, ctx.eps = inputs
    ctx.save_for_backward(x_BLD, scale_BD)


def _gradients(ctx, grad_BLD: Tensor):
    x_BLD, scale_BD = ctx.saved_tensors
    return *norm_modulate_backward(grad_BLD, x_BLD, scale_BD, ctx.eps), None


norm_modulate.register_autograd(_gradients, setup_context=_keep)


@triton.jit
def _forward(x, shift, scale, out, L, D, eps, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    sample = row // L
    column = tl.arange(0, BLOCK)
    inside = column < D
    value = tl.load(x + row * D + column, mask=inside, other=0.0).to(tl.float32)
    mean, rstd = row_statistics(value, inside, D, eps)
    by = tl.load(scale + sample * D + column, mask=inside, other=0.0).to(tl.float32)
    to = tl.load(shift + sample * D + column, mask=inside, other=0.0).to(tl.float32)
    result = (value - mean) * rstd * (1.0 + by) + to
    tl.store(out + row * D + column, result, mask=inside)


@triton.jit
def _backward(grad, x, scale, dx, dshift, dscale, L, D, eps, BLOCK: tl.constexpr, ROWS: tl.constexpr):
    chunk = tl.program_id(0)
    sample = tl.program_id(1).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < D
    by = 1.0 + tl.load(scale + sample * D + column, mask=inside, other=0.0).to(tl.float32)
    shift_sum = tl.zeros([BLOCK], dtype=tl.float32)
    scale_sum = tl.zeros([BLOCK], dtype=tl.float32)
    for i in range(chunk * ROWS, min(L, (chunk + 1) * ROWS)):
        at = (sample * L + i) * D + column
        value = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
        dy = tl.load(grad + at, mask=inside, other=0.0).to(tl.float32)
        mean, rstd = row_statistics(value, inside, D, eps)
        normal = tl.where(inside, (value - mean) * rstd, 0.0)
        shift_sum += dy
        scale_sum += dy * normal
        tl.store(dx + at, norm_gradient(dy * by, normal, rstd, D), mask=inside)
    to = (sample * tl.num_programs(0) + chunk) * D + column
    tl.store(dshift + to, shift_sum, mask=inside)
    tl.store(dscale + to, scale_sum, mask=inside)
