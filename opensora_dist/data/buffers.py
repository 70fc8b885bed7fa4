"""Memory that is used again and again: page-aligned, and pinned where a GPU reads it.

A fresh allocation of a megabyte is mapped and faulted in page by page each time, which costs more than copying into it does. So a slot
keeps its memory, and only ever grows.
"""

from __future__ import annotations

import mmap
from collections.abc import Sequence
from contextlib import suppress

import torch
from torch import Tensor

ALIGNMENT = 4096
"""Of every array in a slot, in bytes: a page, so that no two arrays share one."""


class Slot:
    """Memory for the arrays of one batch.

    Args:
        pinned: Whether a GPU copies out of it.
    """

    def __init__(self, *, pinned: bool) -> None:
        self._pinned = pinned
        self._bytes = torch.empty(0, dtype=torch.uint8)
        self._copied: torch.cuda.Event | None = None

    @property
    def num_bytes(self) -> int:
        """How much it holds by now."""
        return self._bytes.numel()

    def arrays(self, sizes: Sequence[int]) -> list[Tensor]:
        """Parts of the memory, uint8, aligned. They hold what was there before, and are valid until the next call.

        Waits until what was copied out of it before is over.

        Args:
            sizes: Bytes of each.
        """
        self.wait()
        starts, total = [], 0
        for size in sizes:
            starts.append(total)
            total += aligned(size)
        if total > self.num_bytes:
            self._bytes = _allocate(total, pinned=self._pinned)
        return [self._bytes[start : start + size] for start, size in zip(starts, sizes, strict=True)]

    def copied(self, event: torch.cuda.Event) -> None:
        """Notes what must have happened before the memory is written again: a copy to a GPU that runs beside."""
        self._copied = event

    def wait(self) -> None:
        """Until the memory may be written."""
        if self._copied is not None:
            self._copied.synchronize()
            self._copied = None


def aligned(num_bytes: int) -> int:
    """The next multiple of ``ALIGNMENT``."""
    return -(-num_bytes // ALIGNMENT) * ALIGNMENT


def _allocate(num_bytes: int, *, pinned: bool) -> Tensor:
    """uint8, starting at a page."""
    if pinned:
        return torch.empty(num_bytes, dtype=torch.uint8, pin_memory=True)  # CUDA aligns to pages by itself
    memory = mmap.mmap(-1, num_bytes)
    with suppress(OSError):  # of a kernel without them
        memory.madvise(mmap.MADV_HUGEPAGE)  # fewer faults, and fewer misses of the address cache
    return torch.frombuffer(memory, dtype=torch.uint8)
