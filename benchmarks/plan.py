"""The planner against steps that were timed: predicted and measured peak memory and step time, row by row.

    python benchmarks/plan.py --measure --results benchmarks/results/cpu --page docs/plan.md    # on this machine's CPUs: some minutes
    python benchmarks/plan.py --results benchmarks/results/h100 --page docs/plan.md             # what `bench step` wrote there

What a plan can't know is taken from two of the steps, which the table names: how much of the peak products reach, and how much attentions
do. All others are predicted. Exit code 1: a peak is off by more than 10%, or a time by more than 20%.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from opensora_dist.core.errors import ConfigError
from opensora_dist.core.io import read_json, write_json
from opensora_dist.plan.hardware import Gpu, gpu_for_device
from opensora_dist.plan.measured import TimedStep, read_timed
from opensora_dist.plan.memory import estimate
from opensora_dist.plan.time import Machine, step_time
from opensora_dist.recipes.bench.page import write_table
from opensora_dist.recipes.bench.show import DASH
from opensora_dist.recipes.plan_use import attention_ratio_of, cost_of, use_of

MEMORY_BAR, TIME_BAR = 0.10, 0.20
FILE = "plan.json"
_HOW = ["--pin", "--device", "cpu", "--text-tokens", "32", "--depth", "4", "--rounds", "5", "--warmup", "1", "--steps", "1"]
_NARROW = ["--width", "384", "--heads", "6", "--clip", "8x32x32"]
_WIDE = ["--width", "768", "--heads", "12", "--clip", "8x24x24"]
STEPS: dict[str, list[str]] = {
    "stdit": ["--nproc", "1", *_NARROW],
    "dit": ["--nproc", "1", *_NARROW, "--model", "dit"],
    "selective": ["--nproc", "1", *_NARROW, "--recompute", "selective"],
    "full": ["--nproc", "1", *_NARROW, "--recompute", "full"],
    "wide": ["--nproc", "1", *_WIDE],
    "accumulated": ["--nproc", "1", *_NARROW, "--grad-accum", "2"],
    "two": ["--nproc", "2", *_NARROW],
    "two, dit": ["--nproc", "2", *_NARROW, "--model", "dit"],
    "two, stage 2": ["--nproc", "2", *_NARROW, "--zero", "2"],
    "two, stage 2, selective, accumulated": [
        *["--nproc", "2", *_NARROW, "--zero", "2", "--recompute", "selective", "--grad-accum", "2"],
    ],
    "two, stage 3, full": ["--nproc", "2", *_NARROW, "--zero", "3", "--recompute", "full"],
    "two, stage 3, wide": ["--nproc", "2", *_WIDE, "--zero", "3"],
    "shared by dsp": ["--nproc", "2", *_NARROW, "--zero", "2", "--sp", "2"],
    "shared by ulysses": ["--nproc", "2", *_NARROW, "--zero", "2", "--sp", "2", "--scheme", "ulysses"],
    "dit, shared by ulysses": [
        *["--nproc", "2", *_NARROW, "--zero", "3", "--sp", "2", "--scheme", "ulysses", "--model", "dit"],
    ],
}
"""What ``bench step`` is given, by the name of a row. Large enough that fixed costs don't rule."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """A step and what a plan says of it."""

    timed: TimedStep
    memory_bytes: int
    step_s: float
    fitted: bool

    @property
    def memory_ratio(self) -> float | None:
        """None where nobody saw the peak."""
        return None if self.timed.memory_bytes is None else self.memory_bytes / self.timed.memory_bytes

    @property
    def time_ratio(self) -> float:
        return self.step_s / self.timed.step_s

    @property
    def holds(self) -> bool:
        """Whether what was measured of both is within their bars."""
        memory_holds = self.memory_ratio is None or abs(self.memory_ratio - 1) <= MEMORY_BAR
        return memory_holds and abs(self.time_ratio - 1) <= TIME_BAR


def main() -> int:
    """Prints the table; 1 where a bar is broken."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, required=True, metavar="DIR", help="folder of results")
    parser.add_argument(
        "--measure", action="store_true", help=f"first time steps on this machine's CPUs, into {FILE} of that folder"
    )
    parser.add_argument(
        "--only", nargs="+", choices=list(STEPS), metavar="NAME", help="with --measure: these steps, besides the first two"
    )
    parser.add_argument("--page", type=Path, help="Markdown page whose table is replaced")
    args = parser.parse_args()
    if args.only and not args.measure:
        parser.error("--only is of what --measure times; add --measure, or drop it")
    try:
        if args.measure:
            measure(args.results / FILE, names=args.only)
        rows = compare(args.results)
    except ConfigError as error:
        print("\n".join(error.problems), file=sys.stderr)
        return 2
    table = "\n".join(lines(rows))
    print(table)
    if args.page:
        write_table(args.page, table)
    return 0 if all(row.holds for row in rows) else 1


# --- measuring on a CPU


def measure(out: Path, *, names: Sequence[str] | None) -> None:
    """Runs ``bench network`` and every step, into one file."""
    chosen = [name for i, name in enumerate(STEPS) if names is None or i < 2 or name in names]
    with tempfile.TemporaryDirectory() as folder:
        network = Path(folder) / "network.json"
        _run("network", "--nproc", "2", "--pin", "--device", "cpu", "--width", "384", "--out", network.name, folder=folder)
        steps: dict[str, Any] = {}
        found = {"format": 1, "kind": "plan", "network": read_json(network), "memory_bytes_per_s": _memory_rate(), "steps": steps}
        for name in chosen:
            began = time.perf_counter()
            _run("step", *_HOW, *STEPS[name], "--out", ".", folder=folder)
            steps[name] = read_json(Path(folder) / "step.json")
            write_json(out, found)  # after each, so that a run that is cut off keeps what it has
            print(f"{name}: {time.perf_counter() - began:.0f} s", file=sys.stderr, flush=True)


def _run(*words: str, folder: str) -> None:
    """In ``folder``, so that no path of this machine gets into what is stored."""
    done = subprocess.run(
        [sys.executable, "-m", "opensora_dist", "bench", *words],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        cwd=folder,
    )
    if done.returncode:
        raise ConfigError(f"bench {' '.join(words)} failed: {done.stderr[-2000:]}")


def _memory_rate(num_bytes: int = 1 << 28, trials: int = 5) -> float:
    """Bytes read and written per second, by all cores: a copy of what no cache holds."""
    source, target = torch.zeros(num_bytes, dtype=torch.uint8), torch.zeros(num_bytes, dtype=torch.uint8)
    times = []
    for _ in range(trials):
        began = time.perf_counter()
        target.copy_(source)
        times.append(time.perf_counter() - began)
    return 2 * num_bytes / statistics.median(times)


# --- predicting


def compare(results: Path) -> list[Row]:
    """Every step of a folder, those that are computed alike on the same device beside each other."""
    kinds: dict[tuple[str, str, str], list[TimedStep]] = {}
    for timed in read_timed(results):
        kinds.setdefault((timed.device, timed.case.dtype, timed.form), []).append(timed)
    cpu = read_json(results / FILE) if (results / FILE).is_file() else None
    return [row for steps in kinds.values() for row in _compared(steps, cpu=cpu)]


def _compared(steps: Sequence[TimedStep], *, cpu: dict[str, Any] | None) -> list[Row]:
    """Of one way of computing."""
    machines = {world: _machine(steps, world, cpu=cpu) for world in {timed.case.world for timed in steps}}
    # What needs no network says most of what a rank computes.
    least = min(timed.case.world for timed in steps)
    alone = [timed for timed in steps if timed.case.world == least]
    first = next((timed for timed in alone if timed.case.model.name == "stdit"), alone[0])
    second = next((timed for timed in alone if timed.case.model.name == "dit" and timed is not first), None)
    use, ratio = use_of(first, machines[least]), 1.0
    if second is not None and use is not None:
        use, ratio = attention_ratio_of(first, second, machines[least])
    if use is None:
        raise ConfigError(
            f"{first.source}: no share of the peak gives {first.step_s:.3g} s; is the machine the one it was timed on?"
        )
    rows = []
    for timed in steps:
        machine = replace(machines[timed.case.world], use=use, attention_use=use * ratio)
        rows.append(
            Row(
                timed=timed,
                # What a compiler keeps of a block is in no formula: that of what it compiles stands for it.
                memory_bytes=estimate(timed.case).total,
                step_s=step_time(timed.case, cost_of(timed.case), machine).total_s,
                fitted=timed is first or timed is second,
            )
        )
    return rows


def _machine(steps: Sequence[TimedStep], world: int, *, cpu: dict[str, Any] | None) -> Machine:
    """That so many ranks ran on: a GPU of the table, or a CPU by what was measured of it."""
    if steps[0].cuda:
        gpu = gpu_for_device(steps[0].device)
        if gpu is None:
            raise ConfigError(f"{steps[0].source}: {steps[0].device} is in no table; add it to opensora_dist/plan/hardware.py")
        return Machine(gpu=gpu, gpus=world, per_node=min(8, world))
    if cpu is None:
        raise ConfigError(
            f"{steps[0].source} was timed on a CPU, of which {FILE} has to say what it can; write it with --measure"
        )
    peaks = [timed.peak_flops for timed in steps if timed.case.world == world and timed.peak_flops is not None]
    network = cpu["network"]
    return Machine(
        gpu=Gpu(
            name="cpu",
            device=steps[0].device,
            flops_per_s=statistics.median(peaks),
            memory_bytes=0,  # nothing here asks
            memory_bytes_per_s=cpu["memory_bytes_per_s"] / world,
            link_bytes_per_s=network["bytes_per_s"],
            source="measured: float32 products, a copy of memory, and `bench network`",
        ),
        gpus=world,
        per_node=world,
        latency_s=network["latency_s"],
        overlaps=False,
    )


# --- showing


def lines(rows: Sequence[Row]) -> list[str]:
    """Of the table, in Markdown."""
    said = [
        "| step | ranks | layout | peak, MB: predicted | measured | ratio | step, s: predicted | measured | ratio | within 10% and 20% |",
        "| --- | ---: | --- | " + " | ".join(["---:"] * 6) + " | --- |",
    ]
    for row in rows:
        timed, parallel = row.timed, row.timed.case.parallel
        shape = timed.case.model.shape
        layout = [f"{timed.case.model.name} {shape.depth} x {shape.width}, {timed.case.latent}", f"stage {parallel.zero.stage}"]
        layout += [f"{parallel.sp.scheme} x {parallel.sp.degree}"] if parallel.sp.degree > 1 else []
        layout += [f"recompute {parallel.recompute}"] if parallel.recompute != "none" else []
        layout += [f"{parallel.grad_accum} micro-batches"] if parallel.grad_accum > 1 else []
        cells = [
            timed.source.replace("|", "/"),
            str(timed.case.world),
            ", ".join(layout),
            f"{row.memory_bytes / 1e6:,.0f}",
            DASH if timed.memory_bytes is None else f"{timed.memory_bytes / 1e6:,.0f}",
            DASH if row.memory_ratio is None else f"{row.memory_ratio:.3f}",
            f"{row.step_s:.3g}",
            f"{timed.step_s:.3g}",
            f"{row.time_ratio:.2f}",
            ("yes" if row.holds else "**no**")
            + (" (its time is fitted)" if row.fitted else "")
            + (" (nobody saw its peak)" if row.memory_ratio is None else ""),
        ]
        said.append(f"| {' | '.join(cells)} |")
    predicted = [row for row in rows if not row.fitted]
    within = sum(row.holds for row in predicted)
    said += [
        "",
        f"{within} of {len(predicted)} predicted steps are within both bars, on {', '.join(sorted({r.timed.device for r in rows}))}.",
    ]
    return said


if __name__ == "__main__":
    try:
        sys.exit(main())
    except json.JSONDecodeError as error:
        sys.exit(f"a result is no JSON: {error}")
