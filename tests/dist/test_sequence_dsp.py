"""DSP: the same model, the bytes of its formula, and matrix products in flight with every transfer."""

from __future__ import annotations

import itertools
from collections import Counter

import pytest
import torch
from sequence_cases import compute, make_inputs
from sequence_pair import TOLERANCE, Pair, Products, errors, half_precision, living_tapes, make_mesh, sent, watched_transfers

from opensora_dist.core.types import Thw

# Even; uneven frames and places; one frame, so by rows; fewer places than ranks.
GRIDS = (Thw(4, 2, 4), Thw(7, 3, 3), Thw(1, 5, 2), Thw(5, 1, 2))


@pytest.mark.parametrize("world", [2, 3, 4])
def test_dsp_in_runs_of_frames_and_places_is_the_model_of_one_process(ranks, world):
    pairs = [
        Pair("dsp", "stdit", grid, recompute=recompute, chunks=chunks)
        for grid, recompute, chunks in itertools.product(GRIDS, ("none", "full"), (1, 3))
    ]
    for answer in ranks.run(errors, pairs, world=world):
        assert max(answer.values()) < TOLERANCE, answer


@pytest.mark.parametrize("world", [2, 3])
def test_dsp_sends_what_its_formula_says_whole_or_in_runs(ranks, world):
    pairs = [
        Pair("dsp", "stdit", grid, recompute=recompute, overlap=overlap, chunks=chunks)
        for grid, recompute, overlap, chunks in itertools.product(GRIDS, ("none", "full"), (False, True), (1, 2))
    ]
    for answer in ranks.run(sent, pairs, world=world):
        for counted, formula in answer:
            assert counted == formula


def test_dsp_in_bfloat16_sends_bfloat16_and_stays_as_close_as_one_process(ranks):
    for answer in ranks.run(half_precision, [Pair("dsp", "stdit", GRIDS[1], chunks=c) for c in (1, 2)], world=2):
        for dtypes, output, dx in answer:
            assert dtypes == {torch.bfloat16}
            assert output < 0.02 and dx < 0.02


def test_what_a_recomputed_block_received_is_freed_with_its_graph(ranks):
    assert ranks.run(living_tapes, [Pair("dsp", "stdit", GRIDS[0], recompute="full")], world=2) == [[0], [0]]


def _products_in_flight(pair: Pair) -> list[int]:
    """Matrix products between the start and the end of each transfer of a forward and backward."""
    log: list[str] = []
    model, shard = pair.network(), pair.shard(make_mesh())
    with watched_transfers(log), Products(log):
        compute(model, make_inputs(pair.shape, group=0), shard=shard)
    starts = {event: at for at, event in enumerate(log) if event.startswith("send")}
    ends = {event.replace("wait", "send"): at for at, event in enumerate(log) if event.startswith("wait")}
    assert starts.keys() == ends.keys() and Counter(log)["product"] > 0
    return [log[at : ends[event]].count("product") for event, at in starts.items()]


@pytest.mark.parametrize("chunks", [1, 2])
@pytest.mark.parametrize("recompute", ["none", "full"])
def test_matrix_products_run_beside_every_transfer_in_forward_and_backward(ranks, recompute, chunks):
    for counts in ranks.run(_products_in_flight, Pair("dsp", "stdit", GRIDS[0], recompute=recompute, chunks=chunks), world=2):
        # Two blocks, out and back, forward and backward; own QKV one way, own projection, cross-attention and MLP the other.
        assert len(counts) == 2 * 2 * 2 * chunks
        assert min(counts) >= 1 and sorted(counts)[len(counts) // 2] >= 4, counts


def test_nothing_runs_beside_a_transfer_of_the_blocking_form(ranks):
    for counts in ranks.run(_products_in_flight, Pair("dsp", "stdit", GRIDS[0], overlap=False), world=2):
        assert counts == [0] * 8
