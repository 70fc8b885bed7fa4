"""A GPU that isn't there: its tensors have shapes and no numbers, and what would make the host wait for it is found.

To be imported in a process of its own alone: a process has one accelerator, and keeps it. Tensors of the device ``gpu`` are torch's fake
tensors; those of the CPU are real, so that what the host draws, counts and agrees on is done in earnest. Whatever needs a number of the
device is an error by itself: ``item``, ``bool``, ``nonzero``, a boolean index, ``equal``. What is watched here besides: copies to the
host, copies from host memory that isn't pinned or that are waited for, and waits for streams and events.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException, FakeTensor, FakeTensorMode
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

_aten = torch.ops.aten


class HostSync(Exception):
    """The host would wait for the device."""


def _waits(*_: Any) -> NoReturn:
    raise HostSync("it waits for a stream or an event")


class _Event:
    def __init__(self, **_options: Any) -> None:
        pass

    def record(self, *_: Any) -> None:
        pass

    wait = record
    synchronize = _waits


class _Stream:
    def __init__(self, *_: Any, **_options: Any) -> None:
        pass

    def record_event(self, *_: Any) -> _Event:
        return _Event()

    def wait_stream(self, *_: Any) -> None:
        pass

    wait_event = wait_stream
    synchronize = _waits


@contextmanager
def _within(_stream: _Stream | None) -> Iterator[None]:
    yield


_setup_privateuseone_for_python_backend(
    "gpu",
    backend_module=SimpleNamespace(
        Stream=_Stream,
        Event=_Event,
        stream=_within,
        current_stream=lambda *_: _Stream(),
        current_device=lambda: 0,
        device_count=lambda: 1,
        set_device=lambda _: None,
        is_available=lambda: True,
        is_initialized=lambda: True,
        manual_seed_all=lambda _: None,
        synchronize=_waits,
        get_amp_supported_dtype=lambda: [torch.bfloat16],
        _is_in_bad_fork=lambda: False,
    ),
)
GPU = torch.device("gpu", 0)
torch.distributed.Backend.backend_capability["fake"].append("gpu")

_others, _autocast = torch.library.Library("_", "IMPL"), torch.library.Library("aten", "IMPL")
_others.fallback(torch.library.fallthrough_kernel, "AutocastPrivateUse1")


def _in_half(op: Any) -> Any:
    """As autocast calls ``op`` on a CUDA device."""

    def cast(*args: Any, **kwargs: Any) -> Any:
        with torch._C._ExcludeDispatchKeyGuard(torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastPrivateUse1)):
            half = tree_map_only(Tensor, lambda t: t.to(torch.bfloat16) if t.dtype == torch.float32 else t, (args, kwargs))
            return op(*half[0], **half[1])

    return cast


for _op in ("linear", "matmul", "mm", "bmm", "addmm", "scaled_dot_product_attention"):
    _autocast.impl(_op, _in_half(getattr(_aten, _op)), "AutocastPrivateUse1")


class PretendedGpu(TorchDispatchMode):
    """Runs what is of the device on fake tensors.

    Args:
        allowed: Functions, as ``module:qualified name``, in which the host may wait; what they read is zeros.
    """

    def __init__(self, *, allowed: Sequence[str] = ()) -> None:
        super().__init__()
        self.strict = False
        """Whether a wait outside of what is allowed is an error; before, it is done."""
        self.waited: list[str] = []
        """The allowed functions in which the host waited while ``strict``."""
        self.sent: list[tuple[int, ...]] = []
        """Shapes of what was copied to the device while ``strict``."""
        self._allowed, self._fake, self._pinned = frozenset(allowed), FakeTensorMode(), dict[int, Tensor]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None) -> Any:
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented  # comes again with what it is made of
        kwargs = dict(kwargs or {})
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        of_device = [t for t in tensors if isinstance(t, FakeTensor)]
        if any(t.fake_mode is not self._fake for t in of_device):
            return func(*args, **kwargs)  # by which DTensor finds out shapes
        asked = torch.device(kwargs["device"]) if kwargs.get("device") is not None else None
        if func is _aten._pin_memory.default:
            pinned = args[0].clone()
            self._pinned[pinned.untyped_storage()._cdata] = pinned
            return pinned
        if func.overloadpacket is _aten.is_pinned:
            return self._is_pinned(args[0])
        if func is _aten._to_copy.default and asked is not None:
            if of_device and asked.type == "cpu":
                return self._read(func, torch.zeros(args[0].shape, dtype=kwargs.get("dtype") or args[0].dtype))
            if not of_device and asked == GPU and args[0].device.type == "cpu":
                self._send(args[0], non_blocking=bool(kwargs.get("non_blocking")))
                with self._fake:
                    return torch.empty(args[0].shape, dtype=kwargs.get("dtype") or args[0].dtype, device=GPU)
        if func is _aten.copy_.default and isinstance(args[0], FakeTensor) != isinstance(args[1], FakeTensor):
            if isinstance(args[1], FakeTensor):
                return self._read(func, args[0].zero_())
            if args[1].device.type == "cpu":
                self._send(args[1], non_blocking=len(args) > 2 and bool(args[2]))
                return args[0]
        if not of_device and asked != GPU:
            return func(*args, **kwargs)
        args, kwargs = tree_map_only(Tensor, self._as_fake, (args, kwargs))
        try:
            with self._fake:
                return func(*args, **kwargs)
        except DataDependentOutputException:
            return self._read(func, 0)
        except DynamicOutputShapeException as error:
            raise HostSync(f"{func}: how large its result is, the device alone knows") from error

    def _as_fake(self, tensor: Tensor) -> Tensor:
        """A number of the CPU may stand beside tensors of the device: it is an argument of the kernel."""
        if isinstance(tensor, FakeTensor):
            return tensor
        if tensor.device.type != "meta" and tensor.ndim:
            raise HostSync(f"a tensor {tuple(tensor.shape)} of the CPU is given to an operator of the device")
        with self._fake:
            return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=tensor.device)

    def _send(self, tensor: Tensor, *, non_blocking: bool) -> None:
        if self.strict:
            if not (non_blocking and self._is_pinned(tensor)):
                raise HostSync(
                    f"a copy {tuple(tensor.shape)} to the device that is {'not pinned' if non_blocking else 'waited for'}"
                )
            self.sent.append(tuple(tensor.shape))

    def _read(self, func: Any, zeros: Any) -> Any:
        if self.strict:
            place = self._place()
            if place is None:
                raise HostSync(f"{func} reads what the device has computed")
            self.waited.append(place)
        return zeros

    def _place(self) -> str | None:
        frame = sys._getframe()
        while frame is not None:
            if (name := f"{frame.f_globals['__name__']}:{frame.f_code.co_qualname}") in self._allowed:
                return name
            frame = frame.f_back
        return None

    def _is_pinned(self, tensor: Tensor) -> bool:
        return tensor.untyped_storage()._cdata in self._pinned
