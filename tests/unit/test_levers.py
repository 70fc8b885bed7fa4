"""Memory levers: the same model, and less kept of it, by formula."""

from __future__ import annotations

import itertools

import pytest
import torch
from sequence_cases import Shape, compute, difference, make_inputs, make_model

from opensora_dist.config.rules import train_problems
from opensora_dist.config.train import ParallelConfig, TrainConfig
from opensora_dist.core.types import Thw
from opensora_dist.models.levers import kept_per_token, set_levers
from opensora_dist.recipes.bench.memory import LiveTensors, peak_memory

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


# --- peaks

LONG = Shape(Thw(16, 8, 8), batch=1, heads=2, width=16)


def _peak(levers):
    """Most bytes on the device in forward and backward, and what was moved off it."""
    model, offload = _model("stdit", LONG, **levers)
    inputs = make_inputs(LONG, group=0)
    with peak_memory(CPU, parked=lambda: offload.parked_bytes if offload is not None else 0) as peak:
        compute(model, inputs, shard=None)
    return peak.bytes, offload.moved_bytes if offload is not None else 0


def test_each_lever_lowers_the_peak():
    none, selective, full = (_peak({"recompute": recompute})[0] for recompute in ("none", "selective", "full"))
    assert full < selective < none
    for recompute, before in (("none", none), ("selective", selective), ("full", full)):
        assert _peak({"recompute": recompute, "tile_tokens": 64})[0] < before, "tiles"
        away, moved = _peak({"recompute": recompute, "offload_activations": True})
        assert away < before and moved > 0, "offload"


@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
def test_offload_leaves_the_last_block_on_the_device_and_moves_each_storage_of_the_others_once(recompute):
    kept, _ = _kept("stdit", 9, {"recompute": recompute})
    left, parked = _kept("stdit", 9, {"recompute": recompute, "offload_activations": True})
    assert 0 < parked <= 2 / 3 * kept * 1.01, "a storage is moved twice, or what lives on is moved, too"
    assert left < kept / 2


def test_one_block_has_nothing_to_offload_and_the_rules_say_so(tmp_path):
    config = TrainConfig.model_validate(
        {"data": {"path": str(tmp_path)}, "model": {"depth": 1}, "parallel": {"offload_activations": True}}
    )
    (problem,) = [p for p in train_problems(config, world=1) if "offload" in p.message]
    assert "model.depth" in problem.fields and "parallel.recompute" in problem.message
