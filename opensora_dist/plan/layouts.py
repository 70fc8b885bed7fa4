"""Every layout of a run on a machine: which fit, how long a step takes in each, and what keeps the others from fitting."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from typing import Literal

from opensora_dist.config.rules import mesh_problems
from opensora_dist.config.train import ModelConfig, ParallelConfig, SpConfig
from opensora_dist.core.types import Thw
from opensora_dist.parallel.sequence.layout import scheme_problems
from opensora_dist.parallel.sequence.predict import SampleCost
from opensora_dist.plan.memory import MemoryCase, estimate
from opensora_dist.plan.moment import MemoryEstimate
from opensora_dist.plan.time import Machine, StepTime, step_time

_SCHEMES = ("dsp", "ulysses", "fastseq", "ring", "usp")
_RECOMPUTE: tuple[Literal["none", "selective", "full"], ...] = ("none", "selective", "full")
_STAGES: tuple[Literal[0, 1, 2, 3], ...] = (0, 1, 2, 3)
_OFFLOADS: tuple[Literal["none", "optimizer", "all"], ...] = ("none", "optimizer", "all")
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
        kernels: ``run.kernels``.
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
    kernels: Literal["torch", "triton"] = "torch"

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
        words = [
            f"parallel.{name}={getattr(p, name)}" for name in ("tp", "dp_replicate") if getattr(p, name) != getattr(base, name)
        ]
        words += [f"parallel.sp.degree={sp.degree}"]
        words += [f"parallel.sp.scheme={sp.scheme}"] if sp.degree > 1 or sp.scheme != base.sp.scheme else []
        words += [f"parallel.sp.ulysses={_yaml(sp.ulysses)}"] if sp.ulysses != base.sp.ulysses else []
        words += [
            f"parallel.zero.stage={p.zero.stage}",
            f"parallel.grad_accum={p.grad_accum}",
            f"parallel.recompute={p.recompute}",
        ]
        words += [f"parallel.zero.offload={p.zero.offload}"] if p.zero.offload != base.zero.offload else []
        for name in ("offload_activations", "tile_tokens"):
            if getattr(p, name) != getattr(base, name):
                words.append(f"parallel.{name}={_yaml(getattr(p, name))}")
        return " ".join(words)


@dataclass(frozen=True, kw_only=True)
class Search:
    """
    Args:
        layouts: Those that run, fastest first, then the others, by what they need.
        needless: How many more there are, which only save memory over a layout that runs, and would take at least as long as that one even
            if they ran a step in one micro-batch.
    """

    layouts: tuple[Layout, ...]
    needless: int


def limit_bytes(machine: Machine) -> int:
    """Of a GPU's memory, what a layout may need."""
    return int(machine.gpu.memory_bytes * (1 - _RESERVED))


def layouts(run: Run, machine: Machine) -> Search:
    """All of them but those of which it is known beforehand that another is faster: ``Search.needless``."""
    found: list[Layout] = []
    needless = 0
    for mesh in _meshes(run, machine):
        for recompute in _RECOMPUTE:
            plain, *saving = _saving(mesh.model_copy(update={"recompute": recompute}))
            found.append(judged(run, plain, machine))
            worth = [parallel for parallel in saving if _may_be_faster(run, parallel, machine, than=found[-1])]
            needless += len(saving) - len(worth)
            found += [judged(run, parallel, machine) for parallel in worth]
    found.sort(key=lambda layout: (layout.problem is not None, _time(layout), _need(layout)))
    return Search(layouts=tuple(found), needless=needless)


def _may_be_faster(run: Run, parallel: ParallelConfig, machine: Machine, *, than: Layout) -> bool:
    """Whether what saves memory may save time, too: by a larger micro-batch, after which weights travel less often."""
    if than.step is None:
        return True
    if than.parallel.grad_accum == 1:
        return False
    case = _case(run, parallel.model_copy(update={"grad_accum": 1}), machine, than.micro_batch * than.parallel.grad_accum)
    return step_time(case, run.cost, machine).total_s < than.step.total_s


def judged(run: Run, parallel: ParallelConfig, machine: Machine) -> Layout:
    """A layout with the largest micro-batch that fits; or, where none does, with what a single sample needs."""
    sp = parallel.sp
    broken = scheme_problems(sp, run.grid, heads=run.model.shape.heads, joint=run.model.name != "stdit")
    broken += [problem.message for problem in mesh_problems(parallel, run.model, world=machine.gpus)]
    samples, left = divmod(run.global_batch * sp.degree * parallel.tp, machine.gpus)
    if left:
        groups = machine.gpus / (sp.degree * parallel.tp)
        broken.append(
            f"data.global_batch={run.global_batch} doesn't part over the {groups:g} groups of ranks that see other samples"
        )
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
    if p.zero.offload == "none":
        changes.append(("offloaded optimizer", p.model_copy(update={"zero": p.zero.model_copy(update={"offload": "optimizer"})})))
    for name, parallel in changes:
        yield name, judged(run, parallel, machine)


def _meshes(run: Run, machine: Machine) -> Iterator[ParallelConfig]:
    """Degrees of parallelism and ZeRO stages. What no run can have is left out; what this one can't is judged, and said."""
    for sp, tp, copies in product(_sequences(run, machine), _tensors(run, machine), _copies(machine)):
        if machine.gpus % (sp.degree * tp * copies) == 0:
            for stage in _STAGES if tp == copies == 1 else _STAGES[1:]:
                zero = run.parallel.zero.model_copy(update={"stage": stage, "offload": "none"})
                yield run.parallel.model_copy(update={"sp": sp, "tp": tp, "dp_replicate": copies, "zero": zero})


def memory_levers(parallel: ParallelConfig) -> Iterator[ParallelConfig]:
    """A layout of ranks under every ZeRO stage, recomputation, and what saves memory."""
    for stage, recompute in product(_STAGES, _RECOMPUTE):
        zero = parallel.zero.model_copy(update={"stage": stage})
        yield from _saving(parallel.model_copy(update={"zero": zero, "recompute": recompute}))


def _saving(parallel: ParallelConfig) -> Iterator[ParallelConfig]:
    """A layout without, and then with, what saves memory, gives the same step and makes nothing faster."""
    for tile, activations, offload in product((None, _TILE_TOKENS), (False, True), _OFFLOADS):
        if offload != "all" or parallel.zero.stage > 0:
            zero = parallel.zero.model_copy(update={"offload": offload})
            yield parallel.model_copy(update={"tile_tokens": tile, "offload_activations": activations, "zero": zero})


def _tensors(run: Run, machine: Machine) -> list[int]:
    """Ranks of ``tp`` talk most: they share a node."""
    return [tp for tp in (1, 2, 4, 8) if tp <= machine.per_node and machine.gpus % tp == 0 and run.model.shape.heads % tp == 0]


def _copies(machine: Machine) -> list[int]:
    """Shards over all, or over the GPUs of a node, of which the others then hold copies."""
    return sorted({1, machine.gpus // machine.per_node})


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
        kernels=run.kernels,
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
