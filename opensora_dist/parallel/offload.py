"""What autograd keeps of a stretch of the forward waits in CPU memory, and is back before its backward needs it."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.multiprocessing.reductions import StorageWeakRef

from opensora_dist.parallel.recompute import Store

MIN_BYTES = 1 << 16
"""Of a storage that is worth a transfer."""
_CAST_DEPTH = 6
"""Nodes of autograd between a parameter and what is made of it alone: casts, slices, transposes."""


class Around(Protocol):
    """How a stretch of the forward is run."""

    def __call__(self, run: Callable[[Store | None], Tensor], *, stays: Iterable[Tensor]) -> Tensor: ...


class Offload:
    """Moves what autograd keeps to CPU memory, on a stream of its own, and back one stretch ahead of its use.

    A stretch is what ``around`` runs: a block. Its copies to the CPU run beside the stretches after it. When backward comes to a
    stretch, the copies back of the one before it start, beside the backward of this one. A storage is moved once, whole, however many
    tensors of it are kept. On a CPU the same steps copy within CPU memory, so that they can be tested.

    Left where they are: parameters and what is made of parameters alone (casts that autocast caches), what the caller says lives on
    anyway, storages below ``min_bytes``, and DTensors, which only tensor parallelism keeps.

    Args:
        device: What is on it is moved.
        min_bytes: Smallest storage that is moved.

    Source: ZeRO-Offload's overlap, arXiv 2101.06840, for activations; as torchtune's ``OffloadActivations`` and Megatron-LM do it.
    """

    def __init__(self, device: torch.device, *, min_bytes: int = MIN_BYTES) -> None:
        self.device, self.min_bytes = device, min_bytes
        self.parked_bytes = 0
        """In CPU memory now."""
        self.moved_bytes = 0
        """Moved to CPU memory so far."""
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None  # type: ignore[no-untyped-call]
        self._latest: weakref.ref[_Stretch] | None = None

    def around(self, run: Callable[[Store | None], Tensor], *, stays: Iterable[Tensor]) -> Tensor:
        """``run(store)``; what autograd keeps of it is moved, and so is what ``run`` puts into the store itself.

        Args:
            run: A stretch of the forward, with one output. Its argument is None where nothing is kept.
            stays: Parameters, as they are while the stretch runs (FSDP2 frees what it has gathered by itself), and what lives longer.
        """
        if not torch.is_grad_enabled():
            return run(None)
        stretch = _Stretch(self, previous=self._latest, stays=stays)
        self._latest = weakref.ref(stretch)
        with torch.autograd.graph.saved_tensors_hooks(stretch.pack, stretch.unpack):
            out = run(stretch)
        stretch.end()
        if out.requires_grad:
            out.register_hook(lambda _grad: stretch.begin_backward())  # type: ignore[no-untyped-call]
        return out

    def beside(self, run: Callable[[Store | None], Tensor], *, stays: Iterable[Tensor]) -> Tensor:
        """``run(None)``, which keeps what it keeps on the device: the last stretch, whose backward comes at once.

        When it comes, what the stretch before needs is fetched.
        """
        out = run(None)
        previous = self._latest
        if out.requires_grad and previous is not None:
            out.register_hook(lambda _grad: _fetch(previous))  # type: ignore[no-untyped-call]
        return out

    @torch.no_grad()
    def to_host(self, device_bytes: Tensor) -> Tensor:
        """Starts a copy of [bytes] to CPU memory, once what is being computed is there."""
        size = device_bytes.numel()
        self.parked_bytes += size
        self.moved_bytes += size
        host_bytes = torch.empty(size, dtype=torch.uint8, pin_memory=self._stream is not None)
        if self._stream is None:
            return host_bytes.copy_(device_bytes)
        self._stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self._stream):
            host_bytes.copy_(device_bytes, non_blocking=True)
        device_bytes.record_stream(self._stream)  # its memory isn't given out again before it has been read
        return host_bytes

    @torch.no_grad()
    def to_device(self, host_bytes: Tensor) -> tuple[Tensor, torch.cuda.Event | None]:
        """Starts a copy back; the event says when it is there. After ``to_host`` on the same stream, so in its order."""
        if self._stream is None:
            return host_bytes.clone(), None
        with torch.cuda.stream(self._stream):
            device_bytes = torch.empty_like(host_bytes, device=self.device)
            device_bytes.copy_(host_bytes, non_blocking=True)
            return device_bytes, self._stream.record_event()

    def released(self, size: int) -> None:
        """Bytes that left CPU memory."""
        self.parked_bytes -= size


class _Parked:
    """One storage in CPU memory. Lives as long as a tensor of it is kept."""

    def __init__(self, offload: Offload, device_bytes: Tensor) -> None:
        self._offload = offload
        self._host_bytes = offload.to_host(device_bytes)
        self._back: tuple[Tensor, torch.cuda.Event | None] | None = None
        weakref.finalize(self, offload.released, self._host_bytes.numel()).atexit = False

    def fetch(self) -> None:
        """Starts the way back, unless it was started."""
        if self._back is None:
            self._back = self._offload.to_device(self._host_bytes)

    def take(self) -> torch.UntypedStorage:
        """The storage on the device, for work that the current stream gets from now on."""
        self.fetch()
        assert self._back is not None
        device_bytes, event = self._back
        if event is not None:
            stream = torch.cuda.current_stream(device_bytes.device)
            stream.wait_event(event)
            device_bytes.record_stream(stream)  # it was allocated on the other stream
        return device_bytes.untyped_storage()


@dataclass(frozen=True)
class _Kept:
    """What autograd holds in place of a tensor."""

    parked: _Parked
    stretch: _Stretch  # which lives until nothing of it is kept
    dtype: torch.dtype
    shape: torch.Size
    stride: tuple[int, ...]
    offset: int | torch.SymInt


class _Stretch:
    """What is moved of one run of ``around``. Knows storages and the stretch before it weakly, so that all go with the graph.

    ``_moved`` is by storage and version: what is written to between two savings is two things.
    """

    def __init__(self, offload: Offload, *, previous: weakref.ref[_Stretch] | None, stays: Iterable[Tensor]) -> None:
        self._offload, self._previous = offload, previous
        stays = [t._local_tensor if isinstance(t, DTensor) else t for t in stays]
        self._stays = {t.untyped_storage()._cdata for t in stays}
        self._parameters = {id(t) for t in stays}
        self._moved: dict[tuple[int, int], tuple[StorageWeakRef, weakref.ref[_Parked]]] = {}
        self._parked: list[weakref.ref[_Parked]] = []

    def pack(self, tensor: Tensor) -> Any:
        storage = tensor.untyped_storage()
        if not self._moves(tensor, storage):
            return tensor
        key = storage._cdata, tensor._version
        known = self._moved.get(key)
        parked = known[1]() if known is not None else None
        if parked is None:
            parked = _Parked(self._offload, torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage))
            # The weak reference keeps the storage's address from being given to another.
            self._moved[key] = StorageWeakRef(storage), weakref.ref(parked)  # type: ignore[no-untyped-call]
            self._parked.append(weakref.ref(parked))
        return _Kept(parked, self, tensor.dtype, tensor.shape, tensor.stride(), tensor.storage_offset())

    def unpack(self, kept: Any) -> Any:
        if not isinstance(kept, _Kept):
            return kept
        storage = kept.parked.take()
        return torch.empty(0, dtype=kept.dtype, device=storage.device).set_(storage, kept.offset, kept.shape, kept.stride)

    def end(self) -> None:
        """The forward is over: storages may come to other uses."""
        self._moved.clear()

    def begin_backward(self) -> None:
        """What this stretch needs now, and the one before it next, comes back."""
        self.fetch()
        if self._previous is not None:
            _fetch(self._previous)

    def fetch(self) -> None:
        """Starts the way back of all that is still kept."""
        for ref in self._parked:
            parked = ref()
            if parked is not None:
                parked.fetch()

    def _moves(self, tensor: Tensor, storage: torch.UntypedStorage) -> bool:
        if (
            isinstance(tensor, (DTensor, nn.Parameter))
            or tensor.device.type != self._offload.device.type
            or storage.nbytes() < self._offload.min_bytes
        ):
            return False
        return storage._cdata not in self._stays and not self._is_of_a_parameter(tensor)

    def _is_of_a_parameter(self, tensor: Tensor) -> bool:
        """Whether autograd made it of one parameter and nothing else."""
        node: Any = tensor.grad_fn
        for _ in range(_CAST_DEPTH):
            if node is None:
                return False
            leaf = getattr(node, "variable", None)
            if leaf is not None:
                return id(leaf) in self._parameters
            inputs = [fn for fn, _ in node.next_functions if fn is not None]
            node = inputs[0] if len(inputs) == 1 else None
        return False


def _fetch(ref: weakref.ref[_Stretch]) -> None:
    stretch = ref()
    if stretch is not None:
        stretch.fetch()
