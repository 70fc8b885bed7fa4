"""Bytes that a rank really sends, read off the collectives that run. Knows no scheme and no formula of one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import GroupName, _resolve_process_group  # type: ignore[attr-defined]
from torch.utils._python_dispatch import TorchDispatchMode

# What travels only within a rank, or waits. A receive is counted where it was sent.
_SILENT = {"recv_", "recv_any_source_", "barrier", "monitored_barrier_", "wait_tensor", "_wrap_tensor_autograd"}


class SentBytes(TorchDispatchMode):  # type: ignore[no-untyped-call]  # of torch's, which has no types
    """Counts what this rank sends to other ranks while the block runs, in forward and backward, by kind of collective.

    All-to-alls and point-to-point sends are counted as they are called. How a gather or a reduction goes about it is the backend's
    business; it is counted as a ring, which sends the least there is: gather (P-1) inputs, reduce-scatter (P-1) outputs, all-reduce
    2 (P-1)/P inputs, broadcast one input from each rank but the last.

    Raises:
        NotImplementedError: A collective runs that is not known here: a count that leaves something out would be worse than none.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.by_collective: dict[str, int] = {}
        """Bytes by name of the operator."""

    @property
    def total(self) -> int:
        """Bytes of all collectives."""
        return sum(self.by_collective.values())

    def __torch_dispatch__(self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None) -> Any:
        namespace, name = func._schema.name.split("::")
        if namespace in ("c10d", "_c10d_functional") and name not in _SILENT:
            if name not in _COUNTS:
                raise NotImplementedError(f"{namespace}::{name} is not counted; add its bytes to {__name__}")
            given = dict(zip((a.name for a in func._schema.arguments), args))
            given.update(kwargs or {})
            self.by_collective[name] = self.by_collective.get(name, 0) + _COUNTS[name](given, _group(given))
        return func(*args, **(kwargs or {}))


def _group(given: dict[str, Any]) -> dist.ProcessGroup:
    group: Any = given.get("process_group", given.get("group_name"))
    if isinstance(group, str):
        return _resolve_process_group(GroupName(group))
    return group if isinstance(group, dist.ProcessGroup) else dist.ProcessGroup.unbox(group)


def _size(tensors: Tensor | Sequence[Any]) -> int:
    """Bytes of a tensor, or of all in a list of (lists of) them."""
    return tensors.nbytes if isinstance(tensors, Tensor) else sum(map(_size, tensors))


def _all_to_all_single(given: dict[str, Any], group: dist.ProcessGroup) -> int:
    send: Tensor = given["input"]
    rows: list[int] = given["input_split_sizes"] or [len(send) // group.size()] * group.size()
    return (sum(rows) - rows[group.rank()]) * (send.nbytes // len(send) if len(send) else 0)


def _all_to_all(given: dict[str, Any], group: dist.ProcessGroup) -> int:
    return sum(_size(t) for to, t in enumerate(given["input_tensors"]) if to != group.rank())


def _broadcast(given: dict[str, Any], group: dist.ProcessGroup) -> int:
    last = (given["root_rank"] - 1) % group.size()
    return 0 if group.rank() == last else _size(given["tensors"])


def _others(name: str) -> Callable[[dict[str, Any], dist.ProcessGroup], int]:
    return lambda given, group: (group.size() - 1) * _size(given[name])


def _all_reduce(name: str) -> Callable[[dict[str, Any], dist.ProcessGroup], int]:
    return lambda given, group: 2 * (group.size() - 1) * _size(given[name]) // group.size()


def _functional_reduce_scatter(given: dict[str, Any], group: dist.ProcessGroup) -> int:
    return (group.size() - 1) * _size(given["input"]) // group.size()


_COUNTS: dict[str, Callable[[dict[str, Any], dist.ProcessGroup], int]] = {
    "alltoall_base_": _all_to_all_single,
    "alltoall_": _all_to_all,
    "all_to_all_single": _all_to_all_single,
    "send": lambda given, _group: _size(given["tensors"]),
    "allgather_": _others("input_tensors"),
    "_allgather_base_": _others("input_tensor"),
    "allgather_into_tensor_coalesced_": _others("inputs"),
    "all_gather_into_tensor": _others("input"),
    "reduce_scatter_": _others("output_tensors"),
    "_reduce_scatter_base_": _others("output_tensor"),
    "reduce_scatter_tensor_coalesced_": _others("outputs"),
    "reduce_scatter_tensor": _functional_reduce_scatter,
    "allreduce_": _all_reduce("tensors"),
    "allreduce_coalesced_": _all_reduce("tensors"),
    "all_reduce": _all_reduce("input"),
    "all_reduce_": _all_reduce("input"),
    "broadcast_": _broadcast,
}
