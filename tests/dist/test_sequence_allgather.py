"""The gathering baseline: the model of one process, and the bytes of its formula."""

from __future__ import annotations

import itertools

import pytest
import torch
from sequence_pair import TOLERANCE, Pair, errors, half_precision, living_tapes, sent

from opensora_dist.core.types import Thw
from opensora_dist.parallel.sequence.allgather import AllGather

GRIDS = {"even": Thw(4, 4, 3), "uneven": Thw(5, 3, 2), "one frame": Thw(1, 5, 2)}
MODELS = ("stdit", "dit")


@pytest.mark.parametrize("world", [2, 3, 4])
def test_allgather_gives_the_output_and_every_gradient_of_one_process(ranks, world):
    cases = [
        Pair("allgather", model, grid, recompute=recompute)
        for model, grid, recompute in itertools.product(MODELS, GRIDS.values(), ("none", "full"))
    ]
    for found in ranks.run(errors, cases, world=world):
        assert len(found) == len(cases) and max(found.values()) <= TOLERANCE, found


@pytest.mark.parametrize("world, grid", [(2, "even"), (3, "uneven"), (3, "one frame")])
def test_allgather_sends_the_bytes_of_its_formula(ranks, world, grid):
    cases = [
        Pair("allgather", model, GRIDS[grid], recompute=recompute)
        for model, recompute in itertools.product(MODELS, ("none", "full"))
    ]
    by_rank = ranks.run(sent, cases, world=world)
    M = 2 * GRIDS[grid].volume * 24 * 8  # B T S D e
    for case, found in enumerate(zip(*by_rank)):
        assert all(counted == formula for counted, formula in found), (cases[case], found)
        # Over all ranks and two blocks, mu = (P - 1) / P: 2 mu M in forward, 3 mu M in backward.
        assert [sum(counted[way] for counted, _ in found) for way in (0, 1)] == [2 * (world - 1) * n * M for n in (2, 3)]


def test_bfloat16_travels_under_autocast_and_the_output_is_near_the_whole_models(ranks):
    for found in ranks.run(half_precision, [Pair("allgather", model, GRIDS["uneven"]) for model in MODELS], world=3):
        assert all(dtypes == {torch.bfloat16} for dtypes, *_ in found), found
        assert all(error < 1e-2 for _, *errors in found for error in errors), found


def test_a_recomputed_block_frees_what_it_received(ranks):
    cases = [Pair("allgather", model, GRIDS["even"], recompute="full") for model in MODELS]
    assert ranks.run(living_tapes, cases, world=2) == [[0, 0]] * 2


def test_heads_that_the_ranks_do_not_divide_are_refused_with_a_way_out():
    assert not AllGather().problems(Thw(4, 4, 4), size=3, heads=12, joint=True)
    (problem,) = AllGather().problems(Thw(4, 4, 4), size=4, heads=6, joint=True)
    assert "parallel.sp.degree=4 must divide model.heads=6 for parallel.sp.scheme=allgather" in problem
