"""Ring attention and USP: one process's attention and model, the bytes of the formula, fp32 sums, and hops behind attention."""

from __future__ import annotations

import itertools
from functools import partial
from unittest import mock

import pytest
import torch
from sequence_cases import compute, cut, difference, latent, make_inputs, summed
from sequence_pair import TOLERANCE, Pair, errors, latents, living_tapes, make_mesh, sent, whole

from opensora_dist.core.types import Region, Thw
from opensora_dist.ops.attention import attention_with_lse
from opensora_dist.parallel.sequence import ring
from opensora_dist.parallel.sequence.ring import Ring
from opensora_dist.parallel.sequence.usp import Usp

EVEN, UNEVEN = Thw(12, 4, 1), Thw(5, 3, 2)
SHAPES = ({"grid": EVEN}, {"grid": UNEVEN}, {"grid": Thw(1, 5, 2)}, {"grid": UNEVEN, "heads": 5, "width": 20})
SETTINGS = [("ring", 2, None), ("ring", 3, None), ("ring", 4, None), ("usp", 4, 2)]
NAMES = "scheme, size, ulysses"


def _pairs(scheme, ulysses, *, shapes=SHAPES, overlap=(True, False), recompute=("none", "full")):
    """What the rules allow."""
    return [
        Pair(scheme, model, ulysses=ulysses, overlap=hides, recompute=again, **shape)
        for hides, model, shape, again in itertools.product(overlap, ("stdit", "dit"), shapes, recompute)
        if shape.get("heads", 12) % (ulysses or 1) == 0
    ]


@pytest.mark.parametrize(NAMES, SETTINGS)
def test_the_model_gives_the_output_and_every_gradient_of_one_process(ranks, scheme, size, ulysses):
    pairs = _pairs(scheme, ulysses)
    for found in ranks.run(errors, pairs, world=size):
        assert len(found) == len(pairs)
        assert not {pair: error for pair, error in found.items() if not error <= TOLERANCE}


def errors_with_lse_of_zeros(pairs):
    """What ``errors`` says of a backend that gives no lse."""

    def without_lse(q, k, v):
        out, lse = attention_with_lse(q, k, v)
        return out, torch.zeros_like(lse)

    with mock.patch.object(ring, "attention_with_lse", without_lse):
        return errors(pairs)


@pytest.mark.parametrize(NAMES, [("ring", 2, None), ("usp", 4, 2)])
def test_a_backend_that_gives_no_lse_does_not_pass_this_comparison(ranks, scheme, size, ulysses):
    pairs = _pairs(scheme, ulysses, shapes=SHAPES[1:2], overlap=(True,), recompute=("none",))
    for found in ranks.run(errors_with_lse_of_zeros, pairs, world=size):
        assert min(found.values()) > 1e-4


def output_without_grad(pair):
    """As in sampling: the largest difference of the output where nothing is kept for a backward."""
    shard, inputs = pair.shard(make_mesh(pair)), make_inputs(pair.shape, group=0)
    part = latents(pair, shard)
    with torch.no_grad():
        out = pair.network()(
            cut(inputs.x_BCTHW, part),
            inputs.timestep_B,
            inputs.text_BYE,
            inputs.text_mask_BY,
            drop_caption_B=inputs.drop_caption_B,
            shard=shard,
        )
    wanted = whole(pair.model, pair.shape).output
    return difference(out, cut(wanted, part), scale=wanted)


def test_sampling_sees_the_same_output(ranks):
    assert max(ranks.run(output_without_grad, Pair("ring", "stdit", UNEVEN, recompute="full"), world=3)) <= TOLERANCE


# --- bytes


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize(NAMES, SETTINGS)
def test_a_rank_sends_the_bytes_of_the_formula(ranks, scheme, size, ulysses, autocast):
    """With overlap and without, with recomputation and without: the same; what is added up travels in fp32 where data are bf16."""
    overlap, recompute = ((True,), ("full",)) if autocast else ((True, False), ("none", "full"))
    pairs = _pairs(scheme, ulysses, shapes=SHAPES[:2], overlap=overlap, recompute=recompute)
    for found in ranks.run(partial(sent, autocast=autocast), pairs, world=size):
        for pair, (counted, formula) in zip(pairs, found, strict=True):
            assert counted == formula, pair
            if pair.grid == EVEN:
                assert counted == tuple(2 * n for n in _closed(pair, size, element_bytes=2 if autocast else 8)), pair


def _closed(pair, P, *, element_bytes):
    """The published formulas, of one block: M bytes of the whole residual, P ranks, u of them in an inner group, r groups."""
    M, u = pair.shape.batch * pair.grid.volume * pair.width * element_bytes, pair.ulysses or 1
    inside, around = 4 * (u - 1) * M // (P * u), 2 * (P // u - 1) * M // P
    return inside + around, inside + (2 if element_bytes == 8 else 3) * around


# --- half precision


def half_precision_errors(pairs):
    """Of each pair ([squared error of output, of dx, of gradients] sharded, the same whole) in bfloat16 against float64."""
    mesh, found = make_mesh(pairs[0]), []
    for pair in pairs:
        shard, truth = pair.shard(mesh), whole(pair.model, pair.shape)
        inputs = make_inputs(pair.shape, group=0, dtype=torch.float32)
        with torch.autocast("cpu", torch.bfloat16):
            sharded = compute(pair.network().float(), inputs, shard=shard)
            alone = compute(pair.network().float(), inputs, shard=None)
        everything = Region.whole(latent(pair.shape))
        found.append(
            (
                _squares(sharded, truth, part=latents(pair, shard), grads=summed(sharded.grads)),
                _squares(alone, truth, part=everything, grads=alone.grads),
            )
        )
    return found


def _squares(result, truth, *, part, grads):
    return [
        (result.output - cut(truth.output, part)).square().sum().item(),
        (result.dx - cut(truth.dx, part)).square().sum().item(),
        sum((grads[name] - grad).square().sum().item() / grad.square().sum().item() for name, grad in truth.grads.items()),
    ]


@pytest.mark.parametrize(NAMES, SETTINGS)
def test_under_autocast_the_model_is_as_exact_as_in_one_process(ranks, scheme, size, ulysses):
    """Most of this error is the linears': what sums are held in shows in test_sequence_rotation.py."""
    pairs = _pairs(scheme, ulysses, shapes=SHAPES[1:2], overlap=(True,), recompute=("none",))
    by_rank = ranks.run(half_precision_errors, pairs, world=size)
    for pair, *found in zip(pairs, *by_rank, strict=True):
        alone = found[0][1]
        output, dx = (sum(sharded[i] for sharded, _ in found) for i in (0, 1))
        grads = found[0][0][2]  # summed over ranks already
        ratios = [(mine / other) ** 0.5 for mine, other in zip((output, dx, grads), alone)]
        assert max(ratios) <= 1.5, (pair, ratios)


# --- memory


@pytest.mark.parametrize(NAMES, [("ring", 2, None), ("usp", 4, 2)])
def test_a_recomputed_block_frees_what_it_kept(ranks, scheme, size, ulysses):
    pairs = _pairs(scheme, ulysses, shapes=SHAPES[1:2], recompute=("full",))
    assert ranks.run(living_tapes, pairs, world=size) == [[0] * len(pairs)] * size


# --- rules


def test_ring_has_no_rule_and_usp_names_its_own():
    grid = Thw(5, 3, 2)
    assert not Ring(overlap=True).problems(grid, size=4, heads=5, joint=True)
    scheme = Usp(ulysses=4, degree=4, overlap=True)
    assert not scheme.problems(grid, size=4, heads=12, joint=False)
    (problem,) = scheme.problems(grid, size=4, heads=6, joint=False)
    assert problem.startswith("parallel.sp.ulysses=4 must divide model.heads=6")
    assert "use one of 1, 2, or parallel.sp.scheme=dsp or ring" in problem
    (problem,) = scheme.problems(grid, size=2, heads=5, joint=True)
    assert problem.startswith("parallel.sp.ulysses=2") and problem.endswith("parallel.sp.scheme=ring, which has no such rule")
