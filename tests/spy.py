"""What a training step did, looked at from inside: summed gradients, before clipping, and weights in which nothing is zero."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from opensora_dist.parallel.keys import Keys
from opensora_dist.parallel.tensor.linear import copy_whole, packed_parts, rows_in_order, tp_size
from opensora_dist.parallel.zero.native import NativeBackend


class Spy(NativeBackend):
    """Keeps each step's summed gradients, before clipping."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.grads: list[dict[str, Tensor]] = []

    def clip(self, max_norm: float) -> Tensor:
        self.grads.append({name: self._whole_grad(name, p) for name, p in self._params.items()})
        return super().clip(max_norm)

    def _whole_grad(self, name: str, param: Tensor) -> Tensor:
        whole = full(param.grad).clone()
        return rows_in_order(whole, parts=self._packed[name], ranks=tp_size(param)) if name in self._packed else whole


def full(tensor: Any) -> Tensor:
    """All of it, on every rank."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


@torch.no_grad()
def randomise(model: nn.Module) -> None:
    """Every parameter, those that start at zero included: zeros hide wrong gradients."""
    packed = packed_parts(model)
    for name, tensor in model.state_dict().items():
        whole = torch.empty(tensor.shape, dtype=torch.float64).normal_(std=0.1, generator=Keys(7).generator(f"test:{name}"))
        copy_whole(tensor, whole, parts=packed.get(name, 1))
