"""Memory levers: the same model, and less kept of it, by formula."""

from __future__ import annotations

import itertools

import pytest
import torch
from sequence_cases import Shape, compute, cut, difference, make_inputs, make_model

from opensora_dist.config.rules import train_problems
from opensora_dist.config.train import ModelConfig, ParallelConfig, SpConfig, TrainConfig
from opensora_dist.core.types import Thw
from opensora_dist.models.levers import set_levers
from opensora_dist.parallel.mesh import build_mesh
from opensora_dist.parallel.sequence.layout import SequenceParallel
from opensora_dist.parallel.sequence.registry import SCHEMES
from opensora_dist.plan.memory import MemoryCase, kept_of_block
from opensora_dist.recipes.bench.memory import LiveTensors, peak_memory
from opensora_dist.recipes.bench.scale import simulated

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


def _kept(name, frames, levers, *, batch=2, dtype=torch.float64, mesh=None):
    """Bytes that the graph of all blocks holds on the device and off it after the forward of so many frames."""
    shape = Shape(Thw(frames, 4, 4), batch=batch, heads=4, width=32)
    parallel = ParallelConfig(**levers)
    model = make_model(name, shape, depth=3)
    model.to(torch.float64 if dtype == torch.float64 else torch.float32)
    offload = set_levers(model, parallel, device=CPU, min_offload_bytes=0)
    inputs = make_inputs(shape, group=0, dtype=model.final_layer.linear.weight.dtype)
    shard = SequenceParallel(mesh, parallel.sp).shard(shape.grid) if mesh is not None else None
    x = inputs.x_BCTHW if shard is None else cut(inputs.x_BCTHW, shard.region.times(model.patch))
    marks = {}
    with LiveTensors() as live, torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
        model.blocks[0].register_forward_pre_hook(lambda *_: marks.update(before=live.now))
        model.blocks[-1].register_forward_hook(lambda *_: marks.update(after=live.now))
        x = x.clone().requires_grad_()
        out = model(x, inputs.timestep_B, inputs.text_BYE, inputs.text_mask_BY, drop_caption_B=inputs.drop_caption_B, shard=shard)
    parked = offload.parked_bytes if offload is not None else 0
    del out
    return marks["after"] - marks["before"] - parked, parked


def _formula(name, frames, levers, *, batch=2, dtype=torch.float64, world=1):
    """Of one block."""
    return kept_of_block(
        MemoryCase(
            model=ModelConfig(name=name, depth=3, width=32, heads=4, mlp_ratio=2, patch=(1, 1, 1)),
            parallel=ParallelConfig(**levers),
            world=world,
            latent=Thw(frames, 4, 4),
            dtype=str(dtype).removeprefix("torch."),
            micro_batch=batch,
        )
    )


def _agree(*args, mesh=None, world=1, **options):
    """Between two numbers of frames: what doesn't grow with tokens, such as casts of weights, is the same for both."""
    name, levers = args
    (more, _), (less, _) = (_kept(name, frames, levers, mesh=mesh, **options) for frames in (16, 8))
    wanted = 3 * (_formula(name, 16, levers, world=world, **options) - _formula(name, 8, levers, world=world, **options))
    assert more - less == pytest.approx(wanted), (levers, options)


@pytest.mark.parametrize("name", ["stdit", "dit"])
@pytest.mark.parametrize("tile", [None, 16])
@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
def test_blocks_keep_the_bytes_of_the_formula(name, recompute, tile):
    _agree(name, {"recompute": recompute, "tile_tokens": tile})


@pytest.mark.parametrize("name, scheme", [("stdit", s) for s in SCHEMES] + [("dit", s) for s in SCHEMES if s != "dsp"])
def test_blocks_keep_the_bytes_of_the_formula_where_ranks_share_a_sample(name, scheme):
    """This process as one of four ranks, whose others don't exist."""
    sp = SpConfig(degree=4, scheme=scheme, ulysses=2 if scheme == "usp" else None)
    with simulated(4):
        mesh = build_mesh(CPU, dp_replicate=1, sp=sp, timeout_s=60)
        for recompute, dtype, batch in itertools.product(("none", "selective", "full"), (torch.float64, torch.bfloat16), (1, 2)):
            _agree(name, {"recompute": recompute, "sp": sp}, batch=batch, dtype=dtype, mesh=mesh, world=4)


def _kept_of_pack(name, frames, levers, *, dtype, mesh):
    """As ``_kept``, of two samples of so many frames of 4x4 tokens and two of 4x2 as one sequence."""
    grids = [Thw(frames, 4, 4), Thw(frames, 4, 2)]
    parallel = ParallelConfig(**levers)
    model = make_model(name, Shape(grids[0], heads=4, width=32), depth=3)
    model.to(torch.float64 if dtype == torch.float64 else torch.float32)
    set_levers(model, parallel, device=CPU, min_offload_bytes=0)
    inputs = [make_inputs(Shape(grid, batch=2), group=0, dtype=model.final_layer.linear.weight.dtype) for grid in grids]
    shards = [None if mesh is None else SequenceParallel(mesh, parallel.sp).shard(grid) for grid in grids]
    xs = [i.x_BCTHW if s is None else cut(i.x_BCTHW, s.region.times(model.patch)) for i, s in zip(inputs, shards, strict=True)]
    names = ("timestep_B", "text_BYE", "text_mask_BY", "drop_caption_B")
    timestep, text, mask, drop = (torch.cat([getattr(i, name) for i in inputs]) for name in names)
    marks = {}
    with LiveTensors() as live, torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
        model.blocks[0].register_forward_pre_hook(lambda *_: marks.update(before=live.now))
        model.blocks[-1].register_forward_hook(lambda *_: marks.update(after=live.now))
        out = model([x.clone().requires_grad_() for x in xs], timestep, text, mask, drop_caption_B=drop, shard=shards)
    del out
    return marks["after"] - marks["before"]


def _pack_agrees(name, levers, *, dtype, mesh=None, world=1):
    more, less = (_kept_of_pack(name, frames, levers, dtype=dtype, mesh=mesh) for frames in (16, 8))

    def formula(frames):
        case = MemoryCase(
            model=ModelConfig(name=name, depth=3, width=32, heads=4, mlp_ratio=2, patch=(1, 1, 1)),
            parallel=ParallelConfig(**levers),
            world=world,
            latent=Thw(frames, 4, 4),
            dtype=str(dtype).removeprefix("torch."),
            micro_batch=3,  # has the tokens of the pack
            packed_samples=4,
        )
        return kept_of_block(case)

    assert more - less == pytest.approx(3 * (formula(16) - formula(8))), (name, levers, dtype)


def test_blocks_keep_the_bytes_of_the_formula_of_a_pack():
    for name, recompute, dtype in itertools.product(
        ("stdit", "dit"), ("none", "selective", "full"), (torch.float64, torch.bfloat16)
    ):
        _pack_agrees(name, {"recompute": recompute}, dtype=dtype)


@pytest.mark.parametrize("name, scheme", [("stdit", "dsp"), ("stdit", "ring"), ("stdit", "ulysses"), ("dit", "ulysses")])
def test_blocks_keep_the_bytes_of_the_formula_of_a_pack_whose_samples_ranks_share(name, scheme):
    sp = SpConfig(degree=4, scheme=scheme)
    with simulated(4):
        mesh = build_mesh(CPU, dp_replicate=1, sp=sp, timeout_s=60)
        for recompute, dtype in itertools.product(("none", "selective", "full"), (torch.float64, torch.bfloat16)):
            _pack_agrees(name, {"recompute": recompute, "sp": sp}, dtype=dtype, mesh=mesh, world=4)


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
