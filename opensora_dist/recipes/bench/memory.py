"""Most memory that a stretch of work held at once, beyond what was there before it."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from opensora_dist.parallel.zero.base import ZeroBackend


@dataclass
class Peak:
    """What is measured of a block.

    Args:
        now: Bytes alive, beyond what was there before the block.
        restart: Begins anew: the peak is from here on.
        most: The peak so far, beyond what was there before the block.
        bytes: The peak; filled in when the block ends.
    """

    now: Callable[[], int]
    restart: Callable[[], None]
    most: Callable[[], int]
    bytes: int = 0


@contextmanager
def peak_memory(device: torch.device, *, parked: Callable[[], int] = lambda: 0) -> Iterator[Peak]:
    """Measures the block: on a GPU what the allocator gave out, on a CPU the storages of all tensors that operators made.

    On a CPU what a kernel or a backend allocates for itself is not seen (``LiveTensors``).

    Args:
        parked: Bytes of those tensors that would be in CPU memory if the device were a GPU: they don't count. Asked on a CPU only.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        peak = Peak(
            now=lambda: torch.cuda.memory_allocated(device) - before,
            restart=lambda: torch.cuda.reset_peak_memory_stats(device),
            most=lambda: torch.cuda.max_memory_allocated(device) - before,
        )
        yield peak
        peak.bytes = peak.most()
        return
    with LiveTensors(parked=parked) as live:
        peak = Peak(now=lambda: live.now - parked(), restart=live.restart, most=lambda: live.peak)
        yield peak
    peak.bytes = peak.most()


class LiveTensors(TorchDispatchMode):  # type: ignore[no-untyped-call]  # of torch's, which has no types
    """Follows the storages of tensors in memory from the operator that made them to their end, fake ones like real ones.

    Counted: what any operator returns that is made while the mode is on, each storage once: weights, gathered weights (FSDP2 resizes
    their storages), gradients and buckets, optimizer state, activations, buffers of collectives. Not counted: what a kernel or a
    communication library allocates for itself, what was made before, tensors on the meta device.

    Args:
        parked: Bytes of what is followed that are not to count in ``peak``.
    """

    def __init__(self, *, parked: Callable[[], int] = lambda: 0) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = 0
        """Bytes alive."""
        self.peak = 0
        """Most bytes alive at once since the start, or since it was last set."""
        self._parked = parked
        self._sizes: weakref.WeakKeyDictionary[torch.UntypedStorage, list[int]] = weakref.WeakKeyDictionary()
        self._patch = mock.patch.object(torch.UntypedStorage, "resize_", self._resizing(torch.UntypedStorage.resize_))

    def restart(self) -> None:
        """The peak is from here on."""
        self.peak = self.now - self._parked()

    def __enter__(self) -> LiveTensors:
        self._patch.start()
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)  # type: ignore[no-untyped-call]
        self._patch.stop()

    def _resizing(self, real: Callable[..., Any]) -> Callable[..., Any]:
        """No operator, so nothing that a mode sees."""

        def resize_(storage: torch.UntypedStorage, size: int) -> Any:
            out = real(storage, size)
            self._note(storage)
            return out

        return resize_

    def __torch_dispatch__(self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None) -> Any:
        out = func(*args, **(kwargs or {}))
        given = {_local(t).untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor) and tensor.device.type != "meta":
                storage = _local(tensor).untyped_storage()
                if storage._cdata not in given:
                    self._note(storage)
        return out

    def _note(self, storage: torch.UntypedStorage) -> None:
        size = self._sizes.get(storage)
        if size is None:
            size = self._sizes[storage] = [0]
            weakref.finalize(storage, self._change, size, 0)
        self._change(size, storage.nbytes())

    def _change(self, size: list[int], new: int) -> None:
        grown = new - size[0]
        self.now += grown
        size[0] = new
        # Nothing is asked where memory shrinks: that is inside of a tensor's end, when what it was part of must not be touched.
        if grown > 0:
            self.peak = max(self.peak, self.now - self._parked())


def zero_parked(backend: ZeroBackend, offload: str) -> Callable[[], int]:
    """Bytes that ``zero.offload`` has in CPU memory beside a GPU, whenever asked: weights, moments, gradients."""
    held = sum(weight.nbytes for weight in backend.weights.values())
    if offload == "none":
        return lambda: 0
    if offload == "optimizer":
        return lambda: 4 * held
    params = list(
        backend.model.parameters()
    )  # the sharded ones: while a block computes, its modules have whole ones in their place
    return lambda: 3 * held + sum(_local(p.grad).nbytes for p in params if p.grad is not None)


def _local(tensor: Tensor) -> Tensor:
    """Of a DTensor the part that is here: its own storage is of the whole's size, and empty."""
    return tensor._local_tensor if isinstance(tensor, DTensor) else tensor
