"""Times whole training steps: several forms of computing the same one, and several cases beside each other, that take turns.

Each form is held to the first one's loss and gradient norm before it is timed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial

import torch
import torch.distributed as dist

from opensora_dist.core.errors import ConfigError, OpensoraError
from opensora_dist.ops.choice import current
from opensora_dist.plan.memory import MemoryCase, estimate
from opensora_dist.recipes.bench.kinds import KindTimes, profiled
from opensora_dist.recipes.bench.memory import Peak, peak_memory
from opensora_dist.recipes.bench.rounds import of_all_ranks, take_turns, timed
from opensora_dist.recipes.bench.sequence import TOLERANCES
from opensora_dist.recipes.bench.step_forms import FORMS, case_of_form
from opensora_dist.recipes.bench.training import Training


@dataclass(frozen=True, kw_only=True)
class StepOptions:
    """How to measure.

    Args:
        forms: Names of ``FORMS``; the first is what the others are compared with.
        rounds: Passes of each form that count.
        warmup: Passes of each form before them.
        steps: Steps of a pass. Between them nothing waits for the device, as in training; a pass's time is that of one step.
        dollars_per_gpu_hour: What a rank's device costs; None leaves dollars out.
    """

    forms: tuple[str, ...] = ("eager",)
    rounds: int = 5
    warmup: int = 2
    steps: int = 3
    dollars_per_gpu_hour: float | None = None


@dataclass(frozen=True, kw_only=True)
class Variant:
    """A case among those that one run compares.

    Args:
        changed: What tells it from the others, by options of ``bench step``; empty where there are no others.
    """

    case: MemoryCase
    changed: dict[str, str] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """For people."""
        return " ".join(f"{key}={value}" for key, value in self.changed.items())


@dataclass(frozen=True, kw_only=True)
class FormResult:
    """One form of the step, in one of the cases that are compared.

    Args:
        form: Its name.
        variant: The case.
        difference: Of loss and gradient norm from those of the first form of the same weights, relative, the larger one.
        memory_bytes: Most that the rank that held most had on its device in a step: weights, gradients, moments, average, activations.
            None on a CPU for what is compiled, where nobody sees it.
        computed_by: What operators went by, in words.
        first_s: Seconds of the first step, in which what is compiled is compiled; the slowest rank's.
        kinds: Where the time goes in one more step, of this rank.
        seconds: Of a step, by round; the slowest rank's.
        silent: The same without communication, in the same rounds; empty where there is none, or it can't be left out.
    """

    form: str
    variant: Variant
    difference: float
    memory_bytes: int | None
    computed_by: str = ""
    first_s: float | None = None
    kinds: KindTimes | None = None
    seconds: tuple[float, ...] = ()
    silent: tuple[float, ...] = ()

    @property
    def name(self) -> str:
        """For people."""
        return f"{self.form}, {self.variant.name}" if self.variant.changed else self.form

    @property
    def case(self) -> MemoryCase:
        """What was computed, by the kernels of the form."""
        return case_of_form(self.variant.case, self.form)


@dataclass(frozen=True, kw_only=True)
class _Turn:
    """A form of a case. Cases that differ in ``recompute`` alone share a training, and so the weights."""

    form: str
    variant: Variant
    training: Training

    @contextmanager
    def computing(self) -> Iterator[None]:
        with self.training.recomputing(self.variant.case.parallel.recompute), FORMS[self.form](self.training):
            yield

    @property
    def compiled(self) -> bool:
        with self.computing():
            return current().compile != "off"


def silence_problem(case: MemoryCase) -> str | None:
    """Why a step can't be timed without its communication; None where it can."""
    parallel = case.parallel
    if case.world == 1:
        return "one rank sends nothing"
    if parallel.zero.backend != "native":
        return f"{parallel.zero.backend} sends by itself, and has no switch for it"
    if parallel.dp_replicate > 1 or parallel.tp > 1:
        return "sums between copies (dp_replicate) and between ranks of tp have no switch"
    return None


def bench_step(
    variants: Sequence[Variant], *, device: torch.device, options: StepOptions, on_round: Callable[[int], None] | None = None
) -> list[FormResult]:
    """Measures on all ranks of the process group; the same result on each, but for ``kinds``. Collective.

    Args:
        variants: Cases of one world; all forms of the first, then all of the next.
        on_round: Told the rounds done, warm-up included.
    Raises:
        ConfigError: The cases don't fit the device's memory side by side.
        OpensoraError: A form computes something else than the first one.
    """
    _check_memory(variants, device, forms=options.forms)
    turns, results = _examined(variants, device=device, options=options)
    quiet = silence_problem(variants[0].case) is None
    passes = [
        partial(_pass, turn, quiet=q, steps=options.steps) for turn in turns for q in ((False, True) if quiet else (False,))
    ]
    table = take_turns(passes, rounds=options.rounds, warmup=options.warmup, on_round=on_round)
    most, _ = of_all_ranks(table, device=device)
    seconds = iter(most.squeeze(-1).tolist())
    return [replace(r, seconds=tuple(next(seconds)), silent=tuple(next(seconds)) if quiet else ()) for r in results]


def _apart(variant: Variant) -> MemoryCase:
    """What a training is made for, whatever is recomputed in its steps."""
    case = variant.case
    return replace(case, parallel=case.parallel.model_copy(update={"recompute": "none"}))


def _check_memory(variants: Sequence[Variant], device: torch.device, *, forms: Sequence[str]) -> None:
    """One case alone is left to find out: what a compiler keeps is in no formula.

    Raises:
        ConfigError: By formula the trainings of all cases don't fit beside the largest step of one.
    """
    held = {_apart(variant): estimate(variant.case) for variant in variants}
    if device.type != "cuda" or len(held) == 1:
        return
    fixed = [e.parameters + e.optimizer + e.ema for e in held.values()]
    steps = [estimate(case_of_form(variant.case, form)).total for variant in variants for form in forms]
    needed = max(steps) + sum(fixed) - min(fixed)
    there = torch.cuda.get_device_properties(device).total_memory
    if needed > there:
        raise ConfigError(
            f"--compare: the cases need {needed / 2**30:.1f} GiB side by side, by formula, and the GPU has {there / 2**30:.1f}; use "
            "--recompute full or a smaller --batch, or run them one by one"
        )


def _examined(variants: Sequence[Variant], *, device: torch.device, options: StepOptions) -> tuple[list[_Turn], list[FormResult]]:
    """Trainings, all that takes turns on them, and of each how it compares with the first, its memory, where its time goes. Collective."""
    trainings: dict[MemoryCase, Training] = {}
    held: dict[MemoryCase, int] = {}
    firsts: dict[int, _First] = {}
    with peak_memory(device, parked=lambda: sum(t.parked_bytes for t in trainings.values())) as peak:
        for case in dict.fromkeys(_apart(variant) for variant in variants):
            before = peak.now()
            trainings[case] = Training(case, device)
            held[case] = peak.now() - before
        turns = [_Turn(form=form, variant=v, training=trainings[_apart(v)]) for v in variants for form in options.forms]
        for i, turn in enumerate(turns):
            # What follows operators on a CPU keeps torch.compile from compiling, and doesn't see into what it has compiled.
            if device.type == "cuda" or not turn.compiled:
                firsts[i] = _first_steps(turn, peak, others=sum(held.values()) - held[_apart(turn.variant)])
    for i, turn in enumerate(turns):
        if i not in firsts:
            firsts[i] = _first_steps(turn, None, others=0)
    leaders = [next(j for j, other in enumerate(turns) if other.training is turn.training) for turn in turns]
    results = [_result(turn, firsts[i], firsts[leaders[i]], device=device) for i, turn in enumerate(turns)]
    for result, leader in zip(results, leaders, strict=True):
        tolerance = TOLERANCES[result.variant.case.dtype]
        if not result.difference <= tolerance:  # NaN is no number that is small enough
            raise OpensoraError(
                f"{result.name}: loss or gradient norm differ from {results[leader].name}'s by {result.difference:.2g}, relative, more "
                f"than {tolerance:g}; its speed means nothing, so nothing was timed"
            )
    return turns, results


@dataclass(frozen=True, kw_only=True)
class _First:
    """Of a turn's first steps: loss over all ranks and gradient norm, bytes at most (None: not seen), seconds, what operators went by."""

    found: torch.Tensor
    most: int | None
    seconds: float
    computed_by: str


def _first_steps(turn: _Turn, peak: Peak | None, *, others: int) -> _First:
    """Collective.

    Args:
        others: Bytes that other trainings hold meanwhile.
    """
    training = turn.training
    with turn.computing():
        seconds = timed(training.step, device=training.mesh.device)  # buffers that are made once, too
        if peak is not None:
            peak.restart()
        result = training.step()
        most = None if peak is None else peak.most() - others
        computed_by = str(current())
    found = torch.stack([result.loss.double(), result.grad_norm.double() / dist.get_world_size()])
    dist.all_reduce(found)
    return _First(found=found, most=most, seconds=seconds, computed_by=computed_by)


def _result(turn: _Turn, first: _First, leader: _First, *, device: torch.device) -> FormResult:
    """Without times. Collective."""
    differences = ((first.found - leader.found) / leader.found).abs()
    numbers = torch.tensor([first.seconds, float(first.most or 0)], dtype=torch.float64, device=device)
    worst = torch.cat([numbers, differences])
    dist.all_reduce(worst, op=dist.ReduceOp.MAX)
    seconds, most, *different = worst.tolist()
    with turn.computing():
        kinds = profiled(turn.training.step, device=device)
    return FormResult(
        form=turn.form,
        variant=turn.variant,
        difference=max(different),
        memory_bytes=None if first.most is None else int(most),
        computed_by=first.computed_by,
        first_s=seconds,
        kinds=kinds,
    )


def _pass(turn: _Turn, *, quiet: bool, steps: int) -> list[float]:
    training = turn.training

    def run() -> None:
        for _ in range(steps):
            training.step()

    with turn.computing(), training.silenced() if quiet else nullcontext():
        return [timed(run, device=training.mesh.device) / steps]
