"""What the ranks can send each other and compute: the numbers that ``parallel.sp.scheme=auto`` predicts with."""

from __future__ import annotations

import math
import statistics
from pathlib import Path

import torch
import torch.distributed as dist
from rich.console import Console
from rich.table import Table

from opensora_dist.core.errors import ConfigError
from opensora_dist.observe.environment import describe_environment
from opensora_dist.parallel.sequence.exchange import Exchange
from opensora_dist.parallel.sequence.network import measure_network, write_network

_REPEATS, _PINGS = 7, 200


def network_rank(device: torch.device, *, width: int, dtype: torch.dtype, out: Path | None) -> int:
    """One rank's part; rank 0 prints and writes. What a run measures at its start, with more repeats. Collective.

    Raises:
        ConfigError: There is but one rank.
    """
    assert dist.group.WORLD is not None
    exchange = Exchange(dist.group.WORLD)
    if exchange.size < 2:
        raise ConfigError("bench network measures between ranks, and there is one; use --nproc 2 or more, or torchrun")
    found = measure_network(exchange, device=device, width=width, dtype=dtype, repeats=_REPEATS, pings=_PINGS, long_s=math.inf)
    network, transfers, pings = found.network, found.transfers, found.pings_s
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
            "small_message_s": list(pings),
            "environment": describe_environment(world=network.world),
        }
        write_network(out, network, details=details)
        print(f"{out}: name it in parallel.sp.network")
    return 0
