"""What a branch adds to the residual stream, and the LayerNorm and modulation that the next branch begins with, in one pass.

Apart, the stream is written, read again and written once more: five passes over [B, L, D] become four (two read, two written).
"""

# B samples, L tokens of a sample, D width

from __future__ import annotations

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from opensora_kernels.rows import ROWS_PER_PROGRAM, block_of, chunks_of, norm_gradient, partial_sums, row_statistics, warps_of


def reference(
    x_BLD: Tensor, branch_BLD: Tensor, gate_BD: Tensor, shift_BD: Tensor, scale_BD: Tensor, eps: float = 1e-6
) -> tuple[Tensor, Tensor]:
    """``s = x + gate branch``, and ``LN(s) (1 + scale) + shift``.

    Returns:
        The stream, in the dtype of x, and what the next branch is given, in that of the modulation.
    """
    stream = x_BLD + gate_BD[:, None] * branch_BLD
    normal = F.layer_norm(stream, stream.shape[-1:], eps=eps)
    return stream.to(x_BLD.dtype), normal * (1 + scale_BD[:, None]) + shift_BD[:, None]


@torch.library.custom_op("opensora::gated_norm", mutates_args=())
def gated_norm(
    x_BLD: Tensor, branch_BLD: Tensor, gate_BD: Tensor, shift_BD: Tensor, scale_BD: Tensor, eps: float = 1e-6
) -> tuple[Tensor, Tensor]:
    """As ``reference``, in float32 inside. The statistics are those of the stream as it is stored."""
    B, L, D = x_BLD.shape
    x_BLD, branch_BLD = x_BLD.contiguous(), branch_BLD.contiguous()
    stream, out = (
        torch.empty_like(x_BLD, memory_format=torch.contiguous_format),
        torch.empty(x_BLD.shape, dtype=shift_BD.dtype, device=x_BLD.device),
    )
    if out.numel():
        modulation = (t.contiguous() for t in (gate_BD, shift_BD, scale_BD))
        _forward[(B * L,)](x_BLD, branch_BLD, *modulation, stream, out, L, D, eps, block_of(D), num_warps=warps_of(D))
    return stream, out


@gated_norm.register_fake
def _(
    x_BLD: Tensor, branch_BLD: Tensor, gate_BD: Tensor, shift_BD: Tensor, scale_BD: Tensor, eps: float = 1e-6
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x_BLD, memory_format=torch.contiguous_format), torch.empty(
        x_BLD.shape, dtype=shift_BD.dtype, device=x_BLD.device
    )


@torch.library.custom_op("opensora::gated_norm_backward", mutates_args=())
def gated_norm_backward(
    dstream_BLD: Tensor, dout_BLD: Tensor, stream_BLD: Tensor, branch_BLD: Tensor, gate_BD: Tensor, scale_BD: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, branch, gate, shift and scale."""
    B, L, D = stream_BLD.shape
    dstream_BLD, dout_BLD, stream_BLD, branch_BLD = (t.contiguous() for t in (dstream_BLD, dout_BLD, stream_BLD, branch_BLD))
    dx, dbranch = (
        torch.empty_like(stream_BLD, memory_format=torch.contiguous_format),
        torch.empty_like(branch_BLD, memory_format=torch.contiguous_format),
    )
    sums = [partial_sums(B, rows=L, width=D, like=stream_BLD) for _ in range(3)]
    if stream_BLD.numel():
        _backward[(chunks_of(L), B)](
            dstream_BLD,
            dout_BLD,
            stream_BLD,
            branch_BLD,
            gate_BD.contiguous(),
            scale_BD.contiguous(),
            dx,
            dbranch,
            *sums,
            L,
            D,
            eps,
            block_of(D),
            ROWS_PER_PROGRAM,
            num_warps=warps_of(D),
        )
    dgate, dshift, dscale = (s.sum(dim=1).to(gate_BD.dtype) for s in sums)
    return dx, dbranch, dgate, dshift, dscale


@gated_norm_backward.register_fake
def _(
    dstream_BLD: Tensor, dout_BLD: Tensor, stream_BLD: Tensor, branch_BLD: Tensor, gate_BD: Tensor, scale_BD: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    small = (torch.empty_like(gate_BD) for _ in range(3))
    return (
        torch.empty_like(stream_BLD, memory_format=torch.contiguous_format),
        torch.empty_like(branch_BLD, memory_format=torch.contiguous_format),
        *small,
    )


def _keep(ctx, inputs, output) -> None:
    _, branch_BLD, gate_BD, _, scale_BD, ctx.eps = inputs
    ctx.save_for_backward(output[0], branch_BLD, gate_BD, scale_BD)  # the stream is kept by what follows, too


def _gradients(ctx, dstream_BLD: Tensor, dout_BLD: Tensor):
    return *gated_norm_backward(dstream_BLD, dout_BLD, *ctx.saved_tensors, ctx.eps), None


gated_norm.register_autograd(_gradients, setup_context=_keep)


@triton.jit
def _forward(x, branch, gate, shift, scale, stream, out, L, D, eps, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    sample = row // L
    column = tl.arange(0, BLOCK)
    inside = column < D
    value = tl.load(x + row * D + column, mask=inside, other=0.0).to(tl.float32)
    added = tl.load(branch + row * D + column, mask=inside, other=0.0).to(tl.float32)
    by = tl.load(gate + sample * D + column, mask=inside, other=0.0).to(tl.float32)
    stored = (value + by * added).to(stream.dtype.element_ty)
    tl.store(stream + row * D + column, stored, mask=inside)
    value = stored.to(tl.float32)
    mean, rstd = row_statistics(value, inside, D, eps)
    by = tl.load(scale + sample * D + column, mask=inside, other=0.0).to(tl.float32)
    to = tl.load(shift + sample * D + column, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + row * D + column, (value - mean) * rstd * (1.0 + by) + to, mask=inside)


@triton.jit
def _backward(
    dstream,
    dout,
    stream,
    branch,
    gate,
    scale,
    dx,
    dbranch,
    dgate,
    dshift,
    dscale,
    L,
    D,
    eps,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
):
    chunk = tl.program_id(0)
    sample = tl.program_id(1).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < D
    by = 1.0 + tl.load(scale + sample * D + column, mask=inside, other=0.0).to(tl.float32)
    opened = tl.load(gate + sample * D + column, mask=inside, other=0.0).to(tl.float32)
    gate_sum = tl.zeros([BLOCK], dtype=tl.float32)
    shift_sum = tl.zeros([BLOCK], dtype=tl.float32)
    scale_sum = tl.zeros([BLOCK], dtype=tl.float32)
    for i in range(chunk * ROWS, min(L, (chunk + 1) * ROWS)):
        at = (sample * L + i) * D + column
        value = tl.load(stream + at, mask=inside, other=0.0).to(tl.float32)
        dy = tl.load(dout + at, mask=inside, other=0.0).to(tl.float32)
        mean, rstd = row_statistics(value, inside, D, eps)
        normal = tl.where(inside, (value - mean) * rstd, 0.0)
        shift_sum += dy
        scale_sum += dy * normal
        total = norm_gradient(dy * by, normal, rstd, D) + tl.load(dstream + at, mask=inside, other=0.0).to(tl.float32)
        tl.store(dx + at, total, mask=inside)
        tl.store(dbranch + at, total * opened, mask=inside)
        gate_sum += total * tl.load(branch + at, mask=inside, other=0.0).to(tl.float32)
    to = (sample * tl.num_programs(0) + chunk) * D + column
    tl.store(dgate + to, gate_sum, mask=inside)
    tl.store(dshift + to, shift_sum, mask=inside)
    tl.store(dscale + to, scale_sum, mask=inside)
