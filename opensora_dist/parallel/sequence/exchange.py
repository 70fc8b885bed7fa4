"""What ranks that share a sample send each other. All traffic of a scheme goes through an ``Exchange``."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import TypeVar

import torch.distributed as dist
from torch import Tensor

from opensora_dist.core.errors import CommunicationError
from opensora_dist.parallel.failures import is_lost_contact

T = TypeVar("T")


class Pending:
    """A transfer in flight. Its buffers must not be touched before ``wait``.

    Args:
        tensor: Where the data arrives.
        works: What to wait for.
        exchange: Who started it.
        what: What an error calls it.
    """

    def __init__(self, tensor: Tensor, works: Sequence[dist.Work], *, exchange: Exchange, what: str) -> None:
        self._tensor, self._works, self._exchange, self._what = tensor, list(works), exchange, what

    @property
    def tensor(self) -> Tensor:
        """Where the data arrives; not to be read before ``wait``."""
        return self._tensor

    def wait(self) -> Tensor:
        """The data received. May be called again.

        On NCCL this orders streams only: the host goes on at once, and of a rank that is gone it learns nothing here. There NCCL's
        watchdog ends the process once the group's timeout is over.

        Raises:
            CommunicationError: On gloo, another rank is gone, or did not answer within the group's timeout.
        """
        began = time.perf_counter()
        while self._works:
            work = self._works.pop(0)
            self._exchange.guarded(work.wait, what=self._what)
        self._exchange.wait_s += time.perf_counter() - began
        return self._tensor


class Exchange:
    """Traffic within one group of ranks, all of which make the same calls in the same order.

    Args:
        group: The ranks, in the order of the parts that they hold.
    """

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group = group
        self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)
        self.wait_s = 0.0
        """Seconds that the host was held up by ``wait``; on a GPU only the stream is, and this stays near 0."""

    def all_to_all(self, send: Tensor, *, send_rows: Sequence[int], recv_rows: Sequence[int]) -> Pending:
        """Sends ``send_rows[r]`` rows of ``send`` to each rank ``r`` and receives ``recv_rows[r]`` from each, in order of ranks.

        Args:
            send: Contiguous, rows along its first dim.
            send_rows: Adds up to ``len(send)``; 0 for this rank itself saves a copy of what stays.
        """
        assert send.is_contiguous() and sum(send_rows) == len(send), (send.shape, send_rows)
        recv = send.new_empty((sum(recv_rows), *send.shape[1:]))

        def start() -> dist.Work | None:
            work: dist.Work | None = dist.all_to_all_single(
                recv, send, output_split_sizes=list(recv_rows), input_split_sizes=list(send_rows), group=self.group, async_op=True
            )
            return work

        return self._pending(recv, start, what="all_to_all")

    def shift(self, send: Tensor, *, into: Tensor, by: int = 1) -> Pending:
        """One hop around the ring: ``send`` to the rank ``by`` places on, what the rank as far back sends into ``into``."""
        assert send.is_contiguous() and into.is_contiguous(), (send.stride(), into.stride())
        to = dist.get_global_rank(self.group, (self.rank + by) % self.size)
        source = dist.get_global_rank(self.group, (self.rank - by) % self.size)

        def start() -> list[dist.Work]:
            ops = [dist.P2POp(dist.isend, send, to, self.group), dist.P2POp(dist.irecv, into, source, self.group)]
            works: list[dist.Work] = dist.batch_isend_irecv(ops)
            return works

        return self._pending(into, start, what="ring shift")

    def gather(self, send: Tensor, *, parts: Sequence[Tensor]) -> Pending:
        """Every rank's ``send`` into ``parts`` of every other; the part of this rank itself is left alone. Sizes may differ."""
        ops = []
        for by in range(1, self.size):
            to, source = (self.rank + by) % self.size, (self.rank - by) % self.size
            ops.append(dist.P2POp(dist.isend, send, dist.get_global_rank(self.group, to), self.group))
            ops.append(dist.P2POp(dist.irecv, parts[source], dist.get_global_rank(self.group, source), self.group))

        def start() -> list[dist.Work]:
            works: list[dist.Work] = dist.batch_isend_irecv(ops) if ops else []
            return works

        return self._pending(send, start, what="gather")

    def all_reduce(self, tensor: Tensor) -> Pending:
        """The sum over ranks, in place. ``tensor`` is contiguous."""

        def start() -> dist.Work | None:
            work: dist.Work | None = dist.all_reduce(tensor, group=self.group, async_op=True)
            return work

        return self._pending(tensor, start, what="all_reduce")

    def _pending(self, tensor: Tensor, start: Callable[[], dist.Work | list[dist.Work] | None], *, what: str) -> Pending:
        what = f"{what} of {tuple(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}"
        works = self.guarded(start, what=what)
        works = works if isinstance(works, list) else [works] if works is not None else []
        return Pending(tensor, works, exchange=self, what=what)

    def guarded(self, call: Callable[[], T], *, what: str) -> T:
        """``call()``, with what a backend says of a lost rank told in our words."""
        try:
            return call()
        except RuntimeError as error:  # DistBackendError is one; gloo raises it plain
            if not is_lost_contact(error):
                raise
            ranks = dist.get_process_group_ranks(self.group)
            raise CommunicationError(
                f"rank {ranks[self.rank]} lost contact in a {what} with ranks {ranks}: one of them ended, or took longer than "
                f"the timeout (parallel.timeout_s in training); look for the first error in every rank's log ({error})"
            ) from error
