"""Ring attention and USP: one process's attention and model, the bytes of the formula, fp32 sums, and hops behind attention."""

# G sequences, N heads, K head dim, L positions of all ranks, l of this rank

from __future__ import annotations

import gc
import itertools
import weakref
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cache
from unittest import mock

import pytest
import torch
from sequence_cases import Shape, compute, cut, difference, latent, make_inputs, make_model, summed, worst

from opensora_dist.config.train import SpConfig
from opensora_dist.core.types import Axis, Region, Thw
from opensora_dist.ops.attention import attention_with_lse
from opensora_dist.parallel.mesh import build_mesh
from opensora_dist.parallel.recompute import Tape
from opensora_dist.parallel.sequence import ring
from opensora_dist.parallel.sequence.layout import SequenceParallel
from opensora_dist.parallel.sequence.ring import Ring
from opensora_dist.parallel.sequence.traffic import SentBytes
from opensora_dist.parallel.sequence.usp import Usp

TOLERANCE = 1e-12
"""In float64, over the largest value of a tensor."""
EVEN, UNEVEN = Shape(Thw(12, 4, 1), batch=2), Shape(Thw(5, 3, 2), batch=2)
SHAPES = (EVEN, UNEVEN, Shape(Thw(1, 5, 2), batch=2), Shape(Thw(5, 3, 2), batch=2, heads=5, width=20))


@dataclass(frozen=True)
class Case:
    """A model over all ranks there are."""

    sp: SpConfig
    model: str
    shape: Shape
    recompute: bool = False

    @property
    def allowed(self) -> bool:
        return self.sp.scheme == "ring" or self.shape.heads % self.sp.ulysses == 0

    def network(self):
        model = make_model(self.model, self.shape)
        for block in model.blocks:
            block.recompute = self.recompute
        return model

    def axis(self, shard):
        return Axis.JOINT if self.model == "dit" else Axis.SPACE if shard.by_rows else Axis.TIME


SETTINGS = [("ring", 2, None), ("ring", 3, None), ("ring", 4, None), ("usp", 4, 2)]
NAMES = "scheme, size, ulysses"


def _cases(scheme, size, ulysses, *, shapes=SHAPES, **fixed):
    choices = itertools.product(
        fixed.get("overlap", (True, False)), ("stdit", "dit"), shapes, fixed.get("recompute", (False, True))
    )
    cases = [
        Case(SpConfig(degree=size, scheme=scheme, ulysses=ulysses, overlap=overlap), model, shape, recompute)
        for overlap, model, shape, recompute in choices
    ]
    return [case for case in cases if case.allowed]


def _mesh(sp):
    return build_mesh(torch.device("cpu"), dp_replicate=1, sp=sp, timeout_s=60)


@cache
def _whole(model, shape):
    return compute(make_model(model, shape), make_inputs(shape, group=0), shard=None)


def model_errors(cases, *, broken=nullcontext):
    """Of each case the largest difference of output, dx and every summed gradient from one process."""
    mesh, found = _mesh(cases[0].sp), []
    for case in cases:
        shard = SequenceParallel(mesh, case.sp).shard(case.shape.grid)
        wanted, part = _whole(case.model, case.shape), _latents(shard, case.shape)
        with broken():
            result = compute(case.network(), make_inputs(case.shape, group=0), shard=shard)
        grads = summed(result.grads)
        assert grads.keys() == wanted.grads.keys()
        pairs = [(result.output, cut(wanted.output, part)), (result.dx, cut(wanted.dx, part))]
        pairs += [(grads[name], grad) for name, grad in wanted.grads.items()]
        found.append(worst(difference(mine, other, scale=other) for mine, other in pairs))
    return found


def _latents(shard, shape):
    return shard.region.times(Thw(*(n // g for n, g in zip(latent(shape), shape.grid))))


@pytest.mark.parametrize(NAMES, SETTINGS)
def test_the_model_gives_the_output_and_every_gradient_of_one_process(ranks, scheme, size, ulysses):
    cases = _cases(scheme, size, ulysses)
    for found in ranks.run(model_errors, cases, world=size):
        assert len(found) == len(cases)
        assert not {str(case): error for case, error in zip(cases, found) if not error <= TOLERANCE}


def errors_with_lse_of_zeros(cases):
    """What ``model_errors`` says of a backend that gives no lse."""

    def without_lse(q, k, v):
        out, lse = attention_with_lse(q, k, v)
        return out, torch.zeros_like(lse)

    return model_errors(cases, broken=lambda: mock.patch.object(ring, "attention_with_lse", without_lse))


@pytest.mark.parametrize(NAMES, [("ring", 2, None), ("usp", 4, 2)])
def test_a_backend_that_gives_no_lse_does_not_pass_this_comparison(ranks, scheme, size, ulysses):
    cases = _cases(scheme, size, ulysses, shapes=(UNEVEN,), overlap=(True,), recompute=(False,))
    for found in ranks.run(errors_with_lse_of_zeros, cases, world=size):
        assert min(found) > 1e-4


def output_without_grad(case):
    """As in sampling: the largest difference of the output where nothing is kept for a backward."""
    shard, inputs = SequenceParallel(_mesh(case.sp), case.sp).shard(case.shape.grid), make_inputs(case.shape, group=0)
    part = _latents(shard, case.shape)
    with torch.no_grad():
        out = case.network()(
            cut(inputs.x_BCTHW, part),
            inputs.timestep_B,
            inputs.text_BYE,
            inputs.text_mask_BY,
            drop_caption_B=inputs.drop_caption_B,
            shard=shard,
        )
    wanted = _whole(case.model, case.shape).output
    return difference(out, cut(wanted, part), scale=wanted)


def test_sampling_sees_the_same_output(ranks):
    (case,) = _cases("ring", 3, None, shapes=(UNEVEN,), overlap=(True,), recompute=(True,))[:1]
    assert max(ranks.run(output_without_grad, case, world=3)) <= TOLERANCE


# --- bytes


def bytes_sent(cases, autocast):
    """((forward, backward) as counted, the same by the formula) of each case, for all blocks."""
    mesh, found = _mesh(cases[0].sp), []
    for case in cases:
        shard, marks = SequenceParallel(mesh, case.sp).shard(case.shape.grid), []
        dtype = torch.float32 if autocast else torch.float64
        model, inputs = case.network().to(dtype), make_inputs(case.shape, group=0, dtype=dtype)
        with SentBytes() as count, torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            compute(model, inputs, shard=shard, between=lambda marks=marks, count=count: marks.append(count.total))
        formula = shard.scheme.bytes_sent(
            shard, case.axis(shard), batch=case.shape.batch, width=case.shape.width, element_bytes=2 if autocast else 8
        )
        blocks = len(model.blocks)
        found.append(((marks[0], count.total - marks[0]), (blocks * formula.forward, blocks * formula.backward)))
    return found


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize(NAMES, SETTINGS)
def test_a_rank_sends_the_bytes_of_the_formula(ranks, scheme, size, ulysses, autocast):
    """With overlap and without, with recomputation and without: the same; what is added up travels in fp32 where data are bf16."""
    every = (True,) if autocast else (True, False)
    cases = _cases(scheme, size, ulysses, shapes=(EVEN, UNEVEN), overlap=every, recompute=every)
    for found in ranks.run(bytes_sent, cases, autocast, world=size):
        for case, (counted, formula) in zip(cases, found, strict=True):
            assert counted == formula, case
            if case.shape == EVEN:
                assert counted == tuple(2 * n for n in _closed(case, element_bytes=2 if autocast else 8)), case


def _closed(case, *, element_bytes):
    """The published formulas, of one block: M bytes of the whole residual, P ranks, u of them in an inner group, r groups."""
    M = case.shape.batch * case.shape.grid.volume * case.shape.width * element_bytes
    P, u = case.sp.degree, case.sp.ulysses or 1
    inside, around = 4 * (u - 1) * M // (P * u), 2 * (P // u - 1) * M // P
    return inside + around, inside + (2 if element_bytes == 8 else 3) * around


# --- half precision


def half_precision_errors(cases):
    """Of each case ([squared error of output, of dx, of gradients] sharded, the same whole) in bfloat16 against float64."""
    mesh, found = _mesh(cases[0].sp), []
    for case in cases:
        shard = SequenceParallel(mesh, case.sp).shard(case.shape.grid)
        truth, inputs = _whole(case.model, case.shape), make_inputs(case.shape, group=0, dtype=torch.float32)
        with torch.autocast("cpu", torch.bfloat16):
            sharded = compute(case.network().float(), inputs, shard=shard)
            whole = compute(case.network().float(), inputs, shard=None)
        part, everything = _latents(shard, case.shape), Region.whole(latent(case.shape))
        found.append(
            (
                _squares(sharded, truth, part=part, grads=summed(sharded.grads)),
                _squares(whole, truth, part=everything, grads=whole.grads),
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
    cases = _cases(scheme, size, ulysses, shapes=(UNEVEN,), overlap=(True,), recompute=(False,))
    by_rank = ranks.run(half_precision_errors, cases, world=size)
    for case, *found in zip(cases, *by_rank, strict=True):
        whole = found[0][1]
        output, dx = (sum(sharded[i] for sharded, _ in found) for i in (0, 1))
        grads = found[0][0][2]  # summed over ranks already
        ratios = [(mine / other) ** 0.5 for mine, other in zip((output, dx, grads), whole)]
        assert max(ratios) <= 1.5, (case, ratios)


# --- memory


def living_tapes(cases):
    """Tapes that outlive forward and backward, and with them what they keep."""
    mesh, tapes, init = _mesh(cases[0].sp), [], Tape.__init__

    def noted(self):
        init(self)
        tapes.append(weakref.ref(self))

    with mock.patch.object(Tape, "__init__", noted):
        for case in cases:
            compute(
                case.network(), make_inputs(case.shape, group=0), shard=SequenceParallel(mesh, case.sp).shard(case.shape.grid)
            )
    gc.collect()
    return len(tapes), sum(tape() is not None for tape in tapes)


@pytest.mark.parametrize(NAMES, [("ring", 2, None), ("usp", 4, 2)])
def test_a_recomputed_block_frees_what_it_kept(ranks, scheme, size, ulysses):
    cases = _cases(scheme, size, ulysses, shapes=(UNEVEN,), recompute=(True,))
    assert ranks.run(living_tapes, cases, world=size) == [(2 * len(cases), 0)] * size


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
