"""Memory levers where ranks share samples, and parameters: the same gradients, nothing sent twice, and no parameter moved."""

from __future__ import annotations

import itertools

import pytest
import torch
from sequence_cases import Shape, make_inputs, make_model
from sequence_pair import TOLERANCE, Pair, errors, half_precision, sent

from opensora_dist.config.train import OptimConfig, ParallelConfig, ZeroConfig
from opensora_dist.core.types import Thw
from opensora_dist.models.levers import set_levers
from opensora_dist.parallel.mesh import build_mesh
from opensora_dist.parallel.sequence.registry import SCHEMES
from opensora_dist.parallel.zero.native import NativeBackend

GRIDS = (Thw(5, 4, 3), Thw(1, 5, 4))  # uneven frames; one frame, so by rows


def _pairs(scheme, **options):
    models = ("stdit",) if scheme == "dsp" else ("stdit", "dit")
    return [Pair(scheme, model, grid, chunks=2, **options) for model, grid in itertools.product(models, GRIDS)]


@pytest.mark.parametrize("scheme", sorted(SCHEMES))
def test_levers_give_the_gradients_of_one_process_where_two_ranks_share_a_sample(ranks, scheme):
    pairs = _pairs(scheme, recompute="selective") + _pairs(scheme, offload=True)[:1] + _pairs(scheme, tile_tokens=5)[:1]
    pairs += (
        _pairs(scheme, recompute="none", offload=True, tile_tokens=5)[:2] + _pairs(scheme, recompute="full", tile_tokens=5)[:2]
    )
    pairs += _pairs(scheme, recompute="selective", offload=True, tile_tokens=5)[-2:]
    for found in ranks.run(errors, pairs, world=2):
        assert max(found.values()) <= TOLERANCE, found


@pytest.mark.parametrize("scheme", sorted(SCHEMES))
def test_selective_recompute_sends_nothing_twice(ranks, scheme):
    pairs = _pairs(scheme, recompute="selective", offload=True, tile_tokens=5)
    for found in ranks.run(sent, pairs, world=2):
        for pair, (counted, formula) in zip(pairs, found, strict=True):
            assert counted == formula, pair


@pytest.mark.parametrize("scheme", ["dsp", "ring", "ulysses"])
def test_levers_keep_the_accuracy_of_bfloat16(ranks, scheme):
    pairs = [
        Pair(scheme, "stdit", GRIDS[0], recompute=recompute, offload=True, tile_tokens=5)
        for recompute in ("none", "selective", "full")
    ]
    for found in ranks.run(half_precision, pairs, world=2):
        for pair, (dtypes, *relative) in zip(pairs, found, strict=True):
            assert dtypes == {torch.bfloat16} or scheme == "ring", pair
            assert max(relative) < 2e-2, (pair, relative)


# --- FSDP2

SHAPE = Shape(Thw(4, 4, 3), batch=2)
MIN_BYTES = 1200
"""More than a modulation takes, which FSDP2 makes narrower; less than the activations, and than a weight of qkv or the MLP."""


def _moved(stage, recompute, compute_dtype):
    """Bytes that are moved in one forward, and left in CPU memory after its backward; all ranks see the same samples."""
    mesh = build_mesh(torch.device("cpu"), dp_replicate=1, sp=ParallelConfig().sp, timeout_s=60)
    parallel = ParallelConfig(recompute=recompute, offload_activations=True, tile_tokens=7, zero=ZeroConfig(stage=stage))
    dtype = torch.float64 if compute_dtype == torch.float64 else torch.float32
    model = make_model("stdit", SHAPE, depth=3).to(dtype).to("meta")
    offload = set_levers(model, parallel, device=mesh.device, min_offload_bytes=MIN_BYTES)

    @torch.no_grad()
    def init(module):
        for parameter in module.parameters():
            parameter.fill_(0.01)

    backend = NativeBackend(
        model,
        mesh=mesh,
        units=list(model.blocks),
        init=init,
        parallel=parallel,
        optim=OptimConfig(),
        compute_dtype=compute_dtype,
    )
    inputs = make_inputs(SHAPE, group=0, dtype=dtype)
    with backend.forward_context(last_micro=True):
        out = backend.model(inputs.x_BCTHW, inputs.timestep_B, inputs.text_BYE, inputs.text_mask_BY)
        parked = offload.parked_bytes
        backend.backward(out.sum())
    return parked, offload.moved_bytes, offload.parked_bytes


@pytest.mark.parametrize("compute_dtype", [torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
def test_no_parameter_is_moved_however_it_is_sharded(ranks, recompute, compute_dtype):
    """Whole weights, gathered ones, casts of either: the bytes moved are those of activations, the same under every stage."""
    found = {stage: ranks.run(_moved, stage, recompute, compute_dtype, world=2) for stage in (0, 2, 3)}
    parked, moved, left = found[0][0]
    assert parked == moved > 0 and left == 0
    assert all(answers == [(parked, moved, left)] * 2 for answers in found.values()), found
