"""Things that are compared take turns: in each round each is timed once, and no one of them always follows the same other."""

# R rounds, F things that take turns, V values of each

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from opensora_dist.parallel.sequence.network import synchronise


def timed(call: Callable[[], object], *, device: torch.device) -> float:
    """Seconds of a call on this rank, from when all ranks are there to when its device is done. Collective."""
    dist.barrier()
    synchronise(device)
    began = time.perf_counter()
    call()
    synchronise(device)
    return time.perf_counter() - began


def take_turns(
    passes: Sequence[Callable[[], list[float]]], *, rounds: int, warmup: int, on_round: Callable[[int], None] | None = None
) -> list[list[list[float]]]:
    """What each pass returned, by round and pass; of the rounds after ``warmup``. Each round begins with another one.

    Args:
        on_round: Told the rounds done, warm-up included.
    """
    table: list[list[list[float]]] = []
    collecting = gc.isenabled()
    gc.disable()  # a collection in one's pass would be its cost
    try:
        for round_ in range(warmup + rounds):
            rows: list[list[float]] = [[] for _ in passes]
            for i in range(len(passes)):
                at = (i + round_) % len(passes)
                rows[at] = passes[at]()
            gc.collect()
            if round_ >= warmup:
                table.append(rows)
            if on_round is not None:
                on_round(round_ + 1)
    finally:
        if collecting:
            gc.enable()
    return table


def of_all_ranks(table: list[list[list[float]]], *, device: torch.device) -> tuple[Tensor, Tensor]:
    """The largest over ranks of what ``take_turns`` gave each, and the mean: [F, R, V]. Collective."""
    here_RFV = torch.tensor(table, dtype=torch.float64, device=device)
    most, total = here_RFV.clone(), here_RFV.clone()
    dist.all_reduce(most, op=dist.ReduceOp.MAX)
    dist.all_reduce(total)
    return most.transpose(0, 1), (total / dist.get_world_size()).transpose(0, 1)
