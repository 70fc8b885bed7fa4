"""What a run will take on a machine that is not here: layouts that fit and their speed, memory, money, and why others don't fit."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from opensora_dist.config.load import Problem, load_config
from opensora_dist.config.train import TrainConfig
from opensora_dist.core.errors import ConfigError, OpensoraError
from opensora_dist.core.types import Thw
from opensora_dist.data.mixture import open_data
from opensora_dist.models.base import ModelIo
from opensora_dist.models.registry import build_model
from opensora_dist.plan.hardware import gpu_of
from opensora_dist.plan.layouts import Layout, Run, instead, judged, layouts, limit_bytes
from opensora_dist.plan.measured import read_timed
from opensora_dist.plan.time import Machine
from opensora_dist.recipes.auto import sample_cost
from opensora_dist.recipes.plan_use import nearest_use

_RESULTS = Path("benchmarks/results")
_SHOWN = 8
_WIDE = 160
_CHANNELS, _TEXT_WIDTH, _TEXT_TOKENS = 4, 4096, 120
"""Of a sample where there is no data set yet: Stable Diffusion's VAE and T5-XXL."""


@dataclass(frozen=True, kw_only=True)
class PlanOptions:
    """What is planned for; fields as the options of the command.

    Args:
        latent: Of a sample, where no data set says; None: the largest of the data set.
        use: Share of the peak that a step reaches; None: from ``measured``, or else what a plan assumes.
        measured: Steps that ``bench step`` timed, a file or a folder; None: those that this project stores of the GPU, if there are any.
    """

    gpu: str
    gpus: int
    per_node: int
    network_gbit: float
    latent: Thw | None
    use: float | None
    measured: Path | None
    dollars: float | None


@dataclass(frozen=True, kw_only=True)
class Totals:
    """Of a whole run in its fastest layout.

    Args:
        samples_per_gpu_s: Samples, per second and GPU.
        tokens_per_gpu_s: Tokens.
        mfu: Model FLOPs, without what is computed again, over the peak.
        hours: Of ``run.steps``.
        gpu_hours: Of all GPUs.
        dollars: Of these; None without a price.
        checkpoint_bytes: Of one checkpoint: weights, both moments, average.
        loader_bytes_per_s: That a node reads.
    """

    samples_per_gpu_s: float
    tokens_per_gpu_s: float
    mfu: float
    hours: float
    gpu_hours: float
    dollars: float | None
    checkpoint_bytes: int
    loader_bytes_per_s: float


@dataclass(frozen=True, kw_only=True)
class Plan:
    """
    Args:
        run: What is planned.
        machine: For what.
        use_from: Where ``machine.use`` is from.
        steps: ``run.steps``.
        parameters: Of the model.
        asked: The config's own layout.
        levers: Where that doesn't run: what one change would make of it.
        found: Layouts, those that run first, fastest first.
        needless: How many were left out, as ``Search`` has it.
        totals: Of the fastest; None where none runs.
    """

    run: Run
    machine: Machine
    use_from: str
    steps: int
    parameters: int
    asked: Layout
    levers: tuple[tuple[str, Layout], ...]
    found: tuple[Layout, ...]
    needless: int
    totals: Totals | None


def plan(path: Path | None, *, overrides: Sequence[str], options: PlanOptions) -> Plan:
    """
    Raises:
        ConfigError: Of the config, or of what is planned for.
    """
    config = load_config(TrainConfig, path, overrides=overrides, rules=_unplanned)
    machine = _machine(options)
    run, parameters = _run(config, options.latent)
    machine, use_from = _used(config, run, machine, options)
    asked = judged(run, config.parallel, machine)
    search = layouts(run, machine)
    found = search.layouts
    levers = tuple(instead(run, asked, machine)) if asked.memory is not None and asked.problem is not None else ()
    best = found[0] if found[0].problem is None else None
    totals = None if best is None else _totals(run, machine, best, steps=config.run.steps, parameters=parameters)
    return Plan(
        run=run,
        machine=machine,
        use_from=use_from,
        steps=config.run.steps,
        parameters=parameters,
        asked=asked,
        levers=levers,
        found=found,
        needless=search.needless,
        totals=totals,
    )


def _unplanned(config: TrainConfig) -> list[Problem]:
    """What no formula here is of."""
    backend = config.parallel.zero.backend
    if backend == "native":
        return []
    message = (
        f"parallel.zero.backend={backend} is not planned: what it holds and sends is in no formula; "
        "plan with parallel.zero.backend=native"
    )
    return [Problem(fields=("parallel.zero.backend",), message=message)]


def _machine(options: PlanOptions) -> Machine:
    problems = [
        f"--{name} must be above 0, and is {value:g}"
        for name, value in (("gpus", options.gpus), ("per-node", options.per_node), ("network-gbit", options.network_gbit))
        if not 0 < value < math.inf
    ]
    if options.use is not None and not 0 < options.use <= 1:
        problems.append(f"--use must be above 0 and at most 1, and is {options.use:g}")
    if options.dollars is not None and not 0 <= options.dollars < math.inf:
        problems.append(f"--dollars-per-gpu-hour must be 0 or more, and is {options.dollars:g}")
    if options.per_node > 0 and options.gpus > options.per_node and options.gpus % options.per_node:
        problems.append(f"--gpus {options.gpus} is no whole number of nodes of --per-node {options.per_node}")
    try:
        gpu = gpu_of(options.gpu)
    except ConfigError as error:
        problems += error.problems
    if problems:
        raise ConfigError(problems)
    machine = Machine(
        gpu=gpu,
        gpus=options.gpus,
        per_node=min(options.per_node, options.gpus),
        network_bytes_per_s=options.network_gbit * 1e9 / 8,
        dollars_per_gpu_hour=options.dollars,
    )
    return machine if options.use is None else replace(machine, use=options.use)


def _used(config: TrainConfig, run: Run, machine: Machine, options: PlanOptions) -> tuple[Machine, str]:
    """With the share of the peak that steps reach, and where it is from."""
    if options.use is not None:
        return machine, "as given by --use"
    path = options.measured or _RESULTS / machine.gpu.name
    if options.measured is None and not path.is_dir():
        return machine, f"assumed: no step on this GPU is stored in {path}; measure one and name it by --measured"
    try:
        timed_there = read_timed(path)
    except ConfigError as error:
        if options.measured is not None:
            raise
        return machine, f"assumed: {'; '.join(error.problems)}"
    nearest = nearest_use(timed_there, config=config, latent=run.latent, machine=machine)
    if nearest is None:
        return machine, f"assumed: {path} has no step on a {machine.gpu.name} in {run.dtype}"
    use, timed = nearest
    shape = timed.case.model.shape
    what = f"{timed.case.model.name} of width {shape.width}, {timed.case.latent} latents, {timed.form}"
    return replace(machine, use=use), f"measured: {timed.source} ({what}), {timed.step_s:.3g} s a step"


def _run(config: TrainConfig, latent: Thw | None) -> tuple[Run, int]:
    """The run, and the parameters of its model."""
    channels, width, tokens = _CHANNELS, _TEXT_WIDTH, _TEXT_TOKENS
    if latent is None:
        try:
            index = open_data(config.data, max_lost=config.resilience.max_bad_samples)
        except OpensoraError as error:
            said = f"the data set says of what shape samples are, and can't be opened ({error}); give --latent, as in --latent 16x32x32"
            raise ConfigError(said) from error
        with closing(index.shard_source):
            latent = max((shape.latent for shape in index.shapes), key=lambda shape: shape.volume)
            channels, width, tokens = index.spec.channels, index.spec.text_width, index.spec.max_tokens
    out = channels * (2 if config.objective.name == "iddpm" else 1)
    io = ModelIo(in_channels=channels, out_channels=out, text_width=width, max_tokens=tokens)
    with torch.device("meta"):
        model = build_model(config.model, io)
    try:
        grid = model.token_grid(latent)
    except ConfigError as error:
        raise ConfigError([f"--latent {latent}: {p}" for p in error.problems]) from None
    run = Run(
        model=config.model,
        parallel=config.parallel,
        global_batch=config.data.global_batch,
        latent=latent,
        dtype=config.run.dtype,
        cost=sample_cost(model, grid, text_tokens=tokens),
        channels=channels,
        text_width=width,
        text_tokens=tokens,
        kernels=config.run.kernels,
    )
    return run, sum(p.numel() for p in model.parameters())


def _totals(run: Run, machine: Machine, best: Layout, *, steps: int, parameters: int) -> Totals:
    assert best.step is not None
    per_s = run.global_batch / best.step.total_s
    hours = steps * best.step.total_s / 3600
    gpu_hours = hours * machine.gpus
    price = machine.dollars_per_gpu_hour
    # Each rank of those that share a sample reads its frames, and all of its text.
    text = run.text_tokens * run.text_width * best.parallel.sp.degree
    sample_bytes = 2 * (run.channels * run.latent.volume + text)
    nodes = machine.gpus // machine.per_node
    return Totals(
        samples_per_gpu_s=per_s / machine.gpus,
        tokens_per_gpu_s=per_s * run.grid.volume / machine.gpus,
        mfu=3 * run.cost.flops * per_s / (machine.gpus * machine.gpu.flops_per_s),
        hours=hours,
        gpu_hours=gpu_hours,
        dollars=None if price is None else gpu_hours * price,
        checkpoint_bytes=4 * 4 * parameters,
        loader_bytes_per_s=per_s * sample_bytes / nodes,
    )


def record(made: Plan) -> dict[str, Any]:
    """JSON values."""

    def of(layout: Layout) -> dict[str, Any]:
        return {
            "layout": layout.overrides,
            "micro_batch": layout.micro_batch,
            "problem": layout.problem,
            "memory": None if layout.memory is None else {**asdict(layout.memory), "total": layout.memory.total},
            "step": None if layout.step is None else {**asdict(layout.step), "total_s": layout.step.total_s},
        }

    return {
        "format": 1,
        "machine": asdict(made.machine),
        "use_from": made.use_from,
        "limit_bytes": limit_bytes(made.machine),
        "latent": list(made.run.latent),
        "global_batch": made.run.global_batch,
        "steps": made.steps,
        "parameters": made.parameters,
        "asked": of(made.asked),
        "levers": {name: of(layout) for name, layout in made.levers},
        "layouts": [of(layout) for layout in made.found],
        "needless": made.needless,
        "totals": None if made.totals is None else asdict(made.totals),
    }


def show(made: Plan, *, console: Console | None = None) -> None:
    """For people."""
    console = console or Console()
    if not console.is_terminal:
        console = Console(width=_WIDE, file=console.file)
    machine, run = made.machine, made.run
    console.print(
        f"{run.model.name} of {made.parameters / 1e6:,.0f} M parameters, samples of {run.latent} latents = {run.grid.volume:,} tokens, "
        f"{run.global_batch} to a step, on {machine.gpus} x {machine.gpu.name} ({machine.per_node} to a node)",
        highlight=False,
    )
    _show_asked(made, console)
    fit = [layout for layout in made.found if layout.problem is None]
    if not fit:
        least = made.found[0]
        console.print(f"none of {len(made.found)} layouts runs; nearest: {least.overrides}: {least.problem}", highlight=False)
        return
    needless = f"; {made.needless:,} more only save memory that a faster one has" if made.needless else ""
    table = Table(
        title=f"{len(fit):,} of {len(made.found):,} layouts run{needless}; the fastest, one per degree, scheme, tp and recomputation"
    )
    for column in (
        "layout",
        "step s",
        "compute",
        "tokens",
        "tp",
        "weights",
        "optimizer",
        "offload",
        "GiB",
        "CPU GiB",
        "samples/s/GPU",
    ):
        table.add_column(column, justify="left" if column == "layout" else "right", overflow="fold")
    for layout in _different(fit):
        step, memory = layout.step, layout.memory
        assert step is not None and memory is not None
        parts = (step.compute_s, step.tokens_s, step.tensor_s, step.weights_s, step.optimizer_s, step.offload_s)
        rate = run.global_batch / step.total_s / machine.gpus
        table.add_row(
            layout.overrides.replace("parallel.", ""),
            *(f"{t:.3g}" for t in (step.total_s, *parts)),
            f"{memory.total / 2**30:.1f}",
            f"{memory.host / 2**30:.0f}",
            f"{rate:.3g}",
        )
    console.print(table)
    t = made.totals
    assert t is not None
    money = "" if t.dollars is None else f", ${t.dollars:,.0f}"
    console.print(
        f"the fastest: {t.samples_per_gpu_s:.3g} samples/s and {t.tokens_per_gpu_s:,.0f} tokens/s per GPU, MFU {t.mfu:.0%}; "
        f"{made.steps:,} steps in {t.hours:,.1f} h, {t.gpu_hours:,.0f} GPU hours{money}; a checkpoint of {t.checkpoint_bytes / 1e9:.1f} GB; "
        f"{t.loader_bytes_per_s / 1e6:.1f} MB/s to read on each node",
        highlight=False,
    )
    console.print(
        f"Times rest on {machine.use:.0%} of the peak reached in a step ({made.use_from}), {machine.gpu.link_bytes_per_s / 1e9:.0f} GB/s within a node and "
        f"{machine.network_bytes_per_s / 1e9:.0f} GB/s per GPU between nodes; memory on formulas (docs/memory.md).",
        highlight=False,
    )


def _show_asked(made: Plan, console: Console) -> None:
    asked = made.asked
    if asked.problem is None:
        assert asked.step is not None and asked.memory is not None
        said = f"{asked.step.total_s:.3g} s a step, {asked.memory.total / 2**30:.1f} GiB"
    else:
        said = asked.problem
    console.print(f"the config's own layout ({asked.overrides}): {said}", highlight=False)
    for name, layout in made.levers:
        if layout.memory is not None:
            runs = "" if layout.problem is None and layout.step is not None else ", still too much"
            console.print(f"  {name} -> {layout.memory.total / 2**30:.0f} GiB{runs}", highlight=False)


def _different(fit: Sequence[Layout]) -> list[Layout]:
    """The fastest of each kind."""
    seen, kept = set(), []
    for layout in fit:
        p = layout.parallel
        kind = (p.sp.degree, p.sp.scheme if p.sp.degree > 1 else "", p.tp, p.recompute)
        if kind not in seen:
            seen.add(kind)
            kept.append(layout)
    return kept[:_SHOWN]
