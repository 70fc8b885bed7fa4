"""Initial values and foreign values, put into a model whole or sharded."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from opensora_dist.core.errors import WeightsError
from opensora_dist.models.base import VideoTransformer
from opensora_dist.parallel.keys import Keys
from opensora_dist.parallel.tensor.linear import copy_whole, packed_parts


@torch.no_grad()
def init_weights(model: VideoTransformer, keys: Keys) -> None:
    """Gives every parameter and persistent buffer its initial value; the same on any number of ranks, in any layout.

    Each is drawn whole, on the CPU in float32, with its own generator; a rank then keeps its shard.

    Args:
        model: After ``to_empty``.
        keys: The run's keys; the purpose of a draw is ``init:<name>``.
    """
    packed = packed_parts(model)
    for name, tensor in model.state_dict().items():
        full = torch.empty(tensor.shape)
        model.init_parameter(name, full, keys.generator(f"init:{name}"))
        copy_whole(tensor, full, parts=packed.get(name, 1))


@torch.no_grad()
def assign_weights(model: VideoTransformer, tensors: Mapping[str, Tensor]) -> None:
    """Overwrites the named parameters and buffers with whole tensors; others stay as they are.

    Raises:
        WeightsError: A name or shape that the model doesn't have.
    """
    own, packed = model.state_dict(), packed_parts(model)
    for name, full in tensors.items():
        if name not in own or own[name].shape != full.shape:
            has = f"shape {tuple(own[name].shape)}" if name in own else "no such parameter"
            raise WeightsError(f"{name} of shape {tuple(full.shape)}: the model has {has}; read weights through models.importers")
        copy_whole(own[name], full, parts=packed.get(name, 1))
