"""Every ZeRO backend trains as one process does with torch's own AdamW, whatever it shards, offloads or accumulates."""

from __future__ import annotations

import itertools
import math

import pytest
import zero_cases
from zero_cases import Case


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
# Each value of each field is in a fast case, of native but what tests/dist/test_trajectory.py has not; all run in make test-all.
FAST = [
    *(Case(backend="deepspeed", stage=stage, accum=2) for stage in range(4)),
    Case(backend="deepspeed", stage=2, accum=2, dtype="bfloat16"),
    Case(backend="deepspeed", stage=2, accum=2, offload="optimizer"),
    Case(backend="deepspeed", stage=3, accum=2, offload="all"),
    Case(backend="deepspeed", stage=3, accum=2, world=4, sp=2),
    Case(backend="deepspeed", stage=3, world=1),
    *(Case(backend="native", stage=stage, accum=2, dtype="float64") for stage in (0, 3)),
    Case(backend="native", stage=3, accum=2, dtype="bfloat16"),
    Case(backend="native", stage=3, accum=2, offload="all"),
]
ALL = [*GRID, *DOUBLE, *SHARED, *ONE_RANK]
assert set(FAST) <= set(ALL)
EACH = [
    Case(backend=backend, stage=stage, offload=offload)
    for backend, stage in itertools.product(("native", "deepspeed"), range(4))
    for offload in _offloads(backend, stage)
]
# Stage 1 is stage 2 but for what it sends.
FAST_EACH = [
    *(c for c in EACH if c.offload == "none" and c.stage != 1),
    Case(backend="native", stage=3, offload="optimizer"),
    Case(backend="deepspeed", stage=3, offload="all"),
]


def _marked(cases, *, fast):
    return [pytest.param(c, id=str(c), marks=() if c in fast else pytest.mark.slow) for c in cases]


@pytest.fixture(scope="module")
def plain():
    """The training that all others are compared with."""
    return {dtype: zero_cases.plain(dtype) for dtype in ("float32", "bfloat16", "float64")}


@pytest.fixture(scope="module")
def gradient():
    """Of the first step, unsharded in float32: its norm, and the first moment."""
    return zero_cases.plain_gradient()


@pytest.mark.parametrize("case", _marked(ALL, fast=FAST))
def test_training_is_that_of_plain_adamw_in_one_process(ranks, plain, case):
    for found in ranks.run(zero_cases.trajectory, case, world=case.world):
        assert found["steps"] == zero_cases.STEPS
        zero_cases.assert_trains_alike(found, plain, dtype=case.dtype)


SUMS = [
    Case(backend=backend, stage=stage, dtype=dtype, accum=2, world=3)
    for backend, stage, dtype in itertools.product(("native", "deepspeed"), range(4), ("float32", "bfloat16"))
]


@pytest.mark.parametrize("case", _marked(SUMS, fast=[c for c in SUMS if c.dtype == "bfloat16" or c.stage == 3]))
def test_gradients_of_three_ranks_and_two_micro_batches_are_summed(ranks, gradient, case):
    for found in ranks.run(zero_cases.first_gradient, case, world=case.world):
        zero_cases.assert_same_gradient(found, gradient, dtype=case.dtype)


@pytest.mark.parametrize("case", _marked(EACH, fast=FAST_EACH))
def test_a_gradient_that_is_not_finite_on_one_rank_is_skipped_by_all(ranks, case):
    for found in ranks.run(zero_cases.skips, case, world=case.world):
        assert not math.isfinite(found["norm"]) and found["skipped"] == 1.0
        assert found["steps"] == (1, 1)
        assert found["changed"] == []
        assert found["next_skipped"] == 0.0 and all(map(math.isfinite, found["next"]))
        assert all(t.isfinite().all() for t in found["model"].values())


@pytest.mark.parametrize("case", _marked(EACH, fast=FAST_EACH))
def test_inference_uses_the_weights_it_is_given_and_puts_the_live_ones_back_bitwise(ranks, case):
    for found in ranks.run(zero_cases.inference, case, world=case.world):
        assert found["live"] == pytest.approx(zero_cases.error_of(found["model"], "float32"), rel=1e-5)
        assert found["averaged"] == pytest.approx(zero_cases.error_of({**found["model"], **found["ema"]}, "float32"), rel=1e-5)
        assert found["averaged"] != found["live"]
        assert found["again"] == found["live"], "the block that raised left something behind"
        assert not found["moved"]


def test_fragments_in_cpu_memory_stay_there_whatever_the_mesh(ranks):
    for rank, (piece, rows, back) in enumerate(ranks.run(zero_cases.offloaded_fragments, world=2)):
        assert rows.device.type == "cpu" and rows.flatten().tolist() == ([*range(6)], [*range(6, 10)])[rank]
        assert back.tolist() == piece.tolist()


def _reduced(counts):
    return sum(bytes_ for name, bytes_ in counts.items() if "reduce" in name)


@pytest.mark.parametrize("backend, stage", list(itertools.product(("native", "deepspeed"), range(4))))
def test_gradients_are_sent_with_the_last_micro_batch_alone_unless_each_rank_keeps_but_its_share(ranks, backend, stage):
    case = Case(backend=backend, stage=stage, accum=2, prefetch=0)
    # Of two ranks, one sends half in a reduce-scatter, and all of it in an all-reduce.
    whole = stage == 0 or (backend == "deepspeed" and stage < 3)
    for found in ranks.run(zero_cases.sent, case, world=2):
        once = found["bytes"] if whole else found["bytes"] // 2
        first, last = map(_reduced, found["micros"])
        assert first == (0 if stage < 2 else pytest.approx(once, rel=0.03))
        assert last == pytest.approx(once, rel=0.03)
        # A norm is a number or two; weights are gathered once, after the step or before the first micro-batch that uses them.
        assert _reduced(found["step"]) <= 32
        gathered = sum(n for counts in (*found["micros"], found["step"]) for name, n in counts.items() if "gather" in name)
        assert gathered == pytest.approx(
            {0: 0, 3: _gathers(backend) * found["bytes"] / 2}.get(stage, found["bytes"] / 2), rel=0.1
        )


def _gathers(backend):
    """How often two micro-batches gather a weight in stage 3: for each forward and each backward. FSDP keeps what is in no block."""
    return 4 if backend == "deepspeed" else 3.2
