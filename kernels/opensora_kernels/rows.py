"""What kernels over tokens share: where a token's row lies, how rows are dealt to programs, and sums over the rows of a sample.

Tokens are [B, T, S, D] with any strides but that of D, which is 1: after an attention along time they come as a transposed view, and
reading them where they lie saves a copy. What is of a sample is [B, D], rows dense likewise.
"""

# B samples, T frames, S tokens per frame, D width, L = T S

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

ROWS_FORWARD, ROWS_BACKWARD = 4, 1
"""Whole rows that a program holds at once. In forward several, so that what is of the sample is read once for all of them. Backward reads
that once for its loop, and two rows at once take the registers of two programs: no more bytes on their way, and fewer warps to wait."""
_ELEMENTS_PER_WARP = 512
_PROGRAMS = 4 * 132
"""That a backward wants: some to each multiprocessor of an H100."""


def block_of(width: int) -> int:
    """Columns of a program that holds whole rows: the next power of two."""
    return triton.next_power_of_2(width)


def warps_of(width: int) -> int:
    """Warps of a program that holds rows of this width: 16 numbers of a row to a thread, two vector loads of bfloat16."""
    return min(16, max(1, block_of(width) // _ELEMENTS_PER_WARP))


def rows_per_program(rows: int, *, least: int, most: int) -> int:
    """Rows that one program of a backward adds up before it writes their sum.

    Few rows to a program fill the device, many keep the sums small beside what is read. The former counts more where there are few rows.

    Args:
        rows: Of all samples; where a program has a part of the columns, times their parts.
        least: A power of two.
        most: A power of two.
    Returns:
        The largest power of two that leaves ``_PROGRAMS`` programs or more, from ``least``, which comes first, to ``most``.
    """
    each = rows // _PROGRAMS
    return min(most, max(least, 1 << each.bit_length() >> 1))


def dense_rows(tensor: Tensor, *, dims: int = 1) -> Tensor:
    """The tensor, or a contiguous copy where its last ``dims`` dims don't lie one after the other in memory.

    ``torch.empty_like`` of it has rows as dense, and tokens in memory in the same order.
    """
    size = 1
    for length, stride in zip(reversed(tensor.shape[-dims:]), reversed(tensor.stride()[-dims:])):
        if stride != size and length > 1:
            return tensor.contiguous()
        size *= length
    return tensor


def of_samples(x_BTSD: Tensor, *rows_BD: Tensor) -> list[Tensor]:
    """What is of each sample, as a kernel can read it: [B, D], or it would read beyond its end."""
    wanted = (x_BTSD.shape[0], x_BTSD.shape[-1])
    assert all(row.shape == wanted for row in rows_BD), f"{[tuple(row.shape) for row in rows_BD]} for samples and width {wanted}"
    return [dense_rows(row) for row in rows_BD]


def steps_of(x_BTSD: Tensor) -> tuple[int, int, int]:
    """Strides of sample, frame and place."""
    return x_BTSD.stride()[:3]


def like_contiguous(x: Tensor, *, dtype: torch.dtype | None = None) -> Tensor:
    """Room for a result in the order of the dims, whatever the strides of ``x``: what a linear reads next."""
    return torch.empty(x.shape, dtype=dtype or x.dtype, device=x.device)


def partial_sums(kinds: int, x_BTSD: Tensor, *, rows: int) -> Tensor:
    """float32 [kinds, B, chunks, D], for each program to write its own: no atomics, so that sums are the same every time.

    Args:
        kinds: Sums of different things.
        rows: Of a program.
    """
    B, T, S, D = x_BTSD.shape
    return torch.empty((kinds, B, triton.cdiv(T * S, rows), D), dtype=torch.float32, device=x_BTSD.device)


@triton.jit
def row_starts(sample, row, S, steps):
    """Where rows begin: token ``row`` of a sample is place ``row % S`` of frame ``row // S``."""
    frame = row // S
    return sample * steps[0] + frame.to(tl.int64) * steps[1] + (row - frame * S).to(tl.int64) * steps[2]


@triton.jit
def load_rows(base, starts, column, inside):
    """A tile in float32; zeros outside."""
    return tl.load(base + starts[:, None] + column[None, :], mask=inside, other=0.0).to(tl.float32)


@triton.jit
def store_rows(base, starts, column, inside, value):
    """As ``load_rows``."""
    tl.store(base + starts[:, None] + column[None, :], value.to(base.dtype.element_ty), mask=inside)


@triton.jit
def load_row(base, step, sample, column, width):
    """What is of a sample, in float32."""
    return tl.load(base + sample * step + column, mask=column < width, other=0.0).to(tl.float32)


@triton.jit
def store_sum(sums, kind, sample, chunk, chunks, column, width, value):
    """To a program's place in ``partial_sums``, where the grid's second axis is samples."""
    at = ((kind * tl.num_programs(1) + sample) * chunks + chunk) * width + column
    tl.store(sums + at, value, mask=column < width)


@triton.jit
def normalised(x, inside, width, eps):
    """Rows without their mean, over their standard deviation, zeros outside; and the reciprocal of the latter."""
    mean = tl.sum(x, axis=1) / width
    centred = tl.where(inside, x - mean[:, None], 0.0)
    rstd = 1.0 / tl.sqrt(tl.sum(centred * centred, axis=1) / width + eps)
    return centred * rstd[:, None], rstd


@triton.jit
def norm_gradient(dnormal, normal, rstd, width):
    """Gradient of rows, given that of the rows as ``normalised`` makes them."""
    along = tl.sum(dnormal * normal, axis=1) / width
    constant = tl.sum(dnormal, axis=1) / width
    return (dnormal - constant[:, None] - normal * along[:, None]) * rstd[:, None]
