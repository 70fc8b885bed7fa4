"""Gradients that every rank holds whole, summed over ranks while backward still runs.

Not by DistributedDataParallel: after a process's first step it lays its buckets out anew, in the order in which gradients came, and how a
sum over more than two ranks is ordered goes by the place in a bucket. So a run that went on from a checkpoint would not be, bit for bit,
the run that was never stopped. Here buckets stay as they are made.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

_BUCKET_BYTES = 25 << 20


@dataclass
class _Bucket:
    """Gradients that travel together.

    Args:
        flat: Where they are; each parameter's ``grad`` is a view.
        size: How many parameters.
        missing: How many have not come in this backward.
    """

    flat: Tensor
    size: int
    missing: int


class GradientSums:
    """Sums the gradients of ``params`` over ``group``, bucket by bucket, in the last backward of each step.

    Args:
        params: In the order of forward; buckets go in the reverse, in which backward is done with them.
    """

    def __init__(self, params: Sequence[nn.Parameter], *, group: dist.ProcessGroup | None) -> None:
        self._group = group
        self._buckets: list[_Bucket] = []
        self._works: list[dist.Work | None] = []
        self._sum_now = False
        self.silent = False
        """Nothing is sent, and gradients stay this rank's own: for benchmarks, which ask what sending costs."""
        filling: list[nn.Parameter] = []
        for param in reversed(params):
            filling.append(param)
            if sum(p.nbytes for p in filling) >= _BUCKET_BYTES:
                self._add(filling)
                filling = []
        if filling:
            self._add(filling)

    def expect(self, *, last_micro: bool) -> None:
        """Before a backward: whether its gradients complete the step's, and are to be sent."""
        self._sum_now = last_micro

    def finish(self) -> None:
        """After a backward: waits until gradients that were to be sent are sums. Collective."""
        if not self._sum_now:
            return
        while len(self._works) < len(self._buckets):  # of a parameter that no loss depended on
            self._send()
        for work in self._works:
            if work is not None:
                work.wait()
        self._works = []
        for bucket in self._buckets:
            bucket.missing = bucket.size

    def zero(self) -> None:
        """All gradients to zero, where they are."""
        torch._foreach_zero_([bucket.flat for bucket in self._buckets])

    def _add(self, params: list[nn.Parameter]) -> None:
        flat = torch.zeros(sum(p.numel() for p in params), dtype=params[0].dtype, device=params[0].device)
        bucket = _Bucket(flat=flat, size=len(params), missing=len(params))
        for param, part in zip(params, torch.split(flat, [p.numel() for p in params]), strict=True):
            param.grad = part.view_as(param)
            param.register_post_accumulate_grad_hook(lambda _, bucket=bucket: self._came(bucket))  # type: ignore[no-untyped-call]
        self._buckets.append(bucket)

    def _came(self, bucket: _Bucket) -> None:
        if not self._sum_now:
            return
        bucket.missing -= 1
        # In the order of buckets, which is the same on every rank, whatever order gradients come in.
        while len(self._works) < len(self._buckets) and self._buckets[len(self._works)].missing == 0:
            self._send()

    def _send(self) -> None:
        flat = self._buckets[len(self._works)].flat
        sent = None if self.silent else dist.all_reduce(flat, op=dist.ReduceOp.SUM, group=self._group, async_op=True)
        self._works.append(sent)
