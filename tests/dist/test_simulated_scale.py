"""Worlds of 8, 64 and 512 ranks in one process: the mesh, STDiT-XL/2 sharded over it, and a step on fake tensors, byte by byte."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch

from opensora_dist.config.train import ModelConfig, ParallelConfig, SpConfig, ZeroConfig
from opensora_dist.core.types import Thw
from opensora_dist.models.base import ModelIo
from opensora_dist.models.registry import build_model
from opensora_dist.plan.memory import MemoryCase, block_shapes, estimate, forward_end, moments, root_shapes
from opensora_dist.recipes.bench.scale import simulate_step

TOLERANCE = 0.05
CLIP_16 = Thw(16, 64, 64)  # 16 frames of 512 x 512 pixels
CLIP_64 = Thw(64, 64, 64)


@dataclass(frozen=True)
class Layout:
    world: int
    stage: int
    dtype: str = "bfloat16"
    recompute: str = "none"
    sp: int = 1
    dp_replicate: int = 1
    accum: int = 1
    depth: int = 2
    latent: Thw = CLIP_16
    name: str = "stdit"
    scheme: str = "dsp"
    slow: bool = False

    def __str__(self):
        shared = f"-sp{self.sp}_{self.scheme}" if self.sp > 1 else ""
        more = f"-replicate{self.dp_replicate}" * (self.dp_replicate > 1) + f"-accum{self.accum}" * (self.accum > 1)
        return (
            f"{self.world}ranks-zero{self.stage}-{self.dtype}-{self.recompute}{shared}{more}"
            f"-{self.name}-depth{self.depth}-{self.latent.t}frames"
        )

    @property
    def case(self):
        return MemoryCase(
            model=ModelConfig(name=self.name, size="XL", depth=self.depth),
            parallel=ParallelConfig(
                dp_replicate=self.dp_replicate,
                grad_accum=self.accum,
                sp=SpConfig(degree=self.sp, scheme=self.scheme),
                recompute=self.recompute,
                zero=ZeroConfig(stage=self.stage),
            ),
            world=self.world,
            latent=self.latent,
            dtype=self.dtype,
        )


LAYOUTS = [
    Layout(8, 2, depth=28, slow=True),
    Layout(8, 1, recompute="full"),
    Layout(8, 3, "float32", "selective", depth=4, slow=True),
    Layout(8, 3, recompute="full", latent=CLIP_64, depth=4),
    Layout(8, 2, "float32", name="dit", recompute="full"),
    Layout(8, 3, sp=8, latent=CLIP_64, slow=True),
    Layout(8, 1, "float32", accum=2, slow=True),
    Layout(64, 3, recompute="full", sp=8, latent=CLIP_64, depth=28, slow=True),
    Layout(64, 2, sp=8, accum=2),
    Layout(64, 1, recompute="selective", sp=4, depth=4),
    Layout(64, 3, "float32", sp=8, slow=True),
    Layout(64, 2, "float32", recompute="full", depth=4, slow=True),
    Layout(512, 3, sp=8, depth=28, slow=True),
    Layout(512, 2, recompute="full", dp_replicate=8),
    Layout(512, 2, recompute="full", dp_replicate=8, depth=28, slow=True),
    Layout(512, 3, "float32", recompute="full", sp=8, depth=4, slow=True),
    Layout(512, 1, sp=8, dp_replicate=8, depth=4, slow=True),
    Layout(512, 2, recompute="selective", sp=8, latent=CLIP_64, depth=4),
    Layout(512, 3, recompute="selective", sp=8, dp_replicate=8, latent=CLIP_64, depth=28, slow=True),
]


def _differences(case, measured):
    """Of each part: the formula's share above (or below) what was measured."""
    start, worst, step = forward_end(case), estimate(case), moments(case)[-1]
    pairs = {
        "parameters": (worst.parameters, measured.parameters),
        "optimizer": (worst.optimizer, measured.optimizer),
        "ema": (worst.ema, measured.ema),
        "gathered": (start.gathered, measured.gathered),
        "kept": (start.activations + start.gradients, measured.kept),
        "gradients": (step.gradients, measured.gradients),
        "peak": (worst.total, measured.peak),
    }
    return {name: formula / real - 1 for name, (formula, real) in pairs.items()}


@pytest.mark.parametrize("layout", [pytest.param(x, id=str(x), marks=[pytest.mark.slow] * x.slow) for x in LAYOUTS])
def test_formulas_agree_with_a_simulated_step(layout):
    differences = _differences(layout.case, simulate_step(layout.case))
    assert max(map(abs, differences.values())) <= TOLERANCE, differences


@pytest.mark.parametrize("name", ["stdit", "dit"])
def test_formulas_count_the_models_own_parameters(name):
    case = MemoryCase(
        model=ModelConfig(name=name, size="S", depth=2, pooled_text=True),
        parallel=ParallelConfig(),
        world=1,
        latent=CLIP_16,
        dtype="float32",
    )
    io = ModelIo(in_channels=4, out_channels=4, text_width=case.text_width, max_tokens=case.max_tokens)
    with torch.device("meta"):
        model = build_model(case.model, io)
    real = sorted((len(p), p.numel() // len(p)) for p in model.parameters())
    assert sorted(2 * block_shapes(case) + root_shapes(case)) == real


def test_the_largest_shard_is_that_of_the_first_rank():
    case = Layout(64, 3, recompute="full").case
    first, last = simulate_step(case), simulate_step(case, rank=63)
    assert last.optimizer < first.optimizer and last.ema < first.ema and last.parameters <= first.parameters  # which are padded
    # Only the step counters of the optimizer, one for each parameter, are not in the formula.
    assert abs(estimate(case).parameters - first.parameters) < 1024
