"""Every ZeRO backend trains as one process does with torch's own AdamW, whatever it shards, offloads or accumulates."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
import zero_cases
from zero_cases import Case

TOLERANCE = {"float32": 1e-5, "float64": 1e-10}
# Rounding to bfloat16 moves a training; where it is sharded, by about as much as in one process.
BFLOAT16_RATIO = (0.3, 2.0)


def _offloads(backend, stage):
    if backend == "deepspeed":
        return ("none",) if stage == 0 else ("none", "optimizer") if stage < 3 else ("none", "optimizer", "all")
    return ("none", "optimizer") if stage == 0 else ("none", "optimizer", "all")


GRID = [
    Case(backend=backend, stage=stage, dtype=dtype, accum=accum, offload=offload)
    for backend, stage in itertools.product(("native", "deepspeed"), range(4))
    for offload in _offloads(backend, stage)
    for dtype, accum in itertools.product(("float32", "bfloat16"), (1, 2))
]
DOUBLE = [
    Case(backend="native", stage=stage, dtype="float64", accum=accum) for stage, accum in itertools.product(range(4), (1, 2))
]
SHARED = [
    Case(backend=backend, stage=stage, dtype=dtype, accum=2, world=4, sp=2)
    for backend, stage, dtype in itertools.product(("native", "deepspeed"), range(4), ("float32", "bfloat16"))
]
ONE_RANK = [
    Case(backend=backend, stage=stage, world=1) for backend, stage in itertools.product(("native", "deepspeed"), (0, 2, 3))
]
# Each value of each field is in a fast case; all combinations run in make test-all.
FAST = [
    *(c for c in GRID if c.backend == "deepspeed" and c.accum == 2 and c.offload == "none"),
    *(c for c in GRID if c.offload != "none" and c.stage in (2, 3) and c.dtype == "float32" and c.accum == 2),
    *(c for c in GRID if c.backend == "native" and c.accum == 2 and c.dtype == "bfloat16" and c.offload == "none"),
    *(c for c in DOUBLE if c.accum == 2),
    *(c for c in SHARED if c.dtype == "float32" and c.stage in (0, 2, 3)),
    *(c for c in ONE_RANK if c.backend == "deepspeed"),
]
ALL = [pytest.param(c, id=str(c), marks=() if c in FAST else pytest.mark.slow) for c in [*GRID, *DOUBLE, *SHARED, *ONE_RANK]]
STAGES = [Case(backend=backend, stage=stage) for backend, stage in itertools.product(("native", "deepspeed"), range(4))]
OFFLOADED = [
    Case(backend=backend, stage=stage, offload=offload)
    for backend, stage in itertools.product(("native", "deepspeed"), range(4))
    for offload in _offloads(backend, stage)[1:]
]
EACH = [
    *(pytest.param(case, id=str(case)) for case in STAGES),
    *(pytest.param(case, id=str(case), marks=() if case.stage == 3 else pytest.mark.slow) for case in OFFLOADED),
]


@pytest.fixture(scope="module")
def plain():
    """The training that all others are compared with."""
    return {dtype: zero_cases.plain(dtype) for dtype in ("float32", "bfloat16", "float64")}


def _moved(found, start):
    """How far all weights went, as one vector."""
    return torch.cat([(t.double() - start[name].double()).flatten() for name, t in found["model"].items() if name in start])


def _distances(found, wanted, start):
    """How far a training is from another, by what is compared."""
    moments = {
        kind: torch.cat([(found[kind][n].double() - t.double()).flatten() for n, t in wanted[kind].items()]).norm().item()
        for kind in ("exp_avg", "exp_avg_sq", "ema")
    }
    return {
        "losses": math.dist(found["losses"], wanted["losses"]),
        "norms": math.dist(found["norms"], wanted["norms"]),
        "weights": (_moved(found, start) - _moved(wanted, start)).norm().item(),
        **moments,
    }


@pytest.mark.parametrize("case", ALL)
def test_training_is_that_of_plain_adamw_in_one_process(ranks, plain, case):
    for found in ranks.run(zero_cases.trajectory, case, world=case.world):
        assert found["steps"] == zero_cases.STEPS
        if case.dtype == "bfloat16":
            _assert_rounded_alike(found, plain)
            continue
        wanted, tolerance = plain[case.dtype], TOLERANCE[case.dtype]
        for what in ("losses", "norms", *zero_cases.KINDS):
            torch.testing.assert_close(found[what], wanted[what], rtol=tolerance, atol=tolerance)


def _assert_rounded_alike(found, plain):
    """As far from float32 as one process in bfloat16 is, no more and not much less: less would be another precision."""
    assert all(t.dtype == torch.float32 for kind in zero_cases.KINDS for t in found[kind].values())
    start = plain["float32"]["start"]
    one, here = (_distances(run, plain["float32"], start) for run in (plain["bfloat16"], found))
    low, high = BFLOAT16_RATIO
    ratios = {what: here[what] / one[what] for what in one}
    assert all(low < ratio < high for ratio in ratios.values()), ratios


@pytest.mark.parametrize("case", EACH)
def test_state_has_the_names_and_shapes_of_the_plain_model(ranks, plain, case):
    wanted = plain["float32"]
    for found in ranks.run(zero_cases.trajectory, case, 1, world=case.world):
        for kind in zero_cases.KINDS:
            assert {n: t.shape for n, t in found[kind].items()} == {n: t.shape for n, t in wanted[kind].items()}


@pytest.mark.parametrize("stage", range(4))
@pytest.mark.parametrize("backend", ["native", "deepspeed"])
def test_gradients_of_three_ranks_are_summed(ranks, backend, stage):
    one, wanted = ranks.run(zero_cases.first_gradient, Case(backend="native", stage=0, world=1), world=1)[0]
    for norm, found in ranks.run(zero_cases.first_gradient, Case(backend=backend, stage=stage, world=3), world=3):
        assert norm == pytest.approx(one, rel=1e-5)
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("case", EACH)
def test_a_gradient_that_is_not_finite_on_one_rank_is_skipped_by_all(ranks, case):
    for found in ranks.run(zero_cases.skips, case, world=case.world):
        assert not math.isfinite(found["norm"]) and found["skipped"] == 1.0
        assert found["steps"] == (1, 1)
        # The average still moves: towards weights that did not.
        assert not [name for name in found["changed"] if not name.startswith("ema.")]
        assert found["next_skipped"] == 0.0 and all(map(math.isfinite, found["next"]))
        assert all(t.isfinite().all() for t in found["model"].values())


@pytest.mark.parametrize("case", EACH)
def test_inference_uses_the_weights_it_is_given_and_puts_the_live_ones_back_bitwise(ranks, case):
    for found in ranks.run(zero_cases.inference, case, world=case.world):
        assert found["live"] == pytest.approx(zero_cases.error_of(found["model"], "float32"), rel=1e-5)
        assert found["averaged"] == pytest.approx(zero_cases.error_of({**found["model"], **found["ema"]}, "float32"), rel=1e-5)
        assert found["averaged"] != found["live"]
        assert found["again"] == found["live"], "the block that raised left something behind"
        assert not found["moved"]
