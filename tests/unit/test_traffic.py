"""SentBytes counts what collectives send, whoever calls them, in forward and in backward."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as functional

from opensora_dist.parallel.sequence.exchange import Exchange
from opensora_dist.parallel.sequence.traffic import SentBytes
from opensora_dist.parallel.sequence.transfer import Transfer


def _known(world: int) -> dict[str, tuple[dict[str, int], int]]:
    rank, group = dist.get_rank(), dist.new_group(list(range(world)))
    x = torch.zeros(2 * world, 3)  # rows of 12 bytes
    row = 12
    parts = [torch.empty(2, 3) for _ in range(world)]
    to, source = (rank + 1) % world, (rank - 1) % world
    uneven = [r + 1 for r in range(world)]  # rank 0 gets one row of each, rank 1 two, ...
    received = torch.empty(world * uneven[rank], 3)

    def p2p() -> None:
        ops = [dist.P2POp(dist.isend, x, to, group), dist.P2POp(dist.irecv, torch.empty_like(x), source, group)]
        for work in dist.batch_isend_irecv(ops):
            work.wait()

    def uneven_all_to_all() -> None:
        send = torch.zeros(sum(uneven), 3)
        work = dist.all_to_all_single(received, send, [uneven[rank]] * world, uneven, group=group, async_op=True)
        work.wait()

    calls = {
        "even all-to-all": (lambda: dist.all_to_all_single(torch.empty_like(x), x, group=group), 2 * (world - 1) * row),
        "uneven all-to-all": (uneven_all_to_all, (sum(uneven) - uneven[rank]) * row),
        "all-to-all of lists": (lambda: functional.wait_tensor(functional.all_to_all_single(x, None, None, group)), 2 * (world - 1) * row),
        "send": (p2p, x.nbytes),
        "gather": (lambda: dist.all_gather(parts, torch.zeros(2, 3), group=group), 2 * (world - 1) * row),
        "reduce-scatter": (lambda: dist.reduce_scatter(torch.empty(2, 3), parts, group=group), 2 * (world - 1) * row),
        "all-reduce": (lambda: dist.all_reduce(x, group=group), 2 * (world - 1) * x.nbytes // world),
        "functional all-reduce": (
            lambda: functional.wait_tensor(functional.all_reduce(x, "sum", group)),
            2 * (world - 1) * x.nbytes // world,
        ),
        "broadcast": (lambda: dist.broadcast(x, 0, group=group), 0 if rank == world - 1 else x.nbytes),
        "barrier": (lambda: dist.barrier(group), 0),
    }  # fmt: skip
    found = {}
    for name, (call, expected) in calls.items():
        with SentBytes() as sent:
            call()
        found[name] = (dict(sent.by_collective), expected)
    return found


@pytest.mark.parametrize("world", [2, 3])
def test_each_collective_sends_what_is_known_of_it(ranks, world):
    for found in ranks.run(_known, world, world=world):
        for name, (by_collective, expected) in found.items():
            assert sum(by_collective.values()) == expected, (name, by_collective, expected)
            assert len(by_collective) <= 1, (name, by_collective)


def _there_and_back() -> tuple[int, int]:
    exchange = Exchange(dist.new_group([0, 1]))
    x = torch.zeros(4, 5, dtype=torch.float64, requires_grad=True)
    transfer = Transfer(exchange, send_rows=[2, 2], recv_rows=[2, 2], overlap=True, tape=None)
    with SentBytes() as forward:
        y = transfer.wait(transfer.issue(x))
    with SentBytes() as backward:
        y.sum().backward()
    return forward.total, backward.total


def test_backward_is_counted_where_autograd_runs_it(ranks):
    assert ranks.run(_there_and_back, world=2) == [(80, 80), (80, 80)]


def _unknown() -> str:
    group = dist.new_group([0, 1])
    into = [torch.zeros(2), torch.zeros(2)] if dist.get_rank() == 0 else None
    with pytest.raises(NotImplementedError) as caught, SentBytes():
        dist.gather(torch.zeros(2), into, dst=0, group=group)
    return str(caught.value)


def test_a_collective_that_is_not_known_is_refused_rather_than_left_out(ranks):
    assert all("c10d::gather_ is not counted" in said for said in ranks.run(_unknown, world=2))
