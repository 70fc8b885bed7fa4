"""Whole training steps on one GPU: no host sync, one result whoever computes it, and the memory that the formula says."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch

from opensora_dist.config.train import ModelConfig, ParallelConfig
from opensora_dist.core.types import Thw
from opensora_dist.ops.choice import Choice, choose, using
from opensora_dist.plan.memory import MemoryCase, estimate
from opensora_dist.recipes.bench.memory import peak_memory
from opensora_dist.recipes.bench.sequence import TOLERANCES
from opensora_dist.recipes.bench.training import Training

pytestmark = pytest.mark.usefixtures("group")


def case_of(
    *, model: str = "stdit", dtype: str = "bfloat16", width: int = 144, latent: Thw = Thw(4, 8, 8), **parallel: Any
) -> MemoryCase:
    return MemoryCase(
        model=ModelConfig(name=model, depth=3, width=width, heads=2),
        parallel=ParallelConfig(**parallel),
        world=1,
        latent=latent,
        dtype=dtype,
        micro_batch=2,
        text_tokens=20,
        max_tokens=20,
        text_width=64,
    )


@contextmanager
def no_waits(device: torch.device) -> Iterator[None]:
    """torch itself fails where the host would wait. It doesn't see what a library waits for by itself."""
    if device.type == "cuda":
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        if device.type == "cuda":
            torch.cuda.set_sync_debug_mode("default")


def chosen(device: torch.device, *, dtype: str, name: str) -> Choice:
    """As a config asks; on a CPU what it has. Skips what is what another case is, for want of a package."""
    if device.type != "cuda":
        return Choice()
    choice = choose(**({"kernels": "torch"} | CHOICES[name]), device=device, dtype=dtype)
    if name == "the fastest attention" and choice.attention == "sdpa":
        pytest.skip("no flash-attn here for this precision, so that this is torch's attention: install flash-attn")
    return choice


STEPS = {
    "float32": {"dtype": "float32"},
    "bfloat16, two micro-batches": {"grad_accum": 2},
    "zero 1": {"zero": {"stage": 1}},
    "zero 2": {"zero": {"stage": 2}},
    "zero 3": {"zero": {"stage": 3}},
    "selective recompute": {"recompute": "selective"},
    "full recompute, tiles": {"recompute": "full", "tile_tokens": 32},
    "activations in CPU memory": {"offload_activations": True},
    "dit": {"model": "dit"},
}
CHOICES = {
    "torch's": {},
    "our kernels": {"kernels": "triton"},
    "the fastest attention": {"attention": "auto"},
    "compiled": {"compile": "blocks"},
    "ours, compiled": {"kernels": "triton", "attention": "auto", "compile": "blocks"},
    "CUDA graphs": {"compile": "graphs"},
}


@pytest.mark.parametrize("name", STEPS)
def test_the_host_waits_for_nothing_in_a_step(device, name):
    training = Training(case_of(**STEPS[name]), device)
    for _ in range(2):  # what is made once
        training.step()
    with no_waits(device):
        result = training.step()
    assert torch.isfinite(result.loss)


@pytest.mark.parametrize("name", CHOICES)
def test_the_host_waits_for_nothing_whoever_computes(device, name):
    training = Training(case_of(grad_accum=2, zero={"stage": 0}), device)
    with using(chosen(device, dtype="bfloat16", name=name)):
        for _ in range(3):  # CUDA graphs warm up, are recorded, and then replayed
            training.step()
        with no_waits(device):
            result = training.step()
    assert torch.isfinite(result.loss)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", list(CHOICES)[1:])
@pytest.mark.parametrize("model", ["stdit", "dit"])
def test_loss_and_gradient_norm_are_torchs_whoever_computes(device, model, name, dtype):
    training = Training(case_of(model=model, dtype=dtype, grad_accum=2, zero={"stage": 0}), device)
    wanted = training.step()
    with using(chosen(device, dtype=dtype, name=name)):
        for _ in range(4):  # of CUDA graphs the first warm up, are recorded, and the last is replayed; weights stay
            found = training.step()
    for what in ("loss", "grad_norm"):
        ours, theirs = (float(getattr(result, what)) for result in (found, wanted))
        assert theirs > 0 and abs(ours - theirs) <= TOLERANCES[dtype] * theirs, (what, ours, theirs)


@pytest.mark.parametrize(
    "where", [{"offload_activations": True}, {"zero": {"offload": "optimizer"}}, {"zero": {"stage": 3, "offload": "all"}}]
)
def test_what_waits_in_cpu_memory_comes_back_as_it_was(device, where):
    wanted, found = (Training(case_of(dtype="float32", **parallel), device).step() for parallel in ({}, where))
    for what in ("loss", "grad_norm"):
        torch.testing.assert_close(getattr(found, what).cpu(), getattr(wanted, what).cpu(), rtol=1e-5, atol=0)


def test_a_step_that_is_not_finite_moves_nothing_and_nobody_waits_to_know(device):
    training = Training(case_of(dtype="float32"), device)
    for _ in range(2):
        training.step()
    state = [*training.backend.weights.values(), *training.ema.shadow.values()]
    state += [t for moments in training.backend.optimizer.state.values() for t in moments.values()]
    before = [t.clone() for t in state]
    latents = torch.full_like(training.micros[0].latents_BCthw, torch.inf)
    training.micros[0] = replace(training.micros[0], latents_BCthw=latents)
    with no_waits(device):
        result = training.step()
    assert float(result.skipped) == 1 and not torch.isfinite(result.grad_norm)
    assert all(torch.equal(a, b) for a, b in zip(state, before, strict=True))


@pytest.mark.parametrize("levers", [{}, {"recompute": "selective"}, {"recompute": "full"}], ids=str)
def test_the_most_memory_of_a_step_is_what_the_formula_says(device, levers):
    """Large enough that what the formula leaves out (workspaces, the allocator's rounding) is little."""
    case = case_of(width=576, latent=Thw(8, 32, 32) if device.type == "cuda" else Thw(4, 16, 16), **levers)
    with peak_memory(device) as peak:
        training = Training(case, device)
        training.step()
        peak.restart()
        training.step()
    assert peak.bytes == pytest.approx(estimate(case).total, rel=0.1)
