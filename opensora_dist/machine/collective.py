"""Ranks of this machine that send each other something: whether they find each other, and how fast they are."""

from __future__ import annotations

import multiprocessing
import os
import sys
import tempfile
import time
from datetime import timedelta
from pathlib import Path
from typing import Final

import torch
import torch.distributed as dist

from opensora_dist.core.io import read_json, write_json
from opensora_dist.machine.finding import Finding, Level, Subject
from opensora_dist.machine.network import NETWORK
from opensora_dist.parallel.sequence.exchange import Exchange
from opensora_dist.parallel.sequence.network import measure_network

_SUBJECT: Final = Subject(NETWORK)
_TIMEOUT_S = 40.0
_POLL_S = 0.02
_CPU_RANKS = 2


def collective_finding() -> Finding:
    """All-to-alls between ranks of this machine: NCCL where there are two GPUs or more, two ranks of gloo elsewhere.

    The ranks are forks of this process, which save importing torch again: so nothing may have been computed in it yet, and CUDA not have
    been started.
    """
    gpus = torch.cuda.device_count()  # by NVML, which starts no CUDA
    device, ranks = ("cuda", gpus) if gpus > 1 else ("cpu", _CPU_RANKS)
    name = f"{'NCCL' if device == 'cuda' else 'gloo'} between {ranks} ranks"
    with tempfile.TemporaryDirectory() as folder:
        if ended := _run(ranks, device=device, folder=Path(folder)):
            said = "; ".join(f"rank {rank} {how}" for rank, how in sorted(ended.items()))
            way_out = (
                f"run `opensora-dist bench network --nproc {ranks} --device {device}` to see more, with NCCL_DEBUG=INFO where it is NCCL; "
                "a firewall, or the interface that GLOO_SOCKET_IFNAME or NCCL_SOCKET_IFNAME names, may be why"
            )
            return _SUBJECT.finding(name, Level.PROBLEM, said, way_out)
        found = read_json(Path(folder) / "rates.json")
    rate, latency = found["bytes_per_s"], found["latency_s"]
    said = f"{rate / 1e9:.2f} GB/s that each sends to others, {1e6 * latency:.0f} us a small message (measured)"
    return _SUBJECT.finding(name, Level.OK, said, values=found)


def _run(ranks: int, *, device: str, folder: Path) -> dict[int, str]:
    """Runs all ranks; what those that failed said."""
    context = multiprocessing.get_context("fork")
    processes = [
        context.Process(target=_rank, kwargs={"rank": rank, "world": ranks, "device": device, "folder": folder})
        for rank in range(ranks)
    ]
    for process in processes:
        process.start()
    deadline = time.monotonic() + _TIMEOUT_S
    # One that failed leaves the others waiting for it.
    while any(p.is_alive() for p in processes) and not any(p.exitcode for p in processes) and time.monotonic() < deadline:
        time.sleep(_POLL_S)
    hung = {rank for rank, process in enumerate(processes) if process.is_alive()}
    failed = {rank for rank, process in enumerate(processes) if process.exitcode}
    for process in processes:
        process.kill()
        process.join()
    if failed:
        return {rank: _said(folder, rank) or f"ended with exit code {processes[rank].exitcode}" for rank in failed}
    return {rank: f"did not end within {_TIMEOUT_S:g} s" for rank in hung}


def _said(folder: Path, rank: int) -> str | None:
    path = folder / f"rank-{rank}.json"
    return str(read_json(path)) if path.is_file() else None


def _rank(*, rank: int, world: int, device: str, folder: Path) -> None:
    if device == "cpu":
        # Ranks that `train` starts on one machine talk over the loopback, too.
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo" if sys.platform == "linux" else "lo0")
    code = 1
    try:
        chosen = torch.device(device, rank) if device == "cuda" else torch.device(device)
        if device == "cuda":
            torch.cuda.set_device(chosen)
        store = dist.FileStore(str(folder / "store"), world)  # type: ignore[attr-defined]  # not in torch's __all__
        backend, timeout = "nccl" if device == "cuda" else "gloo", timedelta(seconds=_TIMEOUT_S / 2)
        dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=timeout)
        assert dist.group.WORLD is not None
        dtype = torch.bfloat16 if device == "cuda" else torch.float32
        network = measure_network(Exchange(dist.group.WORLD), device=chosen, width=64, dtype=dtype).network
        if rank == 0:
            write_json(folder / "rates.json", {"bytes_per_s": network.bytes_per_s, "latency_s": network.latency_s})
        code = 0
    except Exception as error:  # noqa: BLE001 - it is told by who forked this
        write_json(folder / f"rank-{rank}.json", f"failed: {type(error).__name__}: {' '.join(str(error).split())[:300]}")
    finally:
        sys.stderr.flush()
        os._exit(code)  # threads of gloo and NCCL may not outlast the interpreter
