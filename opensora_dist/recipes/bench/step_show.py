"""A step benchmark's results as figures, as a table and as JSON."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
from rich.console import Console
from rich.table import Table

from opensora_dist.core.io import write_json
from opensora_dist.observe.progress import Bar
from opensora_dist.plan.hardware import peak_flops
from opensora_dist.plan.measured import STEP_FORMAT
from opensora_dist.plan.memory import MemoryCase, estimate
from opensora_dist.recipes.bench.figures import Spread
from opensora_dist.recipes.bench.kinds import IDLE, KINDS, OTHER
from opensora_dist.recipes.bench.show import DASH, WIDE, about, megabytes, ms, percent, three
from opensora_dist.recipes.bench.speed import Speed, Work, speed
from opensora_dist.recipes.bench.step import FormResult, StepOptions, Variant, bench_step, silence_problem
from opensora_dist.recipes.bench.training import latent_flops, samples_of

_CAPTION = (
    "Medians over rounds, in brackets the quartiles; a round's time is its slowest rank's, of whole steps: draws, forward, backward, "
    "clip, optimizer, average. Exposed: beyond the same step without communication. Peak: all that a rank has on its device."
)
_KINDS_CAPTION = (
    "Of one more step of rank 0 under torch's profiler, which slows the host down. Sorted by names: what a compiler has put together has one. "
    "idle: nothing ran (on a GPU it waited for the host; on a CPU this is Python)."
)


@dataclass(frozen=True, kw_only=True)
class StepFigures:
    """Of one form; milliseconds. None where there is nothing to compare with.

    Args:
        ratio: To the first form, round by round.
        exposed_ms: Beyond the same form without communication, round by round.
    """

    step_ms: Spread
    ratio: Spread | None
    exposed_ms: Spread | None
    speed: Speed


def step_figures(result: FormResult, first: FormResult, *, work: Work) -> StepFigures:
    """Of a form that was timed in the same rounds as ``first``."""
    step = Spread.of(result.seconds)
    exposed = [a - b for a, b in zip(result.seconds, result.silent)]
    exposed_s = Spread.of(exposed).median if exposed else None
    return StepFigures(
        step_ms=_ms(result.seconds),
        ratio=None if result is first else Spread.of([a / b for a, b in zip(result.seconds, first.seconds, strict=True)]),
        exposed_ms=_ms(exposed) if exposed else None,
        speed=speed(step.median, work=work, exposed_s=exposed_s),
    )


def _ms(seconds: Sequence[float]) -> Spread:
    return Spread.of([1e3 * s for s in seconds])


def step_rank(variants: Sequence[Variant], device: torch.device, *, options: StepOptions, out: Path | None) -> int:
    """One rank's part; rank 0 prints and writes. Collective."""
    main = dist.get_rank() == 0
    with Bar("rounds", total=options.warmup + options.rounds, enabled=main) as bar:
        results = bench_step(variants, device=device, options=options, on_round=bar.update)
    if main:
        peak = peak_flops(device, dtype=variants[0].case.dtype)
        works = [work_of(v.case, peak_flops=peak, dollars_per_gpu_hour=options.dollars_per_gpu_hour) for v in variants]
        of_results = [works[variants.index(r.variant)] for r in results]
        print_step_table(results, works=of_results)
        if out is not None:
            kind: Literal["cpu", "cuda"] = "cuda" if device.type == "cuda" else "cpu"
            write_json(out / "step.json", step_record(results, options=options, works=of_results, device=kind))
            print(out / "step.json")
    return 0


def work_of(case: MemoryCase, *, peak_flops: float | None, dollars_per_gpu_hour: float | None = None) -> Work:
    """What a step of a case does."""
    flops, grid = latent_flops(case)
    return Work(
        samples=samples_of(case),
        tokens=grid.volume,
        flops=flops,
        world=case.world,
        peak_flops=peak_flops,
        dollars_per_gpu_hour=dollars_per_gpu_hour,
    )


def print_step_table(results: Sequence[FormResult], *, works: Sequence[Work], console: Console | None = None) -> None:
    """To the standard output.

    Args:
        works: Of each result.
    """
    console = console or Console()
    if not console.is_terminal:
        console = Console(width=WIDE, file=console.file)
    case = results[0].variant.case
    table = Table(title=step_title(case), caption=_CAPTION, caption_justify="left")
    table.add_column("form", no_wrap=True)
    columns = (
        "step ms",
        f"x {results[0].name}",
        "samples/s",
        "tokens/s/rank",
        "MFU",
        "exposed ms",
        "exposed",
        "$/M tokens",
        "peak MB",
        "first step s",
    )
    for column in columns:
        table.add_column(column, justify="right", no_wrap=not console.is_terminal)
    for result, work in zip(results, works, strict=True):
        found = step_figures(result, results[0], work=work)
        fast, ratio = found.speed, found.ratio
        table.add_row(
            result.name,
            ms(found.step_ms),
            DASH if ratio is None else f"{ratio.median:.3f} [{ratio.low:.3f}, {ratio.high:.3f}]",
            three(fast.samples_per_s),
            three(fast.tokens_per_s_per_rank),
            percent(fast.mfu),
            DASH if found.exposed_ms is None else ms(found.exposed_ms),
            percent(fast.exposed_share),
            DASH if fast.dollars_per_million_tokens is None else three(fast.dollars_per_million_tokens),
            megabytes(result.memory_bytes),
            DASH if result.first_s is None else three(result.first_s),
        )
    console.print(table)
    for result in results:
        console.print(f"{result.name}: {result.computed_by}", markup=False, highlight=False)
    if (why := silence_problem(case)) is not None:
        console.print(f"exposed communication is left out: {why}", markup=False, highlight=False)
    print_kinds(results, console=console)


def print_kinds(results: Sequence[FormResult], *, console: Console) -> None:
    """The share of a step's time that each kind of kernel takes, by form."""
    timed = [(result.name, result.kinds) for result in results if result.kinds is not None]
    if not timed:
        return
    table = Table(title="Share of the time by kind", caption=_KINDS_CAPTION, caption_justify="left")
    table.add_column("kind", no_wrap=True)
    for name, _ in timed:
        table.add_column(name, justify="right", no_wrap=not console.is_terminal)
    shares = [kinds.shares() for _, kinds in timed]
    for kind in (*KINDS, OTHER, IDLE):
        if any(kind in of for of in shares):
            table.add_row(kind, *(percent(of.get(kind)) for of in shares))
    console.print(table)
    for name, kinds in timed:
        if kinds.unknown:
            console.print(f"{name}: other: {', '.join(kinds.unknown)}", markup=False, highlight=False)


def step_title(case: MemoryCase) -> str:
    """The case in a line."""
    depth, width, heads = case.model.shape
    parallel = case.parallel
    how = [f"ZeRO {parallel.zero.stage}"]
    if parallel.sp.degree > 1:
        how.append(f"{parallel.sp.scheme} x {parallel.sp.degree}")
    if parallel.dp_replicate > 1:
        how.append(f"{parallel.dp_replicate} copies")
    if parallel.recompute != "none":
        how.append(f"recompute {parallel.recompute}")
    return (
        f"A step of {case.model.name} ({depth} blocks, width {width}, {heads} heads) over {case.world} rank{'s' if case.world > 1 else ''}: "
        f"{samples_of(case)} sample{'s' if samples_of(case) > 1 else ''} of {case.latent} latents, {case.text_tokens} text tokens, {case.dtype}, {', '.join(how)}"
    )


def step_record(
    results: Sequence[FormResult], *, options: StepOptions, works: Sequence[Work], device: Literal["cpu", "cuda"]
) -> dict[str, Any]:
    """Everything as JSON values: cases, the environment, raw times, and the figures that follow from them.

    ``case``, ``work`` and ``memory_by_formula`` are of the first result; each result has its own, by the kernels of its form.

    Args:
        works: Of each result.
        device: That ran it, whatever else the environment has.
    """
    first = results[0].case
    return {
        "format": STEP_FORMAT,
        "kind": "step",
        "device": device,
        "case": case_record(first),
        "world": first.world,
        "work": asdict(works[0]),
        "options": asdict(options),
        "memory_by_formula": _by_formula(first),
        "silence_problem": silence_problem(first),
        **about(first.world),
        "results": [
            {
                "name": r.name,
                "form": r.form,
                "changed": r.variant.changed,
                "case": case_record(r.case),
                "work": asdict(work),
                "memory_by_formula": _by_formula(r.case),
                **{key: value for key, value in asdict(r).items() if key not in ("form", "variant")},
                "figures": asdict(step_figures(r, results[0], work=work)),
            }
            for r, work in zip(results, works, strict=True)
        ],
    }


def case_record(case: MemoryCase) -> dict[str, Any]:
    """As JSON values."""
    return {
        **asdict(case),
        "model": case.model.model_dump(mode="json"),
        "parallel": case.parallel.model_dump(mode="json"),
        "latent": list(case.latent),
    }


def _by_formula(case: MemoryCase) -> int | None:
    return estimate(case).total if case.parallel.zero.backend == "native" else None
