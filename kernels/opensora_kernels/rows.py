"""What kernels over rows share: how rows are dealt to programs, and sums over the rows of a sample."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

ROWS_PER_PROGRAM = 32
"""Rows that one program of a backward adds up before it writes: a partial sum costs as much as a row."""


def block_of(width: int) -> int:
    """Columns of a program that holds whole rows: the next power of two."""
    return triton.next_power_of_2(width)


def warps_of(width: int) -> int:
    """Warps of a program that holds a row of this width: about four numbers to a thread and vector load."""
    return min(16, max(1, block_of(width) // 256))


def chunks_of(rows: int) -> int:
    """Programs to a sample of so many rows."""
    return triton.cdiv(rows, ROWS_PER_PROGRAM)


def partial_sums(samples: int, *, rows: int, width: int, like: Tensor) -> Tensor:
    """float32 [samples, chunks, width], for each program to write its own: no atomics, so that sums are the same every time."""
    return torch.empty((samples, chunks_of(rows), width), dtype=torch.float32, device=like.device)


@triton.jit
def norm_gradient(dnormal, normal, rstd, width):
    """Gradient of a row, given that of the row as LayerNorm makes it; all float32."""
    along = tl.sum(dnormal * normal, axis=0) / width
    constant = tl.sum(dnormal, axis=0) / width
    return (dnormal - constant - normal * along) * rstd


@triton.jit
def row_statistics(x, inside, width, eps):
    """Mean and reciprocal standard deviation of a row in float32; ``inside`` masks the columns beyond it."""
    mean = tl.sum(x, axis=0) / width
    centred = tl.where(inside, x - mean, 0.0)
    variance = tl.sum(centred * centred, axis=0) / width
    return mean, 1.0 / tl.sqrt(variance + eps)
