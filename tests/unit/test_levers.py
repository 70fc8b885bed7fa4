"""Memory levers: the same model, and less kept of it, by formula."""

from __future__ import annotations

import itertools

import pytest
import torch
from sequence_cases import Shape, compute, difference, make_inputs, make_model

from opensora_dist.config.train import ParallelConfig
from opensora_dist.core.types import Thw
from opensora_dist.models.levers import kept_per_token, set_levers
from opensora_dist.recipes.bench.memory import LiveTensors

CPU = torch.device("cpu")
SHAPE = Shape(Thw(5, 4, 3), batch=2)
TOLERANCE = 1e-12
LEVERS = [
    {"recompute": recompute, "offload_activations": offload, "tile_tokens": tile}
    for recompute, offload, tile in itertools.product(("none", "selective", "full"), (False, True), (None, 1, 7, 1000))
]


def _name(levers):
    return "-".join(f"{name}={value}" for name, value in levers.items() if value not in (None, False)) or "none"


def _set(model, levers):
    return set_levers(model, ParallelConfig(**levers), device=CPU, min_offload_bytes=0)


def _model(name, shape=SHAPE, **levers):
    model = make_model(name, shape, depth=3)
    return model, _set(model, levers)


@pytest.mark.parametrize("name", ["stdit", "dit"])
@pytest.mark.parametrize("levers", LEVERS, ids=_name)
def test_every_combination_gives_the_output_and_every_gradient_of_none(name, levers):
    inputs = make_inputs(SHAPE, group=0)
    wanted = compute(_model(name)[0], inputs, shard=None)
    model, offload = _model(name, **levers)
    found = compute(model, inputs, shard=None)
    assert found.grads.keys() == wanted.grads.keys() and (offload is None) != levers["offload_activations"]
    errors = {n: difference(found.grads[n], grad, scale=grad) for n, grad in wanted.grads.items()}
    errors["dx"] = difference(found.dx, wanted.dx, scale=wanted.dx)
    errors["output"] = difference(found.output, wanted.output, scale=wanted.output)
    assert max(errors.values()) <= TOLERANCE, errors
    if offload is not None:
        assert offload.moved_bytes > 0 and offload.parked_bytes == 0


# --- what is kept


def _kept(name, frames, levers):
    """Bytes that the graph of all blocks holds on the device and off it after the forward of so many frames."""
    shape = Shape(Thw(frames, 4, 3), batch=2, heads=4, width=32)
    model, offload = _model(name, shape, **levers)
    inputs = make_inputs(shape, group=0)
    marks = {}
    with LiveTensors() as live:
        model.blocks[0].register_forward_pre_hook(lambda *_: marks.update(before=live.now))
        model.blocks[-1].register_forward_hook(lambda *_: marks.update(after=live.now))
        x = inputs.x_BCTHW.clone().requires_grad_()
        out = model(x, inputs.timestep_B, inputs.text_BYE, inputs.text_mask_BY, drop_caption_B=inputs.drop_caption_B)
    parked = offload.parked_bytes if offload is not None else 0
    del out
    return marks["after"] - marks["before"] - parked, parked


@pytest.mark.parametrize("name", ["stdit", "dit"])
@pytest.mark.parametrize("tile", [None, 16])
@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
def test_blocks_keep_the_bytes_per_token_of_the_formula(name, recompute, tile):
    levers = {"recompute": recompute, "tile_tokens": tile}
    (more, _), (less, _) = (_kept(name, frames, levers) for frames in (9, 5))
    tokens = 2 * 4 * 4 * 3
    model, _ = _model(name, Shape(Thw(9, 4, 3), batch=2, heads=4, width=32), **levers)
    formula = sum(kept_per_token(block).bytes(block, element_bytes=8) for block in model.blocks)
    assert (more - less) / tokens == pytest.approx(formula)
