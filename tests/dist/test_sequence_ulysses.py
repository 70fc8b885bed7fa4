"""Ulysses in both forms: the model of one process, the bytes of its formula, and the order that hides its transfers."""

from __future__ import annotations

import itertools
from collections import Counter
from unittest import mock

import pytest
import torch
from sequence_pair import (
    TOLERANCE,
    Marked,
    Pair,
    errors,
    half_precision,
    living_tapes,
    make_mesh,
    sent,
    transfers,
    watched_transfers,
)

from opensora_dist.core.types import Axis, Thw
from opensora_dist.models.layers import SelfAttention
from opensora_dist.parallel.keys import Keys
from opensora_dist.parallel.sequence.ulysses import Ulysses

GRIDS = {"even": Thw(4, 4, 3), "uneven": Thw(5, 3, 2), "one frame": Thw(1, 5, 2)}
FORMS = [(False, 1), (True, 1), (True, 3)]


@pytest.mark.parametrize("world", [2, 3, 4])
def test_ulysses_gives_the_output_and_every_gradient_of_one_process(ranks, world):
    # Recomputation in every other case: as forms are odd in number, each comes both ways.
    cases = [
        Pair("ulysses", model, grid, recompute=("none", "full")[i % 2], overlap=overlap, chunks=chunks)
        for i, (model, grid, (overlap, chunks)) in enumerate(itertools.product(("stdit", "dit"), GRIDS.values(), FORMS))
    ]
    for found in ranks.run(errors, cases, world=world):
        assert len(found) == len(cases) and max(found.values()) <= TOLERANCE, found


@pytest.mark.parametrize("world, grid", [(2, "even"), (3, "uneven"), (3, "one frame")])
@pytest.mark.parametrize("model", ["stdit", "dit"])
def test_every_form_of_ulysses_sends_the_bytes_of_its_formula(ranks, model, world, grid):
    cases = [
        Pair("ulysses", model, GRIDS[grid], recompute=recompute, overlap=overlap, chunks=chunks)
        for recompute, (overlap, chunks) in itertools.product(("none", "full"), FORMS)
    ]
    by_rank = ranks.run(sent, cases, world=world)
    for found in by_rank:
        assert all(counted == formula for counted, formula in found), found
        assert len(set(found)) == 1, "forms differ"
    # M = B T S D e, two blocks, forward and backward.
    M = 2 * GRIDS[grid].volume * 24 * 8
    assert sum(sum(found[0][0]) for found in by_rank) == 2 * 2 * 4 * (world - 1) * M // world


def test_bfloat16_travels_under_autocast_and_the_output_is_near_the_whole_models(ranks):
    cases = [
        Pair("ulysses", model, GRIDS["uneven"], overlap=overlap, chunks=chunks)
        for model in ("stdit", "dit")
        for overlap, chunks in FORMS
    ]
    for found in ranks.run(half_precision, cases, world=3):
        assert all(dtypes == {torch.bfloat16} for dtypes, *_ in found), found
        assert all(error < 1e-2 for _, *errors in found for error in errors), found


def test_a_recomputed_block_frees_what_it_received(ranks):
    cases = [
        Pair("ulysses", "stdit", GRIDS["even"], recompute="full", overlap=overlap, chunks=chunks) for overlap, chunks in FORMS
    ]
    assert ranks.run(living_tapes, cases, world=2) == [[0] * len(cases)] * 2


@pytest.mark.parametrize("joint, others", [(False, "dsp or ring"), (True, "ring")])
def test_heads_that_the_ranks_do_not_divide_are_refused_with_a_way_out(joint, others):
    scheme = Ulysses(overlap=True)
    assert not scheme.problems(Thw(4, 4, 4), size=3, heads=12, joint=joint)
    (problem,) = scheme.problems(Thw(4, 4, 4), size=4, heads=6, joint=joint)
    assert "parallel.sp.degree=4 must divide model.heads=6" in problem
    assert f"use one of 1, 2, 3, 6, or parallel.sp.scheme={others}" in problem


# --- the order of things


def _order(grid, axis):
    """What a branch in three pieces does, forward and backward: transfers by number, attentions, and the work after."""
    pair = Pair("ulysses", "stdit", grid, chunks=3)
    shard, log, counts = pair.shard(make_mesh()), [], Counter()
    attn = SelfAttention(24, heads=12)
    with torch.no_grad():
        for name, parameter in attn.named_parameters():
            parameter.normal_(std=0.1, generator=Keys(1).generator(name))

    def attend(q, k, v, *, mask_BM=None):
        counts["attend"] += 1
        out = torch.nn.functional.scaled_dot_product_attention(q, k, v)
        return Marked.apply(out, f"attend {counts['attend'] - 1}", log)

    def then(x, out):
        counts["then"] += 1
        return Marked.apply(x + out, f"then {counts['then'] - 1}", log)

    region = shard.region.shape(grid)
    x = torch.ones(1, region.t, region.h * region.w, 24, requires_grad=True)
    with watched_transfers(log), mock.patch("opensora_dist.parallel.sequence.ulysses.attention", attend):
        out = shard.branch(attn, x, axis, before=lambda x, _frames: x, then=then)
        forward = list(log)
        log.clear()
        out.sum().backward()
    return forward, log


@pytest.mark.parametrize(
    "grid, axis", [(Thw(5, 3, 2), Axis.TIME), (Thw(2, 5, 2), Axis.SPACE), (Thw(5, 3, 2), Axis.JOINT)], ids=str
)
def test_transfers_are_under_way_while_other_pieces_are_worked_on_in_forward_and_in_backward(ranks, grid, axis):
    by_rank = ranks.run(_order, grid, axis, world=3)
    assert all(found == by_rank[0] for found in by_rank), "ranks differ in the order of their transfers"
    forward, backward = by_rank[0]
    pieces = 2 if axis is Axis.SPACE else 3  # two frames

    sends = [e for e in forward if e.startswith("send")]
    assert sends == [f"send {i}" for i in range(4 * pieces)]
    last_of_qkv = 3 * pieces - 1
    # All q, k and v are on their way before the first attention; piece 0 is attended to while the others' may still travel.
    assert forward.index(f"send {last_of_qkv}") < forward.index("attend 0") < forward.index("wait 3")
    for piece in range(pieces):
        send, wait = forward.index(f"send {last_of_qkv + 1 + piece}"), forward.index(f"wait {last_of_qkv + 1 + piece}")
        others = [f"attend {p}" for p in range(piece + 1, pieces)]
        others += [f"then {p}" for p in range(piece)] if axis is not Axis.JOINT else []
        assert all(send < forward.index(other) < wait for other in others), (piece, forward)

    # Backward: the outputs' gradients go first, last piece first, then those of v, k, q of each piece.
    first = 4 * pieces
    sends = [e for e in backward if e.startswith("send")]
    assert sends == [f"send {first + i}" for i in range(4 * pieces)]
    for place, piece in enumerate(reversed(range(pieces))):
        send, wait = backward.index(f"send {first + place}"), backward.index(f"wait {first + place}")
        others = [f"attend {p} back" for p in range(piece + 1, pieces)]
        others += [f"then {p} back" for p in range(piece)] if axis is not Axis.JOINT else []
        assert all(send < backward.index(other) < wait for other in others), (piece, backward)
        mine = [backward.index(f"wait {first + pieces + 3 * place + i}") for i in range(3)]
        assert all(backward.index(f"attend {p} back") < min(mine) for p in range(pieces)), "waited for before all were sent"


def test_the_blocking_form_has_nothing_under_way(ranks):
    for log in ranks.run(transfers, Pair("ulysses", "stdit", GRIDS["uneven"], overlap=False), world=2):
        assert len(log) == 2 * 2 * 2 * 2  # start and wait, two transfers, two blocks, two directions
        assert all(one.replace("send", "wait") == other for one, other in zip(log[::2], log[1::2]))
