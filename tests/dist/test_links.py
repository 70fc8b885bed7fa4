"""Ranks that come together before a training: who is missing, who isn't reached, how fast all are; and whom that blames."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from opensora_dist.core.errors import ConfigError
from opensora_dist.machine import links, meeting
from opensora_dist.machine.links import measure_links, rounds
from opensora_dist.machine.meeting import NoHeadError, Start, call_roll, leave, meet, start_of
from opensora_dist.machine.network import RankAddress
from opensora_dist.parallel.sequence.exchange import Exchange
from opensora_dist.recipes.verdict import verdict

ROOT = Path(__file__).parents[2]


# --- the meeting, with a thread for each rank


@pytest.fixture
def store():
    return dist.TCPStore("127.0.0.1", 0, 3, is_master=True, wait_for_workers=False)


def _rank(store, rank, *, timeout_s=20.0):
    start = Start(rank=rank, world=3, local_rank=0, address="127.0.0.1", port=store.port, hosted=True)
    own = meet(start, timeout_s=timeout_s)
    roll = call_roll(own, start, node=f"node{rank}", timeout_s=timeout_s)
    leave(own, start, timeout_s=0.1)
    return roll


def _meet(store, ranks, **options):
    with ThreadPoolExecutor(3) as pool:
        rolls = list(pool.map(lambda rank: _rank(store, rank, **options), ranks))
    assert all(roll == rolls[0] for roll in rolls)
    return rolls[0]


@pytest.fixture
def not_loopback(monkeypatch):
    """The loopback's other addresses stand for addresses that nodes have."""
    monkeypatch.setattr(meeting.ipaddress, "ip_address", lambda text: type("Address", (), {"is_loopback": False}))


def test_ranks_that_all_come_and_reach_each_other_are_whole(store, not_loopback):
    roll = _meet(store, range(3))
    assert roll.whole and roll.nodes == {"node0": [0], "node1": [1], "node2": [2]}


def test_a_rank_that_does_not_come_is_known_by_those_that_do(store, not_loopback):
    roll = _meet(store, [0, 2], timeout_s=1.0)
    assert not roll.whole and roll.nodes == {"node0": [0], "node2": [2]} and not roll.unreachable


def test_a_node_that_takes_no_connection_and_falls_silent_is_told_to_all(store, not_loopback):
    with socket.create_server(("127.0.0.1", 0)) as closed:
        port = closed.getsockname()[1]
    store.set("hello/1", json.dumps({"rank": 1, "node": "node1", "address": "127.0.0.1", "port": port}))
    roll = _meet(store, [0, 2], timeout_s=1.0)
    assert roll.unreachable == (("node0", "node1"), ("node2", "node1")) and roll.silent == ("node1",) and not roll.whole


def test_nodes_that_would_tell_others_an_address_of_the_loopback_are_told(store, monkeypatch):
    monkeypatch.setattr(meeting, "rank_address", lambda: RankAddress(address="127.0.0.1", said_by="the host name x"))
    roll = _meet(store, range(3))
    assert roll.hidden == ["node0", "node1", "node2"] and not roll.whole


def test_a_head_that_is_not_there_is_an_error_of_its_own():
    with socket.create_server(("127.0.0.1", 0)) as closed:
        port = closed.getsockname()[1]
    with pytest.raises(NoHeadError, match=f"127.0.0.1:{port}, where all ranks meet, can't be reached within 0.3 s"):
        meet(Start(rank=1, world=2, local_rank=0, address="127.0.0.1", port=port, hosted=False), timeout_s=0.3)


def test_ranks_are_counted_by_torchrun_or_else_by_slurm():
    place = {"MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "29500"}
    slurm = {"SLURM_PROCID": "3", "SLURM_NTASKS": "4", "SLURM_LOCALID": "1"}
    torchrun = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "2", "TORCHELASTIC_USE_AGENT_STORE": "True"}
    assert start_of({**place, **slurm}) == Start(rank=3, world=4, local_rank=1, address="10.0.0.1", port=29500, hosted=False)
    assert start_of({**place, **slurm, **torchrun}) == Start(
        rank=5, world=8, local_rank=2, address="10.0.0.1", port=29500, hosted=True
    )
    with pytest.raises(ConfigError, match="not set: SLURM_PROCID, SLURM_NTASKS, SLURM_LOCALID, MASTER_PORT"):
        start_of({"MASTER_ADDR": "10.0.0.1"})


# --- rates


@pytest.mark.parametrize("count", range(8))
def test_every_two_nodes_meet_once(count):
    seen = []
    for partners in rounds(count):
        assert all(partners[other] == i for i, other in enumerate(partners) if other is not None)
        seen += [(i, other) for i, other in enumerate(partners) if other is not None and i < other]
    assert sorted(seen) == [(i, j) for i in range(count) for j in range(i + 1, count)]


def _measure(nodes):
    with mock.patch.object(links, "_LONG_S", 0.0):  # the smallest size alone
        rates = measure_links(Exchange(dist.group.WORLD), device=torch.device("cpu"), nodes=nodes)
    return rates.all_reduce_bytes_per_s, rates.all_to_all_bytes_per_s, rates.pairs


@pytest.mark.parametrize(
    "nodes, pairs",
    [({"a": [0], "b": [1], "c": [2]}, ["ab", "ac", "bc"]), ({"a": [0, 2], "b": [1]}, ["ab"]), ({"a": [0, 1, 2]}, [])],
)
def test_rates_of_all_ranks_and_of_every_two_nodes_are_the_same_on_every_rank(ranks, nodes, pairs):
    found = ranks.run(_measure, nodes, world=3)
    assert found[0] == found[1] == found[2]
    reduce, all_to_all, of_pairs = found[0]
    assert (
        min(reduce, all_to_all) > 1e6
        and ["".join(pair) for pair in of_pairs] == pairs
        and all(r > 1e6 for r in of_pairs.values())
    )


# --- all of it, as processes

_SCRIPT = """
import os, sys
from pathlib import Path
from opensora_dist.config.site import PreflightSite, SiteConfig
from opensora_dist.recipes.preflight import links
folder, node, floor = sys.argv[1:]
site = SiteConfig(preflight=PreflightSite(timeout_s=90, all_reduce_gb_per_s=float(floor)))
code = links(site, node=node, folder=Path(folder), device="cpu")
os._exit(code)
"""


def _links(folder, *, nodes, floor):
    """Exit codes of ``links``, as Slurm would start it."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    base = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    with ExitStack() as stack:
        started = []
        for rank, node in enumerate(nodes):
            slurm = {"SLURM_PROCID": str(rank), "SLURM_NTASKS": str(len(nodes)), "SLURM_LOCALID": str(rank)}
            place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
            command = [sys.executable, "-c", _SCRIPT, str(folder), node, str(floor)]
            started.append(stack.enter_context(subprocess.Popen(command, env={**base, **slurm, **place})))
            stack.callback(started[-1].kill)
        return [process.wait(timeout=100) for process in started]


def test_a_floor_that_no_rank_can_meet_is_reported_by_all_and_blamed_on_none(tmp_path):
    assert _links(tmp_path, nodes=["here", "here"], floor=1e6) == [1, 1]
    found = json.loads((tmp_path / "links.json").read_text())
    assert found["nodes"] == {"here": 2} and found["all_to_all_bytes_per_s"] > 1e6
    assert "preflight.all_reduce_gb_per_s=1e+06" in found["problems"][0]
    assert {json.loads(path.read_text())["ended"] for path in (tmp_path / "links").iterdir()} == {"done"}
    (tmp_path / "here.json").write_text(json.dumps({"problems": [], "shared": [], "commit": "a", "packages": {}}))
    judged = verdict(tmp_path, ["here"], commit="a")
    assert judged.code == 31 and judged.shared == tuple(found["problems"])
