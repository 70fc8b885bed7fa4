"""What a forward makes that holds no numbers of the model."""

from __future__ import annotations

from torch.utils._python_dispatch import TorchDispatchMode


class TinyKernels(TorchDispatchMode):
    """What makes small integers: where samples end, and which keys take part."""

    MAKERS = {"arange", "argsort", "sort", "cumsum", "zeros", "amax"}

    def __init__(self) -> None:
        super().__init__()
        self.made: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        first = out[0] if isinstance(out, tuple) else out
        if func.overloadpacket.__name__ in self.MAKERS and not first.is_floating_point():
            self.made.append(func.overloadpacket.__name__)
        return out
