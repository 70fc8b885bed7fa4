"""Mixed precision: what is computed in bfloat16, what is kept in float32, and that no layout changes the training."""

from __future__ import annotations

import itertools
from unittest import mock

import pytest
import torch
from dataset_factory import write_dataset
from training import SAMPLES, losses, metrics, overrides, tensors, train_here

from opensora_dist.models.base import VideoTransformer

STEPS = 5
LAYOUTS = [(stage, accum) for stage in (0, 2, 3) for accum in (1, 2)]
# bfloat16 rounds to 2^-9 = 2e-3 of a value; a loss sums thousands of squared errors, so most of that averages out. Gradients are
# products of more such factors.
LOSS_RTOL = 1e-2
NORM_RTOL = 5e-2
# AdamW's first steps are the sign of the gradient, and rounding turns the sign of small ones, of a whole column of the timestep embedding
# at once: its steps would be other ones by 2 lr, though gradients agree within 1%. With this, a small gradient makes a small step.
EPS = 1e-3


def _normal(self, name, tensor, generator):
    tensor.normal_(std=0.2, generator=generator)


def _random_start():
    """No parameter starts at zero, where bfloat16 would have nothing to round."""
    return mock.patch.object(VideoTransformer, "init_parameter", _normal)


def _train(ranks, data, run_dir, *, dtype, world, stage=0, accum=1, more=()):
    layout = [f"parallel.zero.stage={stage}", f"parallel.grad_accum={accum}", *more]
    given = overrides(data, run_dir, f"run.steps={STEPS}", f"run.dtype={dtype}", "optim.lr=1e-2", f"optim.eps={EPS}", *layout)
    ranks.run(train_here, given, _random_start, world=world)
    return losses(run_dir), [m["grad_norm"] for m in metrics(run_dir)], tensors(run_dir)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    path = tmp_path_factory.mktemp("bfloat16") / "data"
    write_dataset(path, samples=SAMPLES)
    return path


@pytest.fixture(scope="module")
def in_float32(ranks, data):
    return _train(ranks, data, data.with_name("float32"), dtype="float32", world=1)


@pytest.mark.parametrize("world, layout", list(itertools.product((1, 2), LAYOUTS)), ids=str)
def test_bfloat16_trains_as_float32_does_and_keeps_all_state_in_float32(ranks, data, in_float32, world, layout, tmp_path):
    stage, accum = layout
    found = _train(ranks, data, tmp_path, dtype="bfloat16", world=world, stage=stage, accum=accum)
    _assert_alike(found, in_float32)


@pytest.mark.parametrize("scheme, stage", [("dsp", 0), ("dsp", 3), ("ulysses", 3), ("fastseq", 3), ("ring", 3)])
def test_ranks_that_share_samples_train_in_bfloat16_as_one_does_in_float32(ranks, data, in_float32, scheme, stage, tmp_path):
    shared = ["parallel.sp.degree=2", f"parallel.sp.scheme={scheme}"]
    found = _train(ranks, data, tmp_path, dtype="bfloat16", world=2, stage=stage, more=shared)
    _assert_alike(found, in_float32)


def _assert_alike(result, wanted_result):
    found, norms, state = result
    wanted, wanted_norms, wanted_state = wanted_result
    assert state.keys() == wanted_state.keys()
    assert {name.partition(".")[0] for name in state} == {"model", "ema", "exp_avg", "exp_avg_sq"}
    assert {tensor.dtype for tensor in state.values()} == {torch.float32}
    assert all(one != other for one, other in zip(found, wanted, strict=True)), "nothing was computed in bfloat16"
    torch.testing.assert_close(found, wanted, rtol=LOSS_RTOL, atol=0)
    torch.testing.assert_close(norms, wanted_norms, rtol=NORM_RTOL, atol=0)
