"""The page of rooflines: what a step takes at least, by operator, beside what ``bench step`` measured, where it has run on a GPU."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from opensora_dist.config.train import ModelConfig, ParallelConfig
from opensora_dist.core.types import Thw
from opensora_dist.plan.hardware import Gpu, gpu_for_device, gpu_of
from opensora_dist.plan.measured import TimedStep, timed_below
from opensora_dist.plan.memory import MemoryCase
from opensora_dist.recipes.bench.kinds import IDLE, KINDS, OTHER
from opensora_dist.recipes.bench.roofline import Operator, limit_s, model_flops, step_operators
from opensora_dist.recipes.bench.show import DASH, percent, three

SHAPES = {"16x256x256": (Thw(16, 32, 32), 6), "16x512x512": (Thw(16, 64, 64), 1), "64x512x512": (Thw(64, 64, 64), 1)}
"""Frames and pixels of a clip; its latents, and the samples that ``configs/bench`` has of them on a GPU."""
_GPUS = ("a100", "h100", "h200", "b200")
_OPERATORS_ON = "h100"


def stored_results(folder: Path) -> list[TimedStep]:
    """All that ``bench step`` stored below a folder; what ran on a CPU or on several ranks is left out.

    Raises:
        ConfigError: A step is of another format.
    """
    return [timed for timed in timed_below(folder) if timed.cuda and timed.case.world == 1]


def page(measured: Sequence[TimedStep]) -> str:
    """Markdown, from the arithmetic and what was measured."""
    published = {name: (case, step_operators(case)) for name, case in published_cases().items()}
    parts = [_least_times(published), *(_by_operator(name, *of) for name, of in published.items())]
    by_case: dict[tuple[str, MemoryCase], list[TimedStep]] = {}
    for one in measured:
        by_case.setdefault((one.device, replace(one.case, kernels="torch")), []).append(one)  # whoever computes it
    parts.append("## Measured\n" if measured else "## Measured\n\nNothing: no GPU has run it.\n".rstrip())
    parts += [_beside_limits(device, case, forms) for (device, case), forms in by_case.items()]
    return "\n\n".join(part.strip() for part in parts)


def published_cases() -> dict[str, MemoryCase]:
    """XL/2 at the shapes that Open-Sora published speeds of."""
    return {
        name: MemoryCase(
            model=ModelConfig(size="XL"), parallel=ParallelConfig(), world=1, latent=latent, dtype="bfloat16", micro_batch=batch
        )
        for name, (latent, batch) in SHAPES.items()
    }


def _least_times(published: Mapping[str, tuple[MemoryCase, list[Operator]]]) -> str:
    lines = [
        "## The least time of a step (arithmetic, not measured)",
        "",
        "STDiT-XL/2, bf16, one GPU, no recomputation. MFU is what it could be at best, with every operator at its limit.",
        "",
        "| shape | samples | FLOPs to train one | " + " | ".join(f"{g.upper()}: ms, samples/s, MFU" for g in _GPUS) + " |",
        "| --- " * (3 + len(_GPUS)) + "|",
    ]
    for name, (case, operators) in published.items():
        cells = [name, str(case.micro_batch), f"{model_flops(operators) / case.micro_batch / 1e12:.1f}e12"]
        for gpu in map(gpu_of, _GPUS):
            least, mfu = limit_s(operators, gpu), best_mfu(operators, gpu)
            cells.append(f"{1e3 * least:.0f}, {case.micro_batch / least:.2f}, {percent(mfu)}")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def best_mfu(operators: list[Operator], gpu: Gpu) -> float:
    """Model FLOPs over the peak, were every operator at its limit."""
    return model_flops(operators) / (limit_s(operators, gpu) * gpu.flops_per_s)


def _by_operator(name: str, case: MemoryCase, operators: list[Operator]) -> str:
    gpu = gpu_of(_OPERATORS_ON)
    total = limit_s(operators, gpu)
    lines = [
        f"### {name}, by operator, on {_OPERATORS_ON.upper()} (arithmetic)",
        "",
        f"{case.micro_batch} sample{'s' if case.micro_batch > 1 else ''} of {case.latent} latents; forward and backward of all "
        f"{case.model.shape.depth} blocks together.",
        "",
        "| operator | kind | TFLOP | GB | FLOP/byte | limit | ms | of the step |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for op in operators:
        seconds = op.limit_s(gpu)
        if seconds < 1e-3 * total:
            continue
        bound = "arithmetic" if op.flops / gpu.flops_per_s > op.bytes / gpu.memory_bytes_per_s else "memory"
        ratio = three(op.flops / op.bytes) if op.flops else DASH
        cells = [op.name, op.kind, three(op.flops / 1e12) if op.flops else DASH, three(op.bytes / 1e9), ratio, bound]
        lines.append("| " + " | ".join([*cells, three(1e3 * seconds), f"{100 * seconds / total:.1f}%"]) + " |")
    return "\n".join([*lines, "", "What takes less than a thousandth of the step is left out."])


def _beside_limits(device: str, case: MemoryCase, forms: Sequence[TimedStep]) -> str:
    """What each kind of kernel took, over the least that its operators take."""
    gpu = gpu_for_device(device)
    title = f"### {device}: {case.model.name} ({case.model.shape.depth} blocks, width {case.model.shape.width}), {case.micro_batch} x {case.latent} latents, recompute {case.parallel.recompute}"
    if gpu is None:
        return f"{title}\n\nThis GPU is not in the table of `plan/hardware.py`, so there is no limit to compare with."
    operators = step_operators(case)
    lines = [title, "", "| kind | limit, ms | " + " | ".join(f"{f.form}, ms (x limit)" for f in forms) + " |"]
    lines.append("| --- " * (2 + len(forms)) + "|")
    for kind in (*KINDS, OTHER, IDLE):
        least = 1e3 * sum(op.limit_s(gpu) for op in operators if op.kind == kind)
        took = [form.kinds_ms.get(kind, 0.0) for form in forms]
        if least or any(took):
            cells = [f"{three(ms)} ({three(ms / least)})" if least and ms else three(ms) if ms else DASH for ms in took]
            lines.append(f"| {kind} | {three(least) if least else DASH} | " + " | ".join(cells) + " |")
    least = 1e3 * limit_s(operators, gpu)
    steps = [1e3 * form.step_s for form in forms]
    lines.append(
        f"| the step, unwatched | {three(least)} | " + " | ".join(f"{three(s)} ({three(s / least)})" for s in steps) + " |"
    )
    mfus = [percent(form.mfu) for form in forms]
    lines.append(f"| MFU | {percent(best_mfu(operators, gpu))} | " + " | ".join(mfus) + " |")
    return "\n".join(lines)
