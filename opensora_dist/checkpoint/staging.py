"""A copy of the state in CPU memory, from which a checkpoint is written while training goes on."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor


class Staging:
    """Buffers that are kept between copies; pinned where what is copied lies on a GPU.

    They take as much CPU memory as this rank's share of the state. A copy is valid until the next one.
    """

    def __init__(self) -> None:
        self._buffers: dict[str, Tensor] = {}

    @torch.no_grad()
    def copy(self, parts: Iterable[Mapping[str, Tensor]]) -> dict[str, Tensor]:
        """The same names, shapes and shards, in memory of their own; done when this returns. No part is held while the next is made."""
        copies: dict[str, Tensor] = {}
        for part in parts:
            copies |= {name: self._copy(name, tensor) for name, tensor in part.items()}
            del part
        if torch.cuda.is_available():
            torch.cuda.current_stream().synchronize()
        return copies

    def _copy(self, name: str, tensor: Tensor) -> Tensor:
        local = tensor.to_local() if isinstance(tensor, DTensor) else tensor.detach()
        buffer = self._buffers.get(name)
        if buffer is None or buffer.shape != local.shape or buffer.dtype != local.dtype:
            buffer = torch.empty(local.shape, dtype=local.dtype, device="cpu", pin_memory=local.device.type == "cuda")
            self._buffers[name] = buffer
        buffer.copy_(local, non_blocking=True)
        if isinstance(tensor, DTensor):
            # Not by from_local, which moves what it is given to the mesh's device.
            return DTensor(buffer, tensor._spec, requires_grad=False)  # type: ignore[no-untyped-call]
        return buffer
