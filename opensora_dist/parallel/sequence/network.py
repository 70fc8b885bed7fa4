"""What ranks can send each other and compute, in three numbers, measured or read from a file."""

from __future__ import annotations

import json
import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from opensora_dist.core.errors import ConfigError
from opensora_dist.core.io import read_json, write_json
from opensora_dist.parallel.sequence.exchange import Exchange

SIZES = tuple(4**k << 10 for k in range(3, 8))
"""Bytes of the all-to-alls that are timed: 64 KiB to 16 MiB."""
_LONG_S = 0.04  # a transfer that takes as long says what there is to know of the bandwidth
_ROWS, _REPEATS = 4096, 3
_FORMAT = 1


@dataclass(frozen=True, kw_only=True)
class Network:
    """A machine as a prediction sees it.

    Args:
        latency_s: What a round of messages takes however small it is.
        bytes_per_s: What one rank sends to others while all do the same.
        flops_per_s: Matrix products of a width, on one rank while all compute.
        world: Ranks that it was measured with.
        device: Type of device they compute on.
        dtype: Of the products.
        width: Of the products.
    """

    latency_s: float
    bytes_per_s: float
    flops_per_s: float
    world: int
    device: str
    dtype: str
    width: int


def write_network(path: Path, network: Network, *, details: dict[str, Any] | None = None) -> None:
    """Writes a measurement, and beside it whatever it rests on."""
    write_json(path, {"format": _FORMAT, **asdict(network), "details": details or {}})


def read_network(path: Path) -> Network:
    """A measurement that ``write_network`` wrote.

    Raises:
        ConfigError: There is no such file, or it holds something else; every wrong field is named.
    """
    again = "write it again with `opensora-dist bench network --out FILE`"
    try:
        found = read_json(path)
    except OSError as error:
        raise ConfigError(
            f"parallel.sp.network={str(path)!r} can't be read ({error.strerror}); {again}, or leave it out"
        ) from error
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ConfigError(f"{path} is no JSON ({error}); {again}") from error
    if not isinstance(found, dict) or found.get("format") != _FORMAT:
        raise ConfigError(f"{path} is no network measurement of format {_FORMAT}; {again}")
    problems = [p for f in fields(Network) if (p := _field_problem(f.name, found.get(f.name), kind=str(f.type)))]
    if problems:
        raise ConfigError([f"{path}: {p}; {again}" for p in problems])
    return Network(**{f.name: found[f.name] for f in fields(Network)})


def _field_problem(name: str, value: Any, *, kind: str) -> str | None:
    if kind == "str":
        return None if isinstance(value, str) else f"{name}={value!r} must be a text"
    number = isinstance(value, int if kind == "int" else int | float) and not isinstance(value, bool) and math.isfinite(value)
    fits = number and (value >= 0 if name == "latency_s" else value > 0)
    return None if fits else f"{name}={value!r} must be a {'whole ' if kind == 'int' else ''}number above 0"


def unfit(network: Network, *, device: torch.device, dtype: torch.dtype, degree: int) -> list[str]:
    """What keeps a measurement from standing for a run, each with a way out.

    Args:
        device: The run's.
        dtype: That the run computes in.
        degree: Most ranks that share a sample.
    """
    computes = str(dtype).removeprefix("torch.")
    again = "measure on the machine of the run with `opensora-dist bench network"
    problems = []
    if network.device != device.type:
        problems.append(f"device={network.device!r}, and the run is on {device.type}; {again} --device {device.type} --out FILE`")
    if network.dtype != computes:
        problems.append(f"dtype={network.dtype!r}, and the run computes in {computes}; {again} --dtype {computes} --out FILE`")
    if network.world < degree:
        problems.append(f"world={network.world}, and {degree} ranks share a sample; {again} --nproc {degree} --out FILE`")
    return problems


@dataclass(frozen=True, kw_only=True)
class Transfers:
    """All-to-alls of one size: bytes that a rank sends to others, and seconds of the slowest rank."""

    sent: int
    seconds: tuple[float, ...]

    @property
    def median_s(self) -> float:
        """Over repeats."""
        return statistics.median(self.seconds)


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """The fit, and what it rests on: transfers, and seconds of small messages."""

    network: Network
    transfers: tuple[Transfers, ...]
    pings_s: tuple[float, ...]


def measure_network(
    exchange: Exchange,
    *,
    device: torch.device,
    width: int,
    dtype: torch.dtype,
    repeats: int = 3,
    pings: int = 30,
    long_s: float = _LONG_S,
) -> Measurement:
    """Measures, by default within about a second; the same result on every rank of the group. Collective.

    Args:
        exchange: The ranks that will share samples; at least two.
        width: Of the model.
        dtype: That it computes in.
        repeats: Of a transfer of each of ``SIZES``.
        pings: Small messages.
        long_s: No larger transfer follows one that took as long.
    """
    flops = matmul_rate(device, width=width, dtype=dtype, exchange=exchange)
    small = [slowest(exchange, ping(exchange, device=device), device=device) for _ in range(pings)]
    transfers: list[Transfers] = []
    for size in SIZES:
        all_to_all_time(exchange, size, device=device)  # the first of a size sets buffers up
        times = [slowest(exchange, all_to_all_time(exchange, size, device=device), device=device) for _ in range(repeats)]
        transfers.append(Transfers(sent=bytes_to_others(exchange, size), seconds=tuple(times)))
        if transfers[-1].median_s > long_s:  # the slowest rank's, so that all stop here
            break
    latency, bandwidth = fit_line([t.sent for t in transfers], [t.median_s for t in transfers])
    network = Network(
        latency_s=max(latency, statistics.median(small)),
        bytes_per_s=bandwidth,
        flops_per_s=flops,
        world=exchange.size,
        device=device.type,
        dtype=str(dtype).removeprefix("torch."),
        width=width,
    )
    return Measurement(network=network, transfers=tuple(transfers), pings_s=tuple(small))


def agree(network: Network, *, group: dist.ProcessGroup) -> Network:
    """The worst of what the ranks of a CPU group measured, in parts of it, so that all predict the same. Collective."""
    worst = torch.tensor([network.latency_s, -network.bytes_per_s, -network.flops_per_s], dtype=torch.float64)
    dist.all_reduce(worst, op=dist.ReduceOp.MAX, group=group)
    latency, bandwidth, flops = worst.tolist()
    return Network(**{**asdict(network), "latency_s": latency, "bytes_per_s": -bandwidth, "flops_per_s": -flops})


def fit_line(sizes: Sequence[int], times: Sequence[float]) -> tuple[float, float]:
    """Latency in seconds (0 or more) and bytes/s of ``time = latency + size / bandwidth``, least squares of relative errors."""
    weights = [1 / t**2 for t in times]
    total = sum(weights)
    mean_size = sum(w * s for w, s in zip(weights, sizes)) / total
    mean_time = sum(w * t for w, t in zip(weights, times)) / total
    spread = sum(w * (s - mean_size) ** 2 for w, s in zip(weights, sizes))
    slope = sum(w * (s - mean_size) * (t - mean_time) for w, s, t in zip(weights, sizes, times)) / spread if spread else 0.0
    latency = mean_time - slope * mean_size
    if slope <= 0 or latency < 0:  # noise, or one size: all of the largest transfer is bandwidth
        return 0.0, sizes[-1] / times[-1]
    return latency, 1 / slope


def bytes_to_others(exchange: Exchange, size: int) -> int:
    """What ``all_to_all_time`` sends to other ranks of about ``size`` bytes: whole numbers, as many to each."""
    return _numbers_each(exchange, size) * (exchange.size - 1) * 4


def _numbers_each(exchange: Exchange, size: int) -> int:
    return max(1, size // 4 // (exchange.size - 1))


def all_to_all_time(exchange: Exchange, size: int, *, device: torch.device) -> float:
    """Seconds of one all-to-all in which each rank sends about ``size`` bytes to the others. Collective."""
    rows = [0 if r == exchange.rank else 1 for r in range(exchange.size)]
    send = torch.zeros((exchange.size - 1, _numbers_each(exchange, size)), device=device)
    return _timed(exchange, device, lambda: exchange.all_to_all(send, send_rows=rows, recv_rows=rows).wait())


def ping(exchange: Exchange, *, device: torch.device) -> float:
    """Seconds in which every rank sends its neighbour one number. Collective."""
    send, into = torch.zeros(1, device=device), torch.empty(1, device=device)
    return _timed(exchange, device, lambda: exchange.shift(send, into=into).wait())


def matmul_rate(device: torch.device, *, width: int, dtype: torch.dtype, exchange: Exchange) -> float:
    """FLOP/s of [rows, D] x [D, 3 D] on the slowest rank while all compute; up to 4096 rows, fewer where that would take long."""
    weight = torch.full((width, 3 * width), 0.01, device=device, dtype=dtype)
    rows = 64

    def product(rows: int) -> float:
        x = torch.full((rows, width), 0.01, device=device, dtype=dtype)
        return _timed(exchange, device, lambda: torch.mm(x, weight))

    product(rows)
    took = slowest(exchange, min(product(rows) for _ in range(_REPEATS)), device=device)
    rows = min(_ROWS, max(rows, int(rows * _LONG_S / took)))  # the slowest rank's, so that all do as much
    took = slowest(exchange, statistics.median(product(rows) for _ in range(_REPEATS)), device=device)
    return 6 * rows * width**2 / took


def slowest(exchange: Exchange, seconds: float, *, device: torch.device) -> float:
    """The largest of the group's. Collective."""
    value = torch.tensor(seconds, device=device, dtype=torch.float64)
    dist.all_reduce(value, op=dist.ReduceOp.MAX, group=exchange.group)
    return value.item()


def _timed(exchange: Exchange, device: torch.device, call: Callable[[], object]) -> float:
    dist.barrier(exchange.group)  # all of the group measure the same thing together
    synchronise(device)
    began = time.perf_counter()
    call()
    synchronise(device)
    return time.perf_counter() - began


def synchronise(device: torch.device) -> None:
    """The host waits for what it has given a GPU to do."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
