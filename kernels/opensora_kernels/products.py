"""Matrix products inside kernels, and tiles of tokens of one head, whose width needn't be a power of two."""

# K head dim; LO, HI: its two parts

from __future__ import annotations

import os

import triton
import triton.language as tl

_INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")
WIDEST_HEAD = 128
"""Head dim at most: tiles of a wider head are more than a multiprocessor's shared memory."""
_LEAST = 16
"""Of a side of a matrix product."""


def head_parts(head_dim: int) -> tuple[int, int]:
    """Two powers of two that hold a head dim: of 72 they are 64 and 16, where one would be 128. The second may be 0.

    Two make of a product along the head dim two, and of one across it two columns of tiles: 80 of 72 columns are worked on, not 128.
    """
    whole = max(_LEAST, triton.next_power_of_2(head_dim))
    low = whole // 2
    if whole == head_dim or low < _LEAST:
        return whole, 0
    high = max(_LEAST, triton.next_power_of_2(head_dim - low))
    return (low, high) if low + high < whole else (whole, 0)


def rows_of(tokens: int, *, most: int) -> int:
    """Rows of a tile for so many tokens."""
    return min(most, max(_LEAST, triton.next_power_of_2(tokens)))


@triton.jit
def product(a, b):
    """``a @ b`` in float32, of numbers in any precision; float32 ones are not rounded to TF32."""
    if _INTERPRETED:  # Triton's interpreter keeps bfloat16 as integers, and multiplies those (3.7)
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, input_precision="ieee")


@triton.jit
def load_tile(base, row, column, step, rows, columns):
    """Rows at ``base + row * step``; zeros beyond ``rows`` and ``columns``."""
    inside = (row[:, None] < rows) & (column[None, :] < columns)
    return tl.load(base + row[:, None].to(tl.int64) * step + column[None, :], mask=inside, other=0.0)


@triton.jit
def store_tile(base, row, column, step, rows, columns, value):
    """As ``load_tile``."""
    inside = (row[:, None] < rows) & (column[None, :] < columns)
    tl.store(base + row[:, None].to(tl.int64) * step + column[None, :], value, mask=inside)
