"""A step benchmark's results as figures, as a table and as JSON."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from rich.console import Console
from rich.table import Table

from opensora_dist.core.io import write_json
from opensora_dist.observe.progress import Bar
from opensora_dist.plan.hardware import peak_flops
from opensora_dist.plan.memory import MemoryCase, estimate
from opensora_dist.recipes.bench.figures import Spread
from opensora_dist.recipes.bench.show import DASH, WIDE, about, ms, percent, three
from opensora_dist.recipes.bench.speed import Speed, Work, speed
from opensora_dist.recipes.bench.step import FormResult, StepOptions, bench_step, latent_flops, samples_of, silence_problem

_CAPTION = (
    "Medians over rounds, in brackets the quartiles; a round's time is its slowest rank's, of whole steps: draws, forward, backward, "
    "clip, optimizer, average. Exposed: beyond the same step without communication. Peak: all that a rank has on its device."
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


def step_rank(case: MemoryCase, device: torch.device, *, options: StepOptions, out: Path | None) -> int:
    """One rank's part; rank 0 prints and writes. Collective."""
    main = dist.get_rank() == 0
    with Bar("rounds", total=options.warmup + options.rounds, enabled=main) as bar:
        results = bench_step(case, device=device, options=options, on_round=bar.update)
    if main:
        flops, grid = latent_flops(case)
        work = Work(
            samples=samples_of(case),
            tokens=grid.volume,
            flops=flops,
            world=case.world,
            peak_flops=peak_flops(device, dtype=case.dtype),
            dollars_per_gpu_hour=options.dollars_per_gpu_hour,
        )
        print_step_table(case, results, work=work)
        if out is not None:
            write_json(out / "step.json", step_record(case, results, options=options, work=work))
            print(out / "step.json")
    return 0


def print_step_table(case: MemoryCase, results: Sequence[FormResult], *, work: Work, console: Console | None = None) -> None:
    """To the standard output."""
    console = console or Console()
    if not console.is_terminal:
        console = Console(width=WIDE, file=console.file)
    table = Table(title=step_title(case), caption=_CAPTION, caption_justify="left")
    table.add_column("form", no_wrap=True)
    columns = (
        "step ms",
        f"x {results[0].form}",
        "samples/s",
        "tokens/s/rank",
        "MFU",
        "exposed ms",
        "exposed",
        "$/M tokens",
        "peak MB",
    )
    for column in columns:
        table.add_column(column, justify="right", no_wrap=not console.is_terminal)
    for result in results:
        found = step_figures(result, results[0], work=work)
        fast, ratio = found.speed, found.ratio
        table.add_row(
            result.form,
            ms(found.step_ms),
            DASH if ratio is None else f"{ratio.median:.3f} [{ratio.low:.3f}, {ratio.high:.3f}]",
            three(fast.samples_per_s),
            three(fast.tokens_per_s_per_rank),
            percent(fast.mfu),
            DASH if found.exposed_ms is None else ms(found.exposed_ms),
            percent(fast.exposed_share),
            DASH if fast.dollars_per_million_tokens is None else three(fast.dollars_per_million_tokens),
            f"{result.memory_bytes / 1e6:.1f}",
        )
    console.print(table)
    if (why := silence_problem(case)) is not None:
        console.print(f"exposed communication is left out: {why}", markup=False, highlight=False)


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


def step_record(case: MemoryCase, results: Sequence[FormResult], *, options: StepOptions, work: Work) -> dict[str, Any]:
    """Everything as JSON values: the case, the environment, raw times, and the figures that follow from them."""
    native = case.parallel.zero.backend == "native"
    return {
        "format": 1,
        "kind": "step",
        "case": {
            **asdict(case),
            "model": case.model.model_dump(mode="json"),
            "parallel": case.parallel.model_dump(mode="json"),
            "latent": list(case.latent),
        },
        "world": case.world,
        "work": asdict(work),
        "options": asdict(options),
        "memory_by_formula": estimate(case).total if native else None,
        "silence_problem": silence_problem(case),
        **about(case.world),
        "results": [{"name": r.form, **asdict(r), "figures": asdict(step_figures(r, results[0], work=work))} for r in results],
    }
