"""Packed parameters in a checkpoint: in the linear's own order, whatever the layout of the ranks that wrote it.

All other parameters are DTensors whose place in the whole a checkpoint can say. Where rows are held rank by rank, what a rank has lies
in several places of the whole; so these are gathered, put in order, and sharded again, one at a time.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from opensora_dist.parallel.mesh import Mesh
from opensora_dist.parallel.tensor.linear import copy_whole, rows_in_order


@torch.no_grad()
def in_order(local: Tensor, *, like: Tensor, parts: int, mesh: Mesh) -> Tensor:
    """A copy in the order of the whole, each rank of ``mesh.copy`` with its rows. Collective over these.

    Args:
        local: What this rank holds of a tensor laid out as ``like``.
        like: The parameter, sharded by FSDP2 along its rows.
        parts: As ``packed_parts`` has it.
    """
    size = torch.Size((len(like) // mesh.tp_size, *like.shape[1:]))
    stride = torch.empty(size, device="meta").stride()
    of_rank = DTensor.from_local(local, mesh.fsdp, [Shard(0)], run_check=False, shape=size, stride=stride).full_tensor()
    whole = DTensor.from_local(of_rank, mesh.tp, [Shard(0)], run_check=False).full_tensor()
    whole = rows_in_order(whole, parts=parts, ranks=mesh.tp_size)
    return distribute_tensor(whole, mesh.copy, [Shard(0)], src_data_rank=None)


@torch.no_grad()
def put_back(local: Tensor, ordered: Tensor, *, like: Tensor, parts: int) -> None:
    """Fills what ``in_order`` was given from what it gave. Collective."""
    assert isinstance(ordered, DTensor) and isinstance(like, DTensor)
    # from_local would move it to the mesh's device
    held = DTensor(local, like._spec, requires_grad=False)  # type: ignore[no-untyped-call]
    copy_whole(held, ordered.full_tensor(), parts=parts)
