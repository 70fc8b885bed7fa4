"""The formula of memory for ``run.kernels=triton``, beside steps simulated on fake tensors: kernels have shapes there, and don't run."""

from __future__ import annotations

from dataclasses import replace

import pytest

from opensora_dist.config.train import ModelConfig, ParallelConfig, ZeroConfig
from opensora_dist.core.types import Thw
from opensora_dist.plan.memory import MemoryCase, estimate, forward_end
from opensora_dist.recipes.bench.scale import simulate_step

TOLERANCE = 0.05


@pytest.mark.parametrize("name, recompute", [("stdit", "none"), ("stdit", "selective"), ("dit", "none"), ("dit", "full")])
def test_formulas_agree_with_a_simulated_step_whose_norms_keep_their_input_alone(name, recompute):
    case = MemoryCase(
        model=ModelConfig(name=name, size="XL", depth=2),
        parallel=ParallelConfig(recompute=recompute, zero=ZeroConfig(stage=2)),
        world=8,
        latent=Thw(16, 64, 64),
        dtype="bfloat16",
        kernels="triton",
    )
    measured, start = simulate_step(case), forward_end(case)
    assert estimate(case).total == pytest.approx(measured.peak, rel=TOLERANCE)
    assert start.activations + start.gradients == pytest.approx(measured.kept, rel=TOLERANCE)
    assert estimate(case).total < estimate(replace(case, kernels="torch")).total
