"""A grid of benchmarks: each point a run of its own, on this machine or over the first nodes of a Slurm job.

What a point came to is one file, so that a sweep that was stopped goes on where it was: points that ran are not run again, unless the
code or the hardware is another one since.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal

import torch

import opensora_dist
from opensora_dist.config.bench import SWEEPS, SequenceSweep, StepSweep, Sweep, sweep_problems
from opensora_dist.config.load import load_config
from opensora_dist.core.errors import ConfigError
from opensora_dist.core.io import exclusive_lock, read_json, write_json
from opensora_dist.core.logging import get_logger
from opensora_dist.core.types import Thw
from opensora_dist.observe.environment import cpu_name, git_state
from opensora_dist.parallel.mesh import resolve_device
from opensora_dist.parallel.spawn import die_with_parent
from opensora_dist.plan.memory import MemoryCase, estimate
from opensora_dist.recipes.bench.case import DEFAULT_GRID
from opensora_dist.recipes.bench.launch import num_ranks
from opensora_dist.recipes.bench.machines import Machines, machines_here
from opensora_dist.recipes.bench.sequence import sequence_inputs
from opensora_dist.recipes.bench.step_forms import case_of_form, form_problems
from opensora_dist.recipes.bench.step_inputs import step_case
from opensora_dist.recipes.bench.sweep_show import write_sweep

_log = get_logger(__name__)
_FORMAT = 1
_GRACE_S = 30.0
_TAIL_LINES = 12
_NOT_MEASURED: Final = {"grid", "point_timeout_s", "timeout_s", "device", "dollars_per_gpu_hour"}
"""What no measured number depends on, or ``_here`` says better."""


@dataclass(frozen=True, kw_only=True)
class Point:
    """One combination of a grid.

    Args:
        name: Of its file: what it is, and a digest of that, of how it is measured, on what and by which commit.
        values: Of the grid's keys.
    """

    name: str
    values: dict[str, Any]

    @property
    def nodes(self) -> int:
        """Machines."""
        return int(self.values["nodes"])


def run_sweep(kind: str, path: Path, *, out: Path) -> int:
    """Runs every point that has not run, and writes the tables and pictures of all.

    Args:
        kind: "step" or "sequence".
        path: The grid, a YAML file of ``config.bench``.
    Returns:
        1 where a point failed, other than by a rule that forbids it.
    Raises:
        ConfigError: Everything that is wrong with the file, or another sweep is writing to ``out``.
    """
    sweep: Sweep = load_config(SWEEPS[kind], path, rules=sweep_problems)
    price = sweep.dollars_per_gpu_hour if isinstance(sweep, StepSweep) else None
    machines = machines_here()
    ranks = sweep.ranks_per_node or num_ranks(None, device=sweep.device)
    points = sweep_points(kind, sweep, ranks=ranks)
    out.mkdir(parents=True, exist_ok=True)
    busy = ConfigError(f"--out {out}: another sweep is writing there; wait for it, or choose another folder")
    with exclusive_lock(out / ".lock", busy=busy):
        found = []
        for number, point in enumerate(points, 1):
            said = f"{number}/{len(points)} {point.name}"
            found.append(_settle(kind, sweep, point, said=said, ranks=ranks, machines=machines, out=out))
            write_sweep(
                found, kind=kind, dollars_per_gpu_hour=price, out=out
            )  # what there is so far can be read while it goes on
    return 1 if any(row["state"] == "failed" for row in found) else 0


def sweep_points(kind: str, sweep: Sweep, *, ranks: int) -> list[Point]:
    """All of a grid, in order.

    Args:
        ranks: On each node.
    """
    how = {
        **sweep.model_dump(mode="json", exclude=_NOT_MEASURED),
        **_here(sweep),
        "kind": kind,
        "ranks_per_node": ranks,
    }
    points = []
    cases = [_without_scheme(values) if values.get("sp", 1) == 1 and kind == "step" else values for values in sweep.grid.points]
    for values in [values for i, values in enumerate(cases) if values not in cases[:i]]:
        digest = hashlib.sha256(json.dumps([how, values], sort_keys=True).encode()).hexdigest()[:8]
        points.append(Point(name="-".join([*(f"{key}={value}" for key, value in values.items()), digest]), values=values))
    return points


def _here(sweep: Sweep) -> dict[str, Any]:
    """Code and hardware: what ran on others, in the same folder, is not this sweep's."""
    device = resolve_device(sweep.device)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_name()
    return {"device": device.type, "hardware": name, "code": git_state(Path(opensora_dist.__file__).parent)}


def _without_scheme(values: dict[str, Any]) -> dict[str, Any]:
    """Where no ranks share a sample, how they do is no matter."""
    return {key: value for key, value in values.items() if key not in ("scheme", "ulysses")}


def _settle(kind: str, sweep: Sweep, point: Point, *, said: str, ranks: int, machines: Machines, out: Path) -> dict[str, Any]:
    """What a point came to: read, if it has run, else found out and written down."""
    file = out / "points" / f"{point.name}.json"
    if file.exists() and (known := read_json(file)).get("format") == _FORMAT and known["state"] == "done":
        _log.info("%s: ran before", said)
        return dict(known)
    base = {"format": _FORMAT, "kind": kind, "point": point.values, "ranks_per_node": ranks}
    problems = point_problems(sweep, point, ranks=ranks, machines=machines)
    if problems:
        _log.warning("%s: can't run: %s", said, "; ".join(problems))
        row = {**base, "state": "refused", "reason": "; ".join(problems), "result": None}
    else:
        _log.info("%s: running", said)
        shutil.rmtree(out / "work", ignore_errors=True)  # of a point that was cut off
        command = machines.command(point_argv(kind, sweep, point, out=out / "work"), nodes=point.nodes, ranks=ranks)
        state, reason = _run(command, log=out / "logs" / f"{point.name}.log", timeout_s=sweep.point_timeout_s)
        result = out / "work" / f"{kind}.json"
        if state == "done" and not result.exists():
            state, reason = "failed", f"it ended well and left no {result.name}: do the nodes share {out}?"
        if state == "failed":
            _log.error("%s: failed: %s", said, reason)
        row = {**base, "state": state, "reason": reason, "result": read_json(result) if state == "done" else None}
        shutil.rmtree(out / "work", ignore_errors=True)
    write_json(file, row)
    return row


def point_problems(sweep: Sweep, point: Point, *, ranks: int, machines: Machines) -> list[str]:
    """The rules that keep a point from running, each with a way out."""
    problems = []
    if point.nodes > len(machines.nodes):
        problems.append(f"nodes={point.nodes}, and {machines.said}; ask for more, or leave it out of grid.nodes")
    device = resolve_device(sweep.device)
    if device.type == "cuda" and ranks > torch.cuda.device_count():
        problems.append(f"ranks_per_node={ranks} exceeds the {torch.cuda.device_count()} GPU(s) of this machine")
    given, world = {**point.values}, point.nodes * ranks
    del given["nodes"]
    try:
        if isinstance(sweep, StepSweep):
            problems += form_problems(sweep.forms, device=device, dtype=given.get("dtype", "float32"))
            case = step_case(given, world=world, timeout_s=sweep.timeout_s)
            problems += _memory_problems([case_of_form(case, form) for form in sweep.forms], device)
        else:
            _sequence_case(sweep, given, world=world)
    except ConfigError as error:
        problems += error.problems
    return problems


def _memory_problems(forms: Sequence[MemoryCase], device: torch.device) -> list[str]:
    """Of a case, in its forms, that can't fit the memory of a GPU like this machine's, by formula and without what libraries take beside."""
    if device.type != "cuda":
        return []
    needed, there = (
        max(estimate(case).total for case in forms) / 2**30,
        torch.cuda.get_device_properties(device).total_memory / 2**30,
    )
    if needed <= there:
        return []
    return [f"a rank needs {needed:.1f} GiB, and the GPU has {there:.1f}; raise sp or zero, or set recompute=full"]


def _sequence_case(sweep: SequenceSweep, given: dict[str, Any], *, world: int) -> None:
    """Raises ConfigError. A scheme that doesn't fit is a row of the result."""
    grid = given.pop("grid", None)
    grid = DEFAULT_GRID if grid is None else Thw(*map(int, grid.split("x")))
    sequence_inputs(
        schemes=sweep.schemes or None,
        chunks=None,
        ulysses=given.pop("ulysses", None),
        fastseq_dw=None,
        rounds=sweep.rounds,
        warmup=sweep.warmup,
        timeout_s=sweep.timeout_s,
        world=world,
        grid=grid,
        **given,
    )


def point_argv(kind: str, sweep: Sweep, point: Point, *, out: Path) -> list[str]:
    """The command of a point, as a user would type it, but for the number of ranks."""
    argv = ["bench", kind, "--out", str(out), "--device", resolve_device(sweep.device).type, "--timeout", f"{sweep.timeout_s:g}"]
    argv += ["--rounds", str(sweep.rounds), "--warmup", str(sweep.warmup)]
    if isinstance(sweep, StepSweep):
        argv += ["--steps", str(sweep.steps), "--forms", *sweep.forms]
    elif sweep.schemes:
        argv += ["--schemes", *sweep.schemes]
    for key, value in point.values.items():
        if key != "nodes":
            argv += [f"--{key.replace('_', '-')}", str(value)]
    return argv


def _run(command: Sequence[str], *, log: Path, timeout_s: float) -> tuple[Literal["done", "failed"], str | None]:
    """Runs a point; how it ended, and why if not well."""
    log.parent.mkdir(parents=True, exist_ok=True)
    environ = {key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    with open(log, "wb") as said:
        process = subprocess.Popen(
            command, stdout=said, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, env=environ, preexec_fn=die_with_parent
        )
        try:
            code = process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            return "failed", f"not done after point_timeout_s={timeout_s:g}; raise it, or look into {log.name}"
        finally:
            _end(process)
    if code == 0:
        return "done", None
    tail = [line for line in log.read_text(errors="replace").splitlines() if line.strip()][-_TAIL_LINES:]
    return "failed", f"exit code {code}: " + "\n".join(tail)


def _end(process: subprocess.Popen[bytes]) -> None:
    """Its ranks end with it, as does a job step with its srun."""
    if process.poll() is None:
        process.terminate()
        try:
            process.wait(_GRACE_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
