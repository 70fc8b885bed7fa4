"""A pack is its samples: what each gives alone, and the same gradients, whatever else is in the sequence."""

from __future__ import annotations

import pytest
import torch
from transformer_reference import random_model

from opensora_dist.config.train import ModelConfig, ParallelConfig
from opensora_dist.models.base import ModelIo
from opensora_dist.models.levers import set_levers

IO = ModelIo(in_channels=3, out_channels=5, text_width=7, max_tokens=6)
# Samples of each shape: several, one frame, one token per frame.
PACK = {(3, 4, 6): 2, (1, 6, 2): 3, (2, 2, 2): 1}


def config(name, **more):
    return ModelConfig(name=name, depth=2, width=16, heads=2, space_scale=0.5, time_scale=2 / 3, **more)


def inputs():
    generator = torch.Generator().manual_seed(3)
    xs = [torch.randn(B, IO.in_channels, *latent, generator=generator, dtype=torch.float64) for latent, B in PACK.items()]
    B = sum(PACK.values())
    text = torch.randn(B, 6, IO.text_width, generator=generator, dtype=torch.float64)
    mask = torch.rand(B, 6, generator=generator) < 0.6
    mask[1] = False  # a caption without valid tokens
    drop = torch.tensor([True, False, False, True, False, False])
    return xs, torch.linspace(0, 999, B), text, mask, drop


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize("name", ["stdit", "dit"])
@pytest.mark.parametrize(
    "levers",
    [{}, {"tile_tokens": 4}, {"recompute": "selective"}, {"recompute": "full", "tile_tokens": 4}, {"offload_activations": True}],
    ids=lambda levers: "-".join(levers) or "plain",
)
@pytest.mark.parametrize("more", [{}, {"pooled_text": True, "temporal_positions": "residual"}], ids=["published", "residual"])
def test_a_pack_gives_the_outputs_and_the_gradients_of_its_samples_alone(name, levers, more):
    if name == "dit":
        more = {k: v for k, v in more.items() if k != "temporal_positions"}
    model = random_model(config(name, **more), IO)
    xs, timestep, text, mask, drop = inputs()
    wanted, first = [], 0
    for x in xs:
        for b in range(len(x)):
            at = slice(first, first + 1)
            wanted.append(model(x[b : b + 1], timestep[at], text[at], mask[at], drop_caption_B=drop[at])[0])
            first += 1
    weights = [
        torch.randn(out.shape, generator=torch.Generator().manual_seed(i), dtype=torch.float64) for i, out in enumerate(wanted)
    ]
    alone = gradients(model, sum((out * w).sum() for out, w in zip(wanted, weights, strict=True)))
    set_levers(model, ParallelConfig(**levers), device=torch.device("cpu"))
    found = [out for part in model(xs, timestep, text, mask, drop_caption_B=drop) for out in part]
    packed = gradients(model, sum((out * w).sum() for out, w in zip(found, weights, strict=True)))
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)
    assert alone.keys() == packed.keys()
    for key, grad in alone.items():
        torch.testing.assert_close(packed[key], grad, rtol=1e-10, atol=1e-10 * float(grad.abs().max()), msg=key)
