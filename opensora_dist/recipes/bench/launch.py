"""Ranks of a benchmark: spawned here, or those that a launcher has made."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from opensora_dist.core.errors import ConfigError
from opensora_dist.core.io import write_json, write_text
from opensora_dist.core.layout import LOGS_DIR
from opensora_dist.core.logging import get_logger, setup_logging
from opensora_dist.observe.progress import Bar
from opensora_dist.parallel.failures import lost_contact_said
from opensora_dist.parallel.mesh import launched_world, process_group, resolve_device
from opensora_dist.parallel.spawn import run_ranks
from opensora_dist.plan.hardware import peak_flops
from opensora_dist.recipes.bench.case import SequenceCase
from opensora_dist.recipes.bench.sequence import Options, bench_sequence
from opensora_dist.recipes.bench.show import picture, print_table, record

_log = get_logger(__name__)
CPU_NPROC = 2
"""Ranks where no number is asked for and there is no GPU."""


def on_ranks(
    body: Callable[[torch.device], int],
    *,
    args: Sequence[str],
    nproc: int | None,
    device: str,
    pin: bool,
    out: Path | None,
    timeout_s: float,
) -> int:
    """``body(device)`` on every rank, inside a process group; returns the exit code.

    Args:
        args: Of this command, for the ranks that are started here.
        nproc: How many those are; None is one per GPU, or two.
        pin: Each rank keeps to cores of its own.
        out: Where logs of ranks other than 0 go; None throws them away.
        timeout_s: Of a collective.
    """
    nproc = num_ranks(nproc, device=device)
    if launched_world() is None and nproc > 1:
        if out is not None:
            return run_ranks(args, nproc=nproc, log_dir=out / LOGS_DIR)
        with tempfile.TemporaryDirectory() as folder:
            return run_ranks(args, nproc=nproc, log_dir=Path(folder))
    if pin:
        pin_rank()
    chosen = resolve_device(device)
    with lost_contact_said(timeout_s=timeout_s, option="--timeout"), process_group(chosen, timeout_s=timeout_s):
        setup_logging(rank=torch.distributed.get_rank(), world=torch.distributed.get_world_size())
        return body(chosen)


def num_ranks(nproc: int | None, *, device: str) -> int:
    """That a launcher has made, or that ``on_ranks`` will start."""
    launched = launched_world()
    if launched is not None:
        return launched
    if nproc is not None:
        return nproc
    return torch.cuda.device_count() if resolve_device(device).type == "cuda" else CPU_NPROC


def pin_rank() -> None:
    """Keeps this rank, and the threads it will start, to its share of the cores that this machine's ranks may use."""
    if not hasattr(os, "sched_setaffinity"):
        raise ConfigError("--pin needs a system that can pin processes (Linux); leave it out")
    rank = int(os.environ.get("LOCAL_RANK", os.environ.get("RANK", "0")))
    ranks = int(os.environ.get("LOCAL_WORLD_SIZE", os.environ.get("WORLD_SIZE", "1")))
    cores = sorted(os.sched_getaffinity(0))
    if ranks > len(cores):
        raise ConfigError(f"--pin: {ranks} ranks and {len(cores)} cores; leave it out, or use --nproc {len(cores)} or less")
    share = len(cores) // ranks
    os.sched_setaffinity(0, cores[rank * share : (rank + 1) * share])


def sequence_rank(case: SequenceCase, device: torch.device, *, options: Options, out: Path | None, trace: bool) -> int:
    """One rank's part of a sequence benchmark; rank 0 prints and writes. Collective.

    Returns:
        1 where a scheme sent other bytes than its formula says.
    """
    rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
    with Bar("rounds", total=options.warmup + options.rounds, enabled=rank == 0) as bar:
        results = bench_sequence(
            case,
            device=device,
            options=options,
            on_round=bar.update,
            trace=out / f"trace-{rank}.json" if trace and out is not None else None,
        )
    wrong = [r.name for r in results if not r.bytes_match]
    if rank == 0:
        print_table(case, results, world=world)
        if out is not None:
            write_json(
                out / "sequence.json",
                record(case, results, options=options, world=world, peak_flops=peak_flops(device, dtype=case.dtype)),
            )
            write_text(out / "sequence.svg", picture(case, results, world=world))
            print(f"{out / 'sequence.json'}, {out / 'sequence.svg'}")
        if wrong:
            _log.error("not the bytes of the formula: %s", ", ".join(wrong))
    return 1 if wrong else 0
