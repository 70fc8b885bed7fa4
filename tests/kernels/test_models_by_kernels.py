"""Whole models whose operators are Triton's give what torch's give: outputs and every gradient, whatever is recomputed, tiled or packed."""

from __future__ import annotations

import math

import pytest
import torch
from sequence_cases import Inputs, Shape, make_inputs, make_model
from torch import Tensor, nn

pytest.importorskip("triton", reason="Triton runs on Linux only; pip install 'opensora-dist[kernels]'")

from opensora_dist.config.train import ParallelConfig
from opensora_dist.core.types import Thw
from opensora_dist.models.levers import set_levers
from opensora_dist.ops.choice import Choice, choose, using

SHAPE, OTHER = (Shape(Thw(*grid), batch=2, heads=2, width=20) for grid in ((3, 1, 3), (1, 2, 1)))
CPU = torch.device("cpu")
TORCH, TRITON = Choice(), choose("triton", device=CPU, dtype="float32")
CASES = [
    ("stdit", {"recompute": "selective"}, [SHAPE]),
    ("stdit", {"recompute": "full", "tile_tokens": 7}, [SHAPE, OTHER]),
    ("dit", {"tile_tokens": 7}, [SHAPE, OTHER]),
]


def sharp_model(name: str) -> nn.Module:
    """Whose captions' tokens differ, and are not all looked at alike.

    The gradient of queries is of a difference between values. Between values that are nearly one it is a small rest of large numbers, of
    which no precision has many digits, least of all an attention that reckons with its rounded output, as all flash attentions do.
    """
    model = make_model(name, SHAPE)
    with torch.no_grad():
        model.y_embedder.y_embedding.mul_(10)
        for linear in (model.y_embedder.y_proj.fc1, model.y_embedder.y_proj.fc2):
            linear.weight.mul_(4)
        for block in model.blocks:
            block.cross_attn.q_linear.weight.mul_(4)
            block.cross_attn.kv_linear.weight.mul_(2)
    return model


def run(
    model: nn.Module, inputs: list[Inputs], *, choice: Choice, dtype: torch.dtype, levers: dict | None = None
) -> dict[str, Tensor]:
    """Outputs and all gradients of a batch, or of a pack of several, in float64.

    Args:
        dtype: bfloat16 is autocast's, with weights in float32.
    """
    model = model.to(torch.float64 if dtype == torch.float64 else torch.float32)
    set_levers(model, ParallelConfig(**(levers or {})), device=CPU)
    model.zero_grad()
    xs = [one.x_BCTHW.clone().requires_grad_() for one in inputs]
    of_samples = (torch.cat([getattr(one, name) for one in inputs]) for name in ("timestep_B", "text_BYE", "text_mask_BY"))
    dropped = torch.cat([one.drop_caption_B for one in inputs])
    with using(choice), torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
        outs = model(xs if len(xs) > 1 else xs[0], *of_samples, drop_caption_B=dropped)
        outs = outs if isinstance(outs, list) else [outs]
        sum((out * one.weight_BCTHW).sum() for out, one in zip(outs, inputs, strict=True)).backward()
    found = {f"output {i}": out for i, out in enumerate(outs)} | {f"gradient of input {i}": x.grad for i, x in enumerate(xs)}
    found |= {name: p.grad for name, p in model.named_parameters()}
    return {name: value.detach().double() for name, value in found.items()}


def differences(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> dict[str, float]:
    """Of each tensor, over its largest value."""
    assert found.keys() == wanted.keys()
    return {name: float((found[name] - value).abs().max() / value.abs().max()) for name, value in wanted.items()}


@pytest.mark.parametrize("name, levers, shapes", CASES, ids=["selective", "full, tiled pack", "dit, tiled pack"])
def test_a_model_or_a_pack_gives_the_outputs_and_every_gradient_of_torchs_operators(name, levers, shapes):
    model = sharp_model(name)
    inputs = [make_inputs(shape, group=i, dtype=torch.float32) for i, shape in enumerate(shapes)]
    wanted = run(model, inputs, choice=TORCH, dtype=torch.float32)
    errors = differences(run(model, inputs, choice=TRITON, dtype=torch.float32, levers=levers), wanted)
    assert max(errors.values()) <= 1e-5, errors


@pytest.mark.parametrize("name", ["stdit", "dit"])
def test_under_autocast_kernels_stay_as_near_the_exact_model_as_torch_does(name):
    model = sharp_model(name)
    inputs = [make_inputs(SHAPE, group=0, dtype=torch.float32)]
    exact = run(model, [_double(inputs[0])], choice=TORCH, dtype=torch.float64)
    errors = {
        choice.kernels: differences(run(model, inputs, choice=choice, dtype=torch.bfloat16), exact) for choice in (TORCH, TRITON)
    }
    typical = {who: math.exp(sum(map(math.log, of.values())) / len(of)) for who, of in errors.items()}
    assert typical["triton"] <= 1.5 * typical["torch"], typical
    # Probabilities are rounded before they meet the values, as in flash attention on a GPU; torch's attention on the CPU keeps them.
    assert max(errors["triton"].values()) <= 3 * max(errors["torch"].values()), errors


def _double(inputs: Inputs) -> Inputs:
    fields = {name: t.double() if t.is_floating_point() else t for name, t in vars(inputs).items()}
    return Inputs(**fields)
