"""The formulas of memory against real steps on two and four ranks: the most that was there at once, followed storage by storage."""

from __future__ import annotations

import itertools

import pytest

from opensora_dist.config.train import ModelConfig, ParallelConfig, SpConfig, ZeroConfig
from opensora_dist.core.types import Thw
from opensora_dist.models.init import init_weights
from opensora_dist.parallel.keys import Keys
from opensora_dist.plan.memory import MemoryCase, estimate
from opensora_dist.recipes.bench.scale import real_step

TOLERANCE = 0.10


def _case(
    world, stage, dtype="float32", *, sp=1, scheme=None, accum=1, name="stdit", latent=(4, 16, 16), offload="none", **parallel
):
    scheme = scheme or ("dsp" if name == "stdit" else "ring")
    return MemoryCase(
        model=ModelConfig(name=name, depth=4, width=96, heads=4),
        parallel=ParallelConfig(
            grad_accum=accum,
            sp=SpConfig(degree=sp, scheme=scheme),
            zero=ZeroConfig(stage=stage, offload=offload),
            **parallel,
        ),
        world=world,
        latent=Thw(*latent),
        dtype=dtype,
        text_width=64,
        text_tokens=8,
        max_tokens=8,
    )


STAGES = [_case(2, stage, dtype) for stage, dtype in itertools.product((0, 1, 2, 3), ("float32", "bfloat16")) if stage != 1]
RECOMPUTED = [_case(2, stage, recompute=how, sp=2) for stage, how in ((0, "full"), (2, "selective"), (3, "full"))]
LEVERS = [
    _case(2, 0, tile_tokens=64),
    _case(2, 2, recompute="full", tile_tokens=64),
    _case(2, 2, offload_activations=True, latent=(16, 16, 16)),
    _case(2, 0, offload="optimizer"),
    _case(2, 2, offload="optimizer"),
    _case(2, 3, offload="all"),
    _case(2, 2, tp=2),
    _case(2, 3, tp=2, recompute="full"),
    _case(2, 2, name="dit", sp=2, scheme="ulysses"),
    _case(2, 2, name="dit", sp=2, scheme="fastseq"),
    _case(2, 3, "bfloat16", name="dit", sp=2, scheme="ulysses", recompute="full"),
]
ACCUMULATED = [_case(2, stage, accum=2) for stage in (0, 1, 2, 3)]  # stage 1 differs from 2 here only
HYBRID = [
    _case(4, 3, "bfloat16", sp=2, recompute="full"),
    _case(4, 2, sp=2, dp_replicate=2),
    _case(4, 1, "bfloat16", accum=2, recompute="selective"),
    _case(4, 3, name="dit", sp=2),
    _case(4, 3, "float64"),
]


def _peaks(cases):
    return [real_step(case, init=lambda model: init_weights(model, Keys(0))).peak for case in cases]


@pytest.mark.parametrize(
    "cases",
    [
        pytest.param(c, id=n)
        for n, c in (("stages", STAGES), ("recompute", RECOMPUTED), ("levers", LEVERS), ("accumulation", ACCUMULATED))
    ],
)
def test_formulas_agree_with_two_real_ranks(ranks, cases):
    _agree(cases, ranks.run(_peaks, cases, world=2))


def test_formulas_agree_with_four_real_ranks(ranks):
    _agree(HYBRID, ranks.run(_peaks, HYBRID, world=4))


def _agree(cases, peaks):
    wrong = {}
    for case, *of_ranks in zip(cases, *peaks, strict=True):
        formula, most = estimate(case), max(of_ranks)
        if abs(formula.total / most - 1) > TOLERANCE:
            wrong[str(case)] = f"{formula.total / most - 1:+.1%} of {most:,} bytes at: {formula}"
    assert not wrong, wrong
