"""Links of a process group, measured in seconds."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import torch
import torch.distributed as dist

from opensora_dist.machine.blame import Pair
from opensora_dist.parallel.sequence.exchange import Exchange
from opensora_dist.parallel.sequence.network import all_to_all_time, bytes_to_others, slowest, synchronise

_SIZES: Final = tuple(4**k << 20 for k in range(4))
"""Bytes: 1 MiB to 64 MiB."""
_LONG_S = 0.1  # a transfer that takes as long says what there is to know
_REPEATS = 3
_PAIR_REPEATS = 2
_PAIR_BYTES: Final = {"cpu": 4 << 20, "cuda": 64 << 20}


@dataclass(frozen=True, kw_only=True)
class Rates:
    """The same on every rank.

    Args:
        all_reduce_bytes_per_s: Bytes of the buffer per second of the slowest rank, at the best size.
        all_to_all_bytes_per_s: Bytes that a rank sends to others, likewise.
        pairs: Bytes that each of two nodes sends the other, per second and rank, of the slowest of their ranks.
    """

    all_reduce_bytes_per_s: float
    all_to_all_bytes_per_s: float
    pairs: dict[Pair, float]


def measure_links(exchange: Exchange, *, device: torch.device, nodes: dict[str, list[int]]) -> Rates:
    """Measures, within some seconds. Collective.

    Args:
        exchange: All ranks, at least two.
        nodes: Ranks by node.
    Raises:
        ArithmeticError: A sum over ranks is wrong.
    """
    return Rates(
        all_reduce_bytes_per_s=_best(lambda size: (size, _all_reduce_time(exchange, size, device=device)), exchange, device),
        all_to_all_bytes_per_s=_best(
            lambda size: (bytes_to_others(exchange, size), all_to_all_time(exchange, size, device=device)), exchange, device
        ),
        pairs=_pairs(exchange, device=device, nodes=nodes),
    )


def _best(timed: Callable[[int], tuple[int, float]], exchange: Exchange, device: torch.device) -> float:
    """Largest rate over sizes; no larger one follows one that took long. Collective."""
    rates = []
    for size in _SIZES:
        timed(size)  # the first of a size sets buffers up
        found = [timed(size) for _ in range(_REPEATS)]
        took = slowest(exchange, statistics.median(seconds for _, seconds in found), device=device)
        rates.append(found[0][0] / took)
        if took > _LONG_S:  # the slowest rank's, so that all stop here
            break
    return max(rates)


def _all_reduce_time(exchange: Exchange, size: int, *, device: torch.device) -> float:
    value = torch.full((size // 4,), float(exchange.rank + 1), device=device)
    dist.barrier(exchange.group)  # all measure the same thing together
    synchronise(device)
    began = time.perf_counter()
    exchange.all_reduce(value).wait()
    synchronise(device)
    took = time.perf_counter() - began
    right = exchange.size * (exchange.size + 1) / 2
    if not bool((value == right).all()):
        raise ArithmeticError(f"an all-reduce gave {value[value != right][0].item()} in place of {right}")
    return took


def _pairs(exchange: Exchange, *, device: torch.device, nodes: dict[str, list[int]]) -> dict[Pair, float]:
    """Every two nodes, as many pairs at once as there are; every rank of a node with its like on the other. Collective."""
    names = list(nodes)
    (mine,) = (i for i, name in enumerate(names) if exchange.rank in nodes[name])
    place = nodes[names[mine]].index(exchange.rank)
    table = torch.zeros(exchange.size, len(names), dtype=torch.float64, device=device)  # bytes/s of each rank to each node
    send = torch.ones(_PAIR_BYTES[device.type] // 4, device=device)
    into = torch.empty_like(send)
    for partners in rounds(len(names)):
        other = partners[mine]
        ranks = nodes[names[other]] if other is not None else []
        times = []
        for _ in range(_PAIR_REPEATS):
            dist.barrier(exchange.group)  # of all, those without a partner too
            if place >= len(ranks):
                continue
            peer = dist.get_global_rank(exchange.group, ranks[place])
            synchronise(device)
            began = time.perf_counter()
            ops = [dist.P2POp(dist.isend, send, peer, exchange.group), dist.P2POp(dist.irecv, into, peer, exchange.group)]
            for work in dist.batch_isend_irecv(ops):
                work.wait()
            synchronise(device)
            times.append(time.perf_counter() - began)
        if other is not None and times:
            table[exchange.rank, other] = send.nbytes / min(times)
    exchange.all_reduce(table).wait()
    found: dict[Pair, float] = {}
    for i, a in enumerate(names):
        for j, b in enumerate(names[i + 1 :], i + 1):
            both = [table[rank, j].item() for rank in nodes[a]] + [table[rank, i].item() for rank in nodes[b]]
            if seen := [rate for rate in both if rate > 0]:
                found[(a, b)] = min(seen)
    return found


def rounds(count: int) -> list[list[int | None]]:
    """Who is whose partner in each round, so that every two of ``count`` meet once (the circle method). None has none."""
    if count < 2:
        return []
    even = count + count % 2
    ring = list(range(1, even))
    found = []
    for _ in range(even - 1):
        seats = [0, *ring]
        partner: list[int | None] = [None] * even
        for a, b in zip(seats[: even // 2], reversed(seats[even // 2 :])):
            partner[a], partner[b] = b, a
        found.append([None if other is None or other >= count else other for other in partner[:count]])
        ring = ring[-1:] + ring[:-1]
    return found
