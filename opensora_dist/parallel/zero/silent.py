"""FSDP2's collectives with a switch: what they send, or nothing, as a benchmark asks that wants to know what sending costs."""

from __future__ import annotations

import torch.distributed as dist
from torch import Tensor
from torch.distributed.fsdp._fully_shard._fsdp_collectives import DefaultAllGather, DefaultReduceScatter


class SilentGather(DefaultAllGather):
    """While ``silent``, every rank's part is a copy of this rank's: numbers that are as costly to compute with, at the least that
    receiving them costs."""

    silent = False

    def __call__(
        self, output_tensor: Tensor, input_tensor: Tensor, group: dist.ProcessGroup, async_op: bool = False
    ) -> dist.Work | None:
        if not self.silent:
            return super().__call__(output_tensor, input_tensor, group, async_op)
        for rank, part in enumerate(output_tensor.chunk(group.size())):
            if rank != group.rank():  # where the input lies already
                part.copy_(input_tensor)
        return None


class SilentScatter(DefaultReduceScatter):
    """While ``silent``, the sum is what this rank has of it."""

    silent = False

    def __call__(  # type: ignore[override]  # FSDP2 takes no work from it
        self,
        output_tensor: Tensor,
        input_tensor: Tensor,
        group: dist.ProcessGroup,
        op: dist.ReduceOp | dist.ReduceOp.RedOpType,
        async_op: bool = False,
    ) -> dist.Work | None:
        if not self.silent:
            return super().__call__(output_tensor, input_tensor, group, op, async_op)
        output_tensor.copy_(input_tensor.chunk(group.size())[group.rank()])
        return None
