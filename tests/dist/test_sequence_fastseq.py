"""FastSeq: the model of one process, the bytes of its formula, and matrix products beside every hop of its rings."""

from __future__ import annotations

import itertools
from contextlib import contextmanager
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from sequence_cases import compute, make_inputs
from sequence_pair import TOLERANCE, Pair, Products, errors, half_precision, living_tapes, make_mesh, sent

from opensora_dist.core.types import Axis, Thw
from opensora_dist.models.layers import SelfAttention
from opensora_dist.parallel.keys import Keys
from opensora_dist.parallel.sequence.base import Shard, split_sizes
from opensora_dist.parallel.sequence.exchange import Exchange, Pending
from opensora_dist.parallel.sequence.fastseq import FastSeq
from opensora_dist.parallel.sequence.hops import RingGather, RingReduce
from opensora_dist.parallel.sequence.local import Local, whole

# Even; uneven frames, and places that 3 pieces don't divide; one frame, so by rows; fewer places than pieces.
GRIDS = (Thw(4, 4, 3), Thw(7, 5, 2), Thw(1, 5, 2), Thw(5, 1, 2))
FORMS = ((False, 1), (True, 1), (True, 3))
DW = ("gather", "keep")


def _pairs(*, models=("stdit", "dit"), grids=GRIDS, recompute=("none", "full"), forms=FORMS, dw=DW):
    return [
        Pair("fastseq", model, grid, recompute=again, overlap=overlap, chunks=chunks, dw=form)
        for model, grid, again, (overlap, chunks), form in itertools.product(models, grids, recompute, forms, dw)
        if chunks == 1 or model != "dit"  # a joint attention is not cut
    ]


@pytest.mark.parametrize("model", ["stdit", "dit"])
@pytest.mark.parametrize("world", [2, 3, 4])
def test_fastseq_gives_the_output_and_every_gradient_of_one_process(ranks, world, model):
    pairs = _pairs(models=(model,))
    for found in ranks.run(errors, pairs, world=world):
        assert len(found) == len(pairs) and max(found.values()) <= TOLERANCE, found


@pytest.mark.parametrize("world", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_every_form_sends_the_bytes_of_its_formula(ranks, world):
    pairs = _pairs()
    for found in ranks.run(sent, pairs, world=world):
        assert all(counted == formula for counted, formula in found), list(zip(pairs, found))


def test_with_even_parts_it_sends_mu_m_and_mu_m_over_p_each_way_and_mu_m_to_gather_again(ranks):
    P, M = 4, 2 * GRIDS[0].volume * 24 * 8  # two samples, width 24, float64
    pairs = _pairs(models=("stdit",), grids=GRIDS[:1])
    for found in ranks.run(sent, pairs, world=P):
        for pair, (counted, _) in zip(pairs, found, strict=True):
            once = (P - 1) * M // P + (P - 1) * M // P**2
            again = (P - 1) * M // P if pair.dw == "gather" else 0
            assert counted == (2 * once, 2 * (once + again)), pair  # of two blocks


def test_under_autocast_bfloat16_travels_and_results_are_near_one_process(ranks):
    pairs = _pairs(grids=GRIDS[1:3], recompute=("none",), forms=FORMS[1:], dw=DW[:1])
    for found in ranks.run(half_precision, pairs, world=3):
        for dtypes, *differences in found:
            assert dtypes == {torch.bfloat16}
            assert max(differences) < 0.02


def test_what_a_recomputed_block_keeps_is_freed_with_its_graph(ranks):
    pairs = _pairs(models=("stdit",), grids=GRIDS[:1], recompute=("full",), forms=FORMS[2:])
    assert ranks.run(living_tapes, pairs, world=2) == [[0] * len(pairs)] * 2


def test_heads_that_the_ranks_do_not_divide_are_refused_with_a_way_out():
    scheme = FastSeq(overlap=True, chunks=1, keep_gathered=False)
    assert not scheme.problems(Thw(4, 4, 4), size=3, heads=12, joint=True)
    (problem,) = scheme.problems(Thw(4, 4, 4), size=4, heads=6, joint=True)
    for said in ("parallel.sp.degree=4", "model.heads=6", "1, 2, 3, 6", "parallel.sp.scheme=ring"):
        assert said in problem
    (problem,) = scheme.problems(Thw(4, 4, 4), size=4, heads=6, joint=False)
    assert "parallel.sp.scheme=dsp" in problem


# --- the rings


def _rings():
    """Three gathers and three sums in flight at once between the same ranks; every rank's part has a size of its own."""
    exchange = make_mesh().links[dist.get_world_size()].sp
    rank, size, pieces = exchange.rank, exchange.size, 3
    lengths = [3, 1, 4, 2][:size]

    def part(owner, piece, by=0):
        return torch.full((lengths[owner], 2, 3), 100.0 * piece + 10.0 * owner + by)

    for by, keep in itertools.product((1, -1), (False, True)):
        gathers = [RingGather(exchange, lengths=lengths, by=by, overlap=True, keep=keep) for _ in range(pieces)]
        for piece, gather in enumerate(gathers):
            gather.start(part(rank, piece))
        for hop in range(1, size):
            for piece, gather in enumerate(gathers):
                assert torch.equal(gather.next(), part((rank - by * hop) % size, piece)), (by, hop, piece)
    sums = [RingReduce(exchange, lengths=lengths, by=-1, overlap=True) for _ in range(pieces)]
    for hop in range(1, size):
        for piece, total in enumerate(sums):
            arrived, product = total.arrived(), part((rank + hop) % size, piece, by=rank)
            total.send(product if arrived is None else arrived.add_(product))
    for piece, total in enumerate(sums):
        others = [part(rank, piece, by=other) for other in range(size) if other != rank]
        assert torch.equal(total.finish(), torch.stack(others).sum(0))


@pytest.mark.parametrize("world", [2, 3, 4])
def test_rings_in_flight_together_keep_their_parts_apart(ranks, world):
    ranks.run(_rings, world=world)


# --- one attention


def _attention():
    """Its module, its input of whole sequences over time, and what its output is weighted with."""
    attn = SelfAttention(24, heads=12).double()
    with torch.no_grad():
        for name, parameter in attn.named_parameters():
            parameter.normal_(std=0.1, generator=Keys(1).generator(name))
    x, weight = (torch.empty(2, 5, 6, 24, dtype=torch.float64).normal_(generator=Keys(2).generator(name)) for name in "xw")
    return attn, x, weight


def _shard(*, keep=False, overlap=True, chunks=1):
    size = dist.get_world_size()
    scheme = FastSeq(overlap=overlap, chunks=chunks, keep_gathered=keep)
    sizes, links = split_sizes(5, size), make_mesh().links[size]
    return Shard(grid=Thw(5, 3, 2), by_rows=False, sizes=sizes, scheme=scheme, local=Local(), links=links)


def _gradients(attn, x, weight, shard):
    """Of the input and of each parameter, where they are wanted."""
    attn.zero_grad()
    x = x.detach().requires_grad_(x.requires_grad)
    (shard.branch(attn, x, Axis.TIME, before=lambda x, _frames: x, then=lambda _x, out: out) * weight).sum().backward()
    return x.grad, {name: p.grad for name, p in attn.named_parameters() if p.grad is not None}


def _frozen(frozen, wants_dx):
    attn, x, weight = _attention()
    for name, parameter in attn.named_parameters():
        parameter.requires_grad_(name not in frozen)
    x.requires_grad_(wants_dx)
    dx, wanted = _gradients(attn, x, weight, whole(Thw(5, 3, 2)))
    for keep in (False, True):
        shard = _shard(keep=keep, chunks=2)
        frames = slice(shard.region.t0, shard.region.t1)
        my_dx, found = _gradients(attn, x[:, frames], weight[:, frames], shard)
        assert (my_dx is None) == (not wants_dx)
        if my_dx is not None:
            torch.testing.assert_close(my_dx, dx[:, frames], rtol=0, atol=1e-12)
        assert found.keys() == wanted.keys() == {name for name, p in attn.named_parameters() if p.requires_grad}
        for name, grad in found.items():
            dist.all_reduce(grad)
            torch.testing.assert_close(grad, wanted[name], rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    "frozen, wants_dx",
    [(("qkv.weight",), True), (("qkv.weight", "qkv.bias"), True), (("qkv.bias",), True), ((), False), (("qkv.weight",), False)],
)
def test_what_is_frozen_gets_no_gradient_and_the_rest_its_own(ranks, frozen, wants_dx):
    ranks.run(_frozen, frozen, wants_dx, world=3)


def _half_precision_gradients():
    """Of each parameter, the relative difference from one process, both under autocast."""
    attn, x, weight = _attention()
    attn, x, weight, shard = attn.float(), x.float(), weight.float(), _shard(chunks=3)
    frames = slice(shard.region.t0, shard.region.t1)
    with torch.autocast("cpu", torch.bfloat16):
        _, wanted = _gradients(attn, x, weight, whole(Thw(5, 3, 2)))
        _, found = _gradients(attn, x[:, frames], weight[:, frames], shard)
    for grad in found.values():
        assert grad.dtype == torch.float32
        dist.all_reduce(grad)
    return {name: ((found[name] - grad).norm() / grad.norm()).item() for name, grad in wanted.items()}


def test_under_autocast_every_gradient_is_near_that_of_one_process(ranks):
    for found in ranks.run(_half_precision_gradients, world=3):
        assert len(found) == 4 and max(found.values()) < 0.01, found


def _saved_numbers():
    """Numbers kept for backward by one attention, without and with ``keep_gathered``, each tensor's storage once."""
    found = []
    for keep in (False, True):
        attn, x, _ = _attention()
        shard, storages = _shard(keep=keep, chunks=3), {}

        def pack(tensor, storages=storages):
            storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes() // tensor.element_size()
            return tensor

        frames = slice(shard.region.t0, shard.region.t1)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            out = shard.branch(attn, x[:, frames].requires_grad_(), Axis.TIME, before=lambda x, _: x, then=lambda _x, out: out)
        found.append(sum(storages.values()))
        out.sum().backward()
    return found, sum(shard.lengths(Axis.TIME)) - shard.lengths(Axis.TIME)[shard.rank]


def test_only_keep_holds_the_tokens_of_other_ranks_until_backward(ranks):
    for (gather, keep), others in ranks.run(_saved_numbers, world=3):
        assert keep - gather == others * 2 * 6 * 24


# --- what hides what


@contextmanager
def _watched():
    """The order of "send"s and "wait"s, each with a kind and a number, and of products."""
    log, numbers, shift, all_to_all, wait = [], {}, Exchange.shift, Exchange.all_to_all, Pending.wait

    def noted(kind, start):
        def call(self, *args, **kwargs):
            pending = start(self, *args, **kwargs)
            numbers[pending] = f"{kind}{kwargs.get('by', '')} {len(numbers)}"
            log.append(f"send {numbers[pending]}")
            return pending

        return call

    def noted_wait(self):
        if self._works:
            log.append(f"wait {numbers[self]}")
        return wait(self)

    with (
        mock.patch.object(Exchange, "shift", noted("hop", shift)),
        mock.patch.object(Exchange, "all_to_all", noted("back", all_to_all)),
        mock.patch.object(Pending, "wait", noted_wait),
        Products(log),
    ):
        yield log


def _logs(pair):
    """Of forward and of backward."""
    model, shard = pair.network(), pair.shard(make_mesh())
    with _watched() as log:
        compute(model, make_inputs(pair.shape, group=0), shard=shard, between=lambda: log.append("backward"))
    at = log.index("backward")
    return log[:at], log[at + 1 :]


def _in_flight(log):
    """Products between the send and the wait of each transfer."""
    return {
        event: log[at : log.index(event.replace("send", "wait"))].count("product")
        for at, event in enumerate(log)
        if event.startswith("send")
    }


@pytest.mark.parametrize("dw, world", [("gather", 2), ("gather", 3), ("keep", 3)])
@pytest.mark.parametrize("recompute", ["none", "full"])
def test_products_run_beside_every_transfer_in_forward_and_backward(ranks, recompute, world, dw):
    pair = Pair("fastseq", "stdit", GRIDS[0], recompute=recompute, chunks=3, dw=dw)
    by_rank = ranks.run(_logs, pair, world=world)
    assert all(logs == by_rank[0] for logs in by_rank), "ranks send in different orders"
    forward, backward = map(_in_flight, by_rank[0])
    rings = {"gather": 2, "keep": 1}[dw]
    assert len(forward) == 2 * 3 * (world - 1 + 1) and len(backward) == 2 * 3 * (rings * (world - 1) + 1)
    assert min(forward.values()) >= 1 and min(backward.values()) >= 1, (forward, backward)


@pytest.mark.parametrize("dw", DW)
def test_nothing_runs_beside_a_transfer_of_the_blocking_form(ranks, dw):
    for logs in ranks.run(_logs, Pair("fastseq", "stdit", GRIDS[0], overlap=False, dw=dw), world=3):
        assert not any(count for log in logs for count in _in_flight(log).values())


def test_all_pieces_are_sent_at_once_and_x_again_before_backward_does_anything_else(ranks):
    (forward, backward), _ = ranks.run(_logs, Pair("fastseq", "stdit", GRIDS[0], chunks=3), world=2)
    sends = [at for at, event in enumerate(forward) if event.startswith("send hop")]
    assert "wait" not in "".join(forward[sends[0] : sends[2]])
    assert [event.rpartition(" ")[0] for event in backward if event != "product"][:7] == [
        "send hop-1",  # of x, for the last piece
        "send back",  # its output's gradient
        "send hop-1",
        "send back",
        "send hop-1",
        "send back",
        "wait back",
    ]
