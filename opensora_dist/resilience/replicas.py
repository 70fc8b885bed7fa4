"""Copies that must be alike, compared: a bit that flips in one rank's memory is found before it is saved."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import torch
import torch.distributed as dist
from torch import Tensor

from opensora_dist.core.errors import TrainingError

_CHUNK: Final = 1 << 22
"""Elements hashed at once: their 64-bit copies are what the hash takes of memory."""

_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass(frozen=True, kw_only=True)
class Copies:
    """Tensors that several ranks hold alike.

    Args:
        tensors: This rank's, live; every rank has the same names, in the same order.
        holders: Ranks that hold the same, for each such set; each rank stands in one of them.
    """

    tensors: Mapping[str, Tensor]
    holders: Sequence[Sequence[int]]


class ReplicaCheck:
    """Compares what several ranks hold alike, by a hash of each tensor.

    It sees the tensors that it is given, at the moments that it is asked. It can't see what differs and is equal again by then, nor
    an error that all copies share.

    Args:
        copies: What to compare; the same on every rank but for the tensors' content. May be empty.
        group: gloo group of all ranks.
        device: Where the tensors are.
    """

    def __init__(self, copies: Sequence[Copies], *, group: dist.ProcessGroup, device: torch.device) -> None:
        self._copies = [c for c in copies if any(len(ranks) > 1 for ranks in c.holders)]
        self._group, self._device = group, device
        self._last = "none was made before"

    def check(self, *, step: int) -> None:
        """Collective over ``group``: every rank calls it after the same steps.

        Raises:
            TrainingError: On every rank, naming each tensor that differs and the ranks in the minority.
        """
        if not self._copies:
            return
        named = [(name, tensor, c.holders) for c in self._copies for name, tensor in c.tensors.items()]
        mine = torch.stack([tensor_hash(tensor).to(self._device) for _, tensor, _ in named]).cpu()
        ranks = [torch.empty_like(mine) for _ in range(dist.get_world_size(self._group))]
        dist.all_gather(ranks, mine, group=self._group)
        table = torch.stack(ranks, dim=1)
        alike = torch.ones(len(named), dtype=torch.bool)
        for holders in {tuple(map(tuple, h)): h for _, _, h in named}.values():
            rows = torch.tensor([h == holders for _, _, h in named])
            for one in holders:
                same = (table[:, list(one)] == table[:, [one[0]]]).all(dim=1)
                alike &= same | ~rows
        if not alike.all():
            raise TrainingError(
                self._said(step, [(named[i][0], named[i][2], table[i].tolist()) for i in (~alike).nonzero().flatten()])
            )
        self._last = f"they were alike after step {step}"

    def _said(self, step: int, differ: Sequence[tuple[str, Sequence[Sequence[int]], list[int]]]) -> str:
        lines = [
            f"  {name}: {_minority(ranks, hashes)}"
            for name, holders, hashes in differ
            for ranks in holders
            if _differ(ranks, hashes)
        ]
        shown = [*lines[:8], *([f"  and {len(lines) - 8} more"] if len(lines) > 8 else [])]
        return (
            f"copies that ranks hold alike differ after step {step} ({self._last}):\n"
            + "\n".join(shown)
            + "\nnothing was saved since; test the memory of these machines, and start the same command again, which goes on from the last "
            "checkpoint"
        )


def _differ(ranks: Sequence[int], hashes: Sequence[int]) -> bool:
    return len({hashes[r] for r in ranks}) > 1


def _minority(ranks: Sequence[int], hashes: Sequence[int]) -> str:
    """Who differs from most."""
    counts = Counter(hashes[r] for r in ranks)
    (value, most), *others = counts.most_common()
    if others[0][1] == most:
        return f"ranks {list(ranks)} differ, and none is with a majority"
    odd = [r for r in ranks if hashes[r] != value]
    return f"rank {', '.join(map(str, odd))} differs from the other {most} of ranks {list(ranks)}"


@torch.no_grad()
def tensor_hash(tensor: Tensor) -> Tensor:
    """An int64 on the tensor's device: its bits as integers, each times an odd number of its own, summed modulo 2^64.

    Any change of one element changes it, since an odd factor is no divisor of 2^64; no float is compared, so NaN is like any value.
    """
    bits = tensor.detach().contiguous().view(_INTEGERS[tensor.element_size()]).flatten()
    odd = torch.arange(min(len(bits), _CHUNK), dtype=torch.int64, device=tensor.device).mul_(2).add_(1)
    total = torch.zeros((), dtype=torch.int64, device=tensor.device)
    for i, piece in enumerate(torch.split(bits, _CHUNK)):
        total += (piece.long() * (odd[: len(piece)] + 2 * _CHUNK * i)).sum()
    return total
