"""The share of a peak that steps reach, from steps that were timed: solved from a plan's own formula, so that it gives their times."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache

from opensora_dist.config.train import TrainConfig
from opensora_dist.core.types import Thw
from opensora_dist.parallel.sequence.predict import SampleCost
from opensora_dist.plan.hardware import gpu_for_device
from opensora_dist.plan.measured import TimedStep
from opensora_dist.plan.memory import MemoryCase
from opensora_dist.plan.time import Machine, step_time
from opensora_dist.recipes.auto import sample_cost
from opensora_dist.recipes.bench.step_forms import form_of
from opensora_dist.recipes.bench.training import meta_model

_LEAST, _MOST, _HALVINGS = 1e-4, 1.0, 24


@lru_cache(maxsize=64)
def cost_of(case: MemoryCase) -> SampleCost:
    """Of a sample of a case, as it was timed."""
    model = meta_model(case)
    return sample_cost(model, model.token_grid(case.latent), text_tokens=case.text_tokens)


def use_of(timed: TimedStep, machine: Machine, *, ratio: float = 1.0) -> float | None:
    """``Machine.use`` with which a plan gives the step's time; None where no share of the peak does.

    Args:
        ratio: ``attention_use`` over ``use``.
    """
    cost = cost_of(timed.case)

    def takes(use: float) -> float:
        return step_time(timed.case, cost, replace(machine, use=use, attention_use=ratio * use)).total_s

    if not takes(_MOST) <= timed.step_s <= takes(_LEAST):
        return None
    slow, fast = _LEAST, _MOST
    for _ in range(_HALVINGS):
        middle = math.sqrt(slow * fast)
        slow, fast = (middle, fast) if takes(middle) > timed.step_s else (slow, middle)
    return fast


def nearest_use(
    found: Sequence[TimedStep], *, config: TrainConfig, latent: Thw, machine: Machine
) -> tuple[float, TimedStep] | None:
    """The use that the step nearest to a run reached, and that step; None where none of this kind of GPU was timed.

    Nearest: the same dtype is a must; then how it is computed, then the model, then width and tokens of a sample, then recomputation.
    """
    form = form_of(config.run.kernels, config.run.compile)

    def distance(timed: TimedStep) -> tuple[bool, bool, float, bool]:
        case = timed.case
        width = abs(math.log(case.model.shape.width / config.model.shape.width))
        tokens = abs(math.log(case.latent.volume / latent.volume))
        other = case.parallel.recompute != config.parallel.recompute
        return timed.form != form, case.model.name != config.model.name, width + tokens, other

    alike = [t for t in found if t.cuda and gpu_for_device(t.device) == machine.gpu and t.case.dtype == config.run.dtype]
    for timed in sorted(alike, key=distance):
        world = timed.case.world
        use = use_of(timed, replace(machine, gpus=world, per_node=min(machine.per_node, world), attention_use=None))
        if use is not None:
            return use, timed
    return None


def attention_ratio_of(first: TimedStep, second: TimedStep, machine: Machine) -> tuple[float | None, float]:
    """``use``, and ``attention_use`` over it, with which a plan gives the times of two steps, of which the second attends more."""
    low, high = _LEAST, 1 / _LEAST
    cost = cost_of(second.case)
    use: float | None = None
    for _ in range(_HALVINGS):
        ratio = math.sqrt(low * high)
        use = use_of(first, machine, ratio=ratio)
        if use is None:  # attention alone would take longer than the first step
            low = ratio
            continue
        took = step_time(second.case, cost, replace(machine, use=use, attention_use=ratio * use)).total_s
        low, high = (ratio, high) if took > second.step_s else (low, ratio)
    return use, math.sqrt(low * high)
