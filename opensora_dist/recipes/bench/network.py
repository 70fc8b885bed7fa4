"""What the ranks can send each other and compute: the numbers that ``parallel.sp.scheme=auto`` predicts with."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from rich.console import Console
from rich.table import Table

from opensora_dist.core.errors import ConfigError
from opensora_dist.observe.environment import describe_environment
from opensora_dist.parallel.sequence.exchange import Exchange
from opensora_dist.parallel.sequence.network import (
    Network,
    all_to_all_time,
    bytes_to_others,
    fit_line,
    matmul_rate,
    ping,
    slowest,
    write_network,
)

SIZES = tuple(4**k << 10 for k in range(3, 8))  # 64 KB to 16 MB
_PINGS = 200


@dataclass(frozen=True, kw_only=True)
class Transfers:
    """All-to-alls of one size: bytes that a rank sends to others, and seconds of the slowest rank."""

    sent: int
    seconds: tuple[float, ...]

    @property
    def median_s(self) -> float:
        """Over repeats."""
        return statistics.median(self.seconds)


def bench_network(
    device: torch.device, *, width: int, dtype: torch.dtype, sizes: Sequence[int] = SIZES, repeats: int = 7
) -> tuple[Network, list[Transfers], list[float]]:
    """The fit, what it rests on, and the seconds of small messages; the same on every rank. Collective.

    Raises:
        ConfigError: There is but one rank.
    """
    assert dist.group.WORLD is not None
    exchange = Exchange(dist.group.WORLD)
    if exchange.size < 2:
        raise ConfigError("bench network measures between ranks, and there is one; use --nproc 2 or more, or torchrun")
    flops = matmul_rate(device, width=width, dtype=dtype, exchange=exchange)
    pings = [slowest(exchange, ping(exchange, device=device), device=device) for _ in range(_PINGS)]
    transfers = []
    for size in sizes:
        all_to_all_time(exchange, size, device=device)  # the first of a size sets buffers up
        times = [slowest(exchange, all_to_all_time(exchange, size, device=device), device=device) for _ in range(repeats)]
        transfers.append(Transfers(sent=bytes_to_others(exchange, size), seconds=tuple(times)))
    latency, bandwidth = fit_line([t.sent for t in transfers], [t.median_s for t in transfers])
    network = Network(
        latency_s=max(latency, statistics.median(pings)),
        bytes_per_s=bandwidth,
        flops_per_s=flops,
        world=exchange.size,
        device=device.type,
        dtype=str(dtype).removeprefix("torch."),
        width=width,
    )
    return network, transfers, pings


def network_rank(device: torch.device, *, width: int, dtype: torch.dtype, out: Path | None) -> int:
    """One rank's part; rank 0 prints and writes. Collective."""
    network, transfers, pings = bench_network(device, width=width, dtype=dtype)
    if dist.get_rank() != 0:
        return 0
    table = Table(title=f"All-to-all among {network.world} ranks ({network.device})")
    for column in ("MB to others", "median ms", "fastest, slowest ms", "GB/s per rank", "fit ms"):
        table.add_column(column, justify="right")
    for t in transfers:
        fit = network.latency_s + t.sent / network.bytes_per_s
        spread = f"{1e3 * min(t.seconds):.3f}, {1e3 * max(t.seconds):.3f}"
        table.add_row(
            f"{t.sent / 1e6:.3f}", f"{1e3 * t.median_s:.3f}", spread, f"{t.sent / t.median_s / 1e9:.3f}", f"{1e3 * fit:.3f}"
        )
    Console().print(table)
    print(
        f"latency {1e6 * network.latency_s:.1f} us (a small message: {1e6 * statistics.median(pings):.1f} us), "
        f"{network.bytes_per_s / 1e9:.3f} GB/s to others per rank, {network.flops_per_s / 1e12:.4f} TFLOP/s per rank in products of "
        f"width {width}, {network.dtype}"
    )
    if out is not None:
        details = {
            "all_to_all": [{"sent_bytes": t.sent, "seconds": list(t.seconds)} for t in transfers],
            "small_message_s": pings,
            "environment": describe_environment(world=network.world),
        }
        write_network(out, network, details=details)
        print(f"{out}: name it in parallel.sp.network")
    return 0
