"""Colossal-AI trains as unsharded AdamW does, and its checkpoints are everyone's. On gloo, with the stubs of ``cpu_stubs``."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
import zero_cases
from cpu_stubs import stub_cuda
from zero_cases import Case, Run

from opensora_dist.checkpoint.store import load_tensors, save_tensors

# Stages 1 and 2 are LowLevelZero, 3 is Gemini, which has no float32.
STAGES = [(stage, dtype) for stage in (1, 2, 3) for dtype in ("float32", "bfloat16") if (stage, dtype) != (3, "float32")]
GRID = [Case(backend="colossalai", stage=stage, dtype=dtype, accum=accum) for stage, dtype in STAGES for accum in (1, 2)]
OFFLOADED = [Case(backend="colossalai", stage=stage, accum=2, offload="optimizer") for stage in (1, 2)]
SHARED = [Case(backend="colossalai", stage=stage, accum=2, world=4, sp=2) for stage in (1, 2)]
EACH = [Case(backend="colossalai", stage=stage, dtype=dtype) for stage, dtype in STAGES]


def _stubbed(function, *args):
    """Runs inside a rank."""
    stub_cuda()
    return function(*args)


@pytest.fixture(scope="module")
def plain():
    return {dtype: zero_cases.plain(dtype) for dtype in ("float32", "bfloat16", "float64")}


@pytest.mark.parametrize("case", [*GRID, *OFFLOADED, *SHARED], ids=str)
def test_training_is_that_of_plain_adamw_in_one_process(ranks, plain, case):
    for found in ranks.run(_stubbed, zero_cases.trajectory, case, world=case.world):
        assert found["steps"] == zero_cases.STEPS
        zero_cases.assert_trains_alike(found, plain, dtype=case.dtype)


@pytest.mark.parametrize("case", EACH, ids=str)
def test_a_gradient_that_is_not_finite_on_one_rank_is_skipped_by_all(ranks, case):
    for found in ranks.run(_stubbed, zero_cases.skips, case, world=case.world):
        assert not math.isfinite(found["norm"]) and found["skipped"] == 1.0
        assert found["changed"] == [] and found["steps"] == (1, 1)
        assert found["next_skipped"] == 0.0 and all(map(math.isfinite, found["next"]))


@pytest.mark.parametrize("case", EACH, ids=str)
def test_inference_uses_the_weights_it_is_given_and_puts_the_live_ones_back_bitwise(ranks, case):
    wanted = pytest.approx if case.dtype == "float32" else lambda value, rel: pytest.approx(value, rel=1e-2)
    for found in ranks.run(_stubbed, zero_cases.inference, case, world=case.world):
        assert found["live"] == wanted(zero_cases.error_of(found["model"], "float32"), rel=1e-5)
        assert found["averaged"] == wanted(zero_cases.error_of({**found["model"], **found["ema"]}, "float32"), rel=1e-5)
        assert found["averaged"] != found["live"]
        assert found["again"] == found["live"], "the block that raised left something behind"
        assert not found["moved"] and all(map(math.isfinite, found["next"]))


@pytest.mark.parametrize("stage, dtype", STAGES)
def test_gradients_of_three_ranks_and_two_micro_batches_are_summed(ranks, stage, dtype):
    """Three, since dividing by two and doubling is exact, and no parameter has a multiple of three elements only."""
    wanted = zero_cases.plain_gradient()
    case = Case(backend="colossalai", stage=stage, dtype=dtype, accum=2, world=3)
    for found in ranks.run(_stubbed, zero_cases.first_gradient, case, world=3):
        zero_cases.assert_same_gradient(found, wanted, dtype=dtype)


def _described(case):
    run = Run(case)
    return {name: (tuple(t.shape), t.dtype) for name, t in run.backend.state_dict(ema=run.ema.shadow).items()}


@pytest.mark.parametrize("case", EACH, ids=str)
def test_its_state_has_the_names_shapes_and_dtypes_of_native(ranks, case):
    native = Case(backend="native", stage=0, dtype=case.dtype)
    (wanted, *_), found = (ranks.run(_stubbed, _described, each, world=2) for each in (native, case))
    assert found == [wanted, wanted]


def _written(case, folder):
    """Three steps, a checkpoint, and one step more."""
    run = Run(case)
    for step in range(3):
        run.step(step)
    save_tensors(run.backend.state_dict(ema=run.ema.shadow), Path(folder))
    return run.state(), run.step(3)


def _read(case, folder):
    """The checkpoint, as it lies in a new backend, and the step after it."""
    run = Run(case)
    state = run.backend.state_dict(ema=run.ema.shadow)
    load_tensors(state, Path(folder))
    run.backend.load_state_dict(state, ema=run.ema.shadow, steps=3)
    return run.state(), run.backend.optimizer_steps(), run.step(3)


def _pairs():
    for stage, dtype in STAGES:
        theirs = Case(backend="colossalai", stage=stage, dtype=dtype)
        ours = Case(backend="native", stage=stage, dtype=dtype)
        yield theirs, ours
        yield ours, theirs
        yield theirs, theirs


@pytest.mark.parametrize("writer, reader", list(_pairs()), ids=str)
def test_a_checkpoint_goes_from_one_backend_to_the_other(ranks, tmp_path, writer, reader):
    folder = str(tmp_path / "tensors")
    written = ranks.run(_stubbed, _written, writer, folder, world=2)
    read = ranks.run(_stubbed, _read, reader, folder, world=2)
    for (saved, after), (loaded, steps, next_step) in zip(written, read):
        assert saved.keys() == loaded.keys() and steps == 3
        differ = [name for name in saved if not torch.equal(saved[name], loaded[name])]
        assert not differ, differ
        exact = writer == reader
        assert next_step == (after if exact else pytest.approx(after, rel=1e-5 if writer.dtype == "float32" else 2e-3))
