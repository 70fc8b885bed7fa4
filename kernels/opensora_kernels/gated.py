"""What a branch adds to the residual stream, times a gate of the sample: read both, write the stream."""

# B samples, T frames, S tokens per frame, D width

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from opensora_kernels.rows import (
    dense_rows,
    load_row,
    load_rows,
    of_samples,
    partial_sums,
    row_starts,
    rows_per_program,
    steps_of,
    store_rows,
    store_sum,
)

COLUMNS, ROWS, WARPS = 128, 32, 4
"""Of a tile. No row is needed as a whole, and 128 divides the published widths, where the next power of two is up to 1.8 times as wide."""
FEWEST_ROWS, MOST_ROWS = 32, 256
"""That a program of backward adds up."""


def reference(x_BTSD: Tensor, branch_BTSD: Tensor, gate_BD: Tensor) -> Tensor:
    """``x + gate branch``, in the dtype of x."""
    return (x_BTSD + gate_BD[:, None, None] * branch_BTSD).to(x_BTSD.dtype)


@torch.library.custom_op("opensora::gated", mutates_args=())
def gated(x_BTSD: Tensor, branch_BTSD: Tensor, gate_BD: Tensor) -> Tensor:
    """As ``reference``, in float32 inside; with the strides of x."""
    B, T, S, D = x_BTSD.shape
    assert branch_BTSD.shape == x_BTSD.shape
    x, branch = dense_rows(x_BTSD), dense_rows(branch_BTSD)
    (gate,) = of_samples(x, gate_BD)
    out = torch.empty_like(x)
    if out.numel():
        _gated_forward[(triton.cdiv(T * S, ROWS) * triton.cdiv(D, COLUMNS), B)](
            x,
            steps_of(x),
            branch,
            steps_of(branch),
            gate,
            gate.stride(0),
            out,
            steps_of(out),
            T * S,
            S,
            D,
            COLUMNS,
            ROWS,
            num_warps=WARPS,
        )
    return out


@gated.register_fake
def _(x_BTSD: Tensor, branch_BTSD: Tensor, gate_BD: Tensor) -> Tensor:
    return torch.empty_like(dense_rows(x_BTSD))


@torch.library.custom_op("opensora::gated_backward", mutates_args=())
def gated_backward(grad_BTSD: Tensor, branch_BTSD: Tensor, gate_BD: Tensor) -> tuple[Tensor, Tensor]:
    """The gradient of the branch, with its strides, and that of the gate, float32 [B, D]. That of x is the stream's."""
    B, T, S, D = branch_BTSD.shape
    grad, branch = dense_rows(grad_BTSD), dense_rows(branch_BTSD)
    (gate,) = of_samples(branch, gate_BD)
    dbranch = torch.empty_like(branch)
    columns = triton.cdiv(D, COLUMNS)
    rows = rows_per_program(B * T * S * columns, least=FEWEST_ROWS, most=MOST_ROWS)
    sums = partial_sums(1, branch, rows=rows)
    if branch.numel():
        _gated_backward[(sums.shape[2] * columns, B)](
            grad,
            steps_of(grad),
            branch,
            steps_of(branch),
            gate,
            gate.stride(0),
            dbranch,
            steps_of(dbranch),
            sums,
            rows,
            T * S,
            S,
            D,
            COLUMNS,
            ROWS,
            num_warps=WARPS,
        )
    return dbranch, sums[0].sum(dim=1)


@gated_backward.register_fake
def _(grad_BTSD: Tensor, branch_BTSD: Tensor, gate_BD: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(dense_rows(branch_BTSD)), torch.empty(gate_BD.shape, dtype=torch.float32, device=gate_BD.device)


def _keep(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs[1:])


def _gradients(ctx, grad_BTSD: Tensor):
    branch_BTSD, gate_BD = ctx.saved_tensors
    dbranch, dgate = gated_backward(grad_BTSD, branch_BTSD, gate_BD)
    return grad_BTSD, dbranch, dgate.to(gate_BD.dtype)


gated.register_autograd(_gradients, setup_context=_keep)


@triton.jit(do_not_specialize=["L", "S"])
def _gated_forward(
    x, x_steps, branch, branch_steps, gate, gate_step, out, out_steps, L, S, D, COLUMNS: tl.constexpr, ROWS: tl.constexpr
):
    sample = tl.program_id(1).to(tl.int64)
    parts = tl.cdiv(D, COLUMNS)  # neighbours in memory are neighbours in time
    row = tl.program_id(0) // parts * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(0) % parts * COLUMNS + tl.arange(0, COLUMNS)
    inside = (row < L)[:, None] & (column < D)[None, :]
    value = load_rows(x, row_starts(sample, row, S, x_steps), column, inside)
    added = load_rows(branch, row_starts(sample, row, S, branch_steps), column, inside)
    result = value + load_row(gate, gate_step, sample, column, D)[None, :] * added
    store_rows(out, row_starts(sample, row, S, out_steps), column, inside, result)


@triton.jit(do_not_specialize=["rows", "L", "S"])
def _gated_backward(
    grad, grad_steps, branch, branch_steps, gate, gate_step, dbranch, dbranch_steps, sums, rows, L, S, D,
    COLUMNS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    sample = tl.program_id(1).to(tl.int64)
    parts = tl.cdiv(D, COLUMNS)
    chunk = tl.program_id(0) // parts
    column = tl.program_id(0) % parts * COLUMNS + tl.arange(0, COLUMNS)
    by = load_row(gate, gate_step, sample, column, D)
    gate_sum = tl.zeros([ROWS, COLUMNS], dtype=tl.float32)
    for start in range(chunk * rows, min(L, (chunk + 1) * rows), ROWS):
        row = start + tl.arange(0, ROWS)
        inside = (row < L)[:, None] & (column < D)[None, :]
        dy = load_rows(grad, row_starts(sample, row, S, grad_steps), column, inside)
        added = load_rows(branch, row_starts(sample, row, S, branch_steps), column, inside)
        gate_sum += dy * added
        store_rows(dbranch, row_starts(sample, row, S, dbranch_steps), column, inside, dy * by[None, :])
    store_sum(sums, 0, sample, chunk, tl.num_programs(0) // parts, column, D, tl.sum(gate_sum, axis=0))
