"""Every layout of a run on a machine: which fit, how long a step takes in each, and what keeps the others from fitting."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from opensora_dist.config.train import ModelConfig, ParallelConfig, SpConfig
from opensora_dist.core.types import Thw
from opensora_dist.parallel.sequence.layout import scheme_problems
from opensora_dist.parallel.sequence.predict import SampleCost
from opensora_dist.plan.memory import MemoryCase, MemoryEstimate, estimate
from opensora_dist.plan.time import Machine, StepTime, step_time

_SCHEMES = ("dsp", "ulysses", "fastseq", "ring", "usp")
_RECOMPUTE: tuple[Literal["none", "selective", "full"], ...] = ("none", "selective", "full")
_STAGES: tuple[Literal[0, 1, 2, 3], ...] = (0, 1, 2, 3)
_TILE_TOKENS = 16_384
_RESERVED = 0.10
"""Of a GPU's memory, for what no formula has: its context, NCCL's buffers, workspaces, fragments."""


@dataclass(frozen=True, kw_only=True)
class Run:
    """What is planned, whatever the layout.

    Args:
        model: Section ``model``.
        parallel: Section ``parallel``, of which a layout changes what it names.
        global_batch: Samples of a step.
        latent: Of one sample.
        dtype: ``run.dtype``.
        cost: Of one sample, from the model.
        channels: Latent channels.
        text_width: Of a text token.
        text_tokens: Of the longest caption.
    """

    model: ModelConfig
    parallel: ParallelConfig
    global_batch: int
    latent: Thw
    dtype: str
    cost: SampleCost
    channels: int
    text_width: int
    text_tokens: int

    @property
    def grid(self) -> Thw:
        """Tokens of a sample."""
        patch = Thw(*self.model.patch)
        return Thw(self.latent.t // patch.t, self.latent.h // patch.h, self.latent.w // patch.w)


@dataclass(frozen=True, kw_only=True)
class Layout:
    """One way of running it.

    Args:
        parallel: The whole section, as a config would have it.
        base: The section of the config that is planned.
        micro_batch: Samples that ranks that share them work on at once.
        memory: At the worst moment.
        step: Its time; None where it doesn't run.
        problem: What keeps it from running; None: nothing.
    """

    parallel: ParallelConfig
    base: ParallelConfig
    micro_batch: int
    memory: MemoryEstimate | None
    step: StepTime | None
    problem: str | None

    @property
    def overrides(self) -> str:
        """What to put behind the config on a command line."""
        p, sp, base = self.parallel, self.parallel.sp, self.base
        words = [f"parallel.sp.degree={sp.degree}"]
        words += [f"parallel.sp.scheme={sp.scheme}"] if sp.degree > 1 or sp.scheme != base.sp.scheme else []
        words += [f"parallel.sp.ulysses={_yaml(sp.ulysses)}"] if sp.ulysses != base.sp.ulysses else []
        words += [
            f"parallel.zero.stage={p.zero.stage}",
            f"parallel.grad_accum={p.grad_accum}",
            f"parallel.recompute={p.recompute}",
        ]
        for name in ("offload_activations", "tile_tokens"):
            if getattr(p, name) != getattr(base, name):
                words.append(f"parallel.{name}={_yaml(getattr(p, name))}")
        return " ".join(words)


def limit_bytes(machine: Machine) -> int:
    """Of a GPU's memory, what a layout may need."""
    return int(machine.gpu.memory_bytes * (1 - _RESERVED))


def layouts(run: Run, machine: Machine) -> list[Layout]:
    """All of them: those that run, fastest first, then the others, by what they need."""
    found = [judged(run, parallel, machine) for parallel in _candidates(run, machine)]
    return sorted(found, key=lambda layout: (layout.problem is not None, _time(layout), _need(layout)))


def judged(run: Run, parallel: ParallelConfig, machine: Machine) -> Layout:
    """A layout with the largest micro-batch that fits; or, where none does, with what a single sample needs."""
    sp = parallel.sp
    broken = scheme_problems(sp, run.grid, heads=run.model.shape.heads, joint=run.model.name != "stdit")
    samples, left = divmod(run.global_batch * sp.degree * parallel.tp, machine.gpus)
    if machine.gpus % (sp.degree * parallel.tp * parallel.dp_replicate):
        broken = [f"{machine.gpus} GPUs don't part into groups of {sp.degree * parallel.tp * parallel.dp_replicate}"]
    elif left:
        groups = machine.gpus // (sp.degree * parallel.tp)
        broken = [
            *broken,
            f"data.global_batch={run.global_batch} doesn't part over the {groups} groups of ranks that see other samples",
        ]
    if broken:
        return Layout(parallel=parallel, base=run.parallel, micro_batch=1, memory=None, step=None, problem=broken[0])
    least: MemoryEstimate | None = None
    for micro in _divisors(samples):
        case = _case(run, parallel.model_copy(update={"grad_accum": samples // micro}), machine, micro)
        memory = estimate(case)
        if memory.total <= limit_bytes(machine):
            return Layout(
                parallel=case.parallel,
                base=run.parallel,
                micro_batch=micro,
                memory=memory,
                step=step_time(case, run.cost, machine),
                problem=None,
            )
        least = memory
    assert least is not None
    said = f"needs {least.total / 2**30:.0f} GiB of {limit_bytes(machine) / 2**30:.0f} ({least.moment})"
    return Layout(parallel=case.parallel, base=run.parallel, micro_batch=1, memory=least, step=None, problem=said)


def instead(run: Run, layout: Layout, machine: Machine) -> Iterator[tuple[str, Layout]]:
    """Of a layout that needs too much: what each lever by itself would make of it, and its name."""
    p, sp = layout.parallel, layout.parallel.sp
    changes: list[tuple[str, ParallelConfig]] = [
        (f"sp {degree}", p.model_copy(update={"sp": sp.model_copy(update={"degree": degree, "ulysses": None})}))
        for degree in (2, 4, 8, 16)
        if degree > sp.degree
    ]
    changes += [
        (f"recompute {how}", p.model_copy(update={"recompute": how}))
        for how in _RECOMPUTE
        if _RECOMPUTE.index(how) > _RECOMPUTE.index(p.recompute)
    ]
    changes += [
        (f"zero {stage}", p.model_copy(update={"zero": p.zero.model_copy(update={"stage": stage})}))
        for stage in _STAGES
        if stage > p.zero.stage
    ]
    if not p.offload_activations:
        changes.append(("offloaded activations", p.model_copy(update={"offload_activations": True})))
    for name, parallel in changes:
        yield name, judged(run, parallel, machine)


def _candidates(run: Run, machine: Machine) -> Iterator[ParallelConfig]:
    """Whatever the config's own layout is, but with its tensor parallelism and backend."""
    for sp in _sequences(run, machine):
        for stage in _STAGES:
            for recompute in _RECOMPUTE:
                for offload in (False, True):
                    for tile in (None, _TILE_TOKENS):
                        zero = run.parallel.zero.model_copy(update={"stage": stage})
                        yield run.parallel.model_copy(
                            update={
                                "sp": sp,
                                "zero": zero,
                                "recompute": recompute,
                                "offload_activations": offload,
                                "tile_tokens": tile,
                            }
                        )


def _sequences(run: Run, machine: Machine) -> Iterator[SpConfig]:
    base = run.parallel.sp.model_copy(update={"ulysses": None})
    yield base.model_copy(update={"degree": 1, "scheme": "dsp"})
    for degree in _divisors(machine.gpus):
        if 1 < degree <= max(run.grid.t, run.grid.h):
            for scheme in _SCHEMES:
                inner = min(degree // 2, machine.per_node) if scheme == "usp" else None
                if scheme != "usp" or degree >= 4:
                    yield base.model_copy(update={"degree": degree, "scheme": scheme, "ulysses": inner})


def _case(run: Run, parallel: ParallelConfig, machine: Machine, micro_batch: int) -> MemoryCase:
    return MemoryCase(
        model=run.model,
        parallel=parallel,
        world=machine.gpus,
        latent=run.latent,
        dtype=run.dtype,
        micro_batch=micro_batch,
        channels=run.channels,
        text_width=run.text_width,
        text_tokens=run.text_tokens,
        max_tokens=run.text_tokens,
    )


def _yaml(value: bool | int | None) -> str:
    return "null" if value is None else str(value).lower()


def _divisors(number: int) -> list[int]:
    """Largest first."""
    return [d for d in range(number, 0, -1) if number % d == 0]


def _time(layout: Layout) -> float:
    return layout.step.total_s if layout.step is not None else 0.0


def _need(layout: Layout) -> int:
    return layout.memory.total if layout.memory is not None else 1 << 62
