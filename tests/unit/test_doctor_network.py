"""What ``doctor`` says of the network: names, interfaces, RDMA ports, and what NCCL and Gloo are told of them."""

from __future__ import annotations

import errno
import socket

import pytest

from opensora_dist.machine import network
from opensora_dist.machine.finding import Level


def _named(monkeypatch, address):
    def getaddrinfo(*_):
        if address is None:
            raise socket.gaierror(-2, "Name or service not known")
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, 0))]

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)


@pytest.mark.parametrize("address", ["127.0.1.1", None])
def test_a_host_name_that_others_would_not_find_is_warned_of(monkeypatch, address):
    _named(monkeypatch, address)
    (found,) = (f for f in network.network_findings({}) if f.name == "ranks use")
    assert found.level is Level.WARNING and "no other machine finds" in found.said and "GLOO_SOCKET_IFNAME=" in found.remedy


def test_the_interface_that_is_named_goes_before_the_host_name(monkeypatch):
    _named(monkeypatch, "127.0.1.1")
    eth = network.Interface(name="eth7", address="10.1.2.3", up=True, loopback=False, mbit_per_s=100_000, mtu=9000)
    assert network.rank_address({}, known=[eth]).loopback
    assert network.rank_address({"GLOO_SOCKET_IFNAME": "eth7,eth8"}, known=[eth]).address == "10.1.2.3"
    assert network.rank_address({"GLOO_SOCKET_IFNAME": "eth9"}, known=[eth]).address is None
    assert network._of_interface(eth).said == "100 Gbit/s, MTU 9000, up, 10.1.2.3"


def test_this_machine_has_a_loopback_with_an_address():
    (lo,) = (i for i in network.interfaces() if i.loopback)
    assert (lo.address, lo.up) == ("127.0.0.1", True)
    assert network.interface_finding(lo.name).level is Level.OK
    assert "there is no interface nope9" in str(network.interface_finding("nope9"))


@pytest.mark.parametrize("at", ["bind", "connect"])
def test_a_loopback_that_carries_nothing_is_a_problem_and_keeps_nobody_waiting(monkeypatch, at):
    def refuse(*args, **options):
        raise OSError(errno.ENETUNREACH, "Network is unreachable")

    monkeypatch.setattr(network, "_ANSWER_S", 0.2)
    monkeypatch.setattr(socket, {"bind": "create_server", "connect": "create_connection"}[at], refuse)
    found = network.loopback_finding()
    assert found.level is Level.PROBLEM and "127.0.0.1 can't be talked to" in found.said and "ip link set lo up" in found.remedy


def _ports(monkeypatch, folder, **states):
    for name, state in states.items():
        port = folder / "infiniband" / name / "ports/1"
        port.mkdir(parents=True, exist_ok=True)
        for file, text in (("state", state), ("rate", "400 Gb/sec (4X NDR)"), ("link_layer", "InfiniBand")):
            (port / file).write_text(text + "\n")
    monkeypatch.setattr(network, "_SYS", folder)


@pytest.mark.parametrize(
    "hcas, bad",
    [
        (None, []),
        ("mlx5_0", []),
        ("mlx5_0,mlx5_1", ["mlx5_1:1"]),
        ("mlx5", ["mlx5_1:1"]),
        ("=mlx5_1:1", ["mlx5_1:1"]),
        ("mlx5_0,mlx5_1:2", []),
        ("^mlx5_1", []),
        ("^=mlx5_0", ["mlx5_1:1"]),
        ("=mlx5", ["RDMA"]),
        ("mlx4", ["RDMA"]),
    ],
)
def test_an_rdma_port_that_is_down_is_a_problem_where_nccl_is_told_to_use_it(tmp_path, monkeypatch, hcas, bad):
    _ports(monkeypatch, tmp_path, mlx5_0="4: ACTIVE", mlx5_1="1: DOWN")
    found = network.rdma_findings(hcas)
    assert [f.name for f in found if f.level is Level.PROBLEM] == bad
    assert {f.name: f.level for f in found}["mlx5_0:1"] is Level.OK


@pytest.mark.parametrize(
    "value, level", [("lo", Level.OK), ("=lo", Level.OK), ("nope", Level.PROBLEM), ("=l", Level.PROBLEM), ("^docker", Level.OK)]
)
def test_interfaces_that_nccl_is_told_of_are_looked_for_by_its_rules(value, level):
    lo = [i for i in network.interfaces() if i.name == "lo"]
    assert network._of_nccl({"NCCL_SOCKET_IFNAME": value}, lo).level is level


def test_the_loopback_carries_something(monkeypatch):
    monkeypatch.setattr(network, "_LOOPBACK_S", 0.05)
    assert network.loopback_bytes_per_s() > 1e7
