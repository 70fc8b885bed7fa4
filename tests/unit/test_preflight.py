"""What a node reports of itself before a training, and whom the reports of all nodes blame."""

from __future__ import annotations

import json
import os

import fake_smi
import pytest

from opensora_dist.config.site import NetworkSite, PreflightSite, SiteConfig
from opensora_dist.core.io import write_json
from opensora_dist.machine import gpus, network
from opensora_dist.machine.blame import cut_off, slow_nodes
from opensora_dist.machine.finding import Finding, Level
from opensora_dist.recipes import preflight as recipe
from opensora_dist.recipes.preflight import preflight
from opensora_dist.recipes.verdict import verdict

NODES = ["node1", "node2", "node3"]
LINKS = {
    "world": 3,
    "nodes": {"node1": 1, "node2": 1, "node3": 1},
    "unreachable": [],
    "hidden": [],
    "silent": [],
    "all_reduce_bytes_per_s": 1e9,
    "all_to_all_bytes_per_s": 1e9,
    "pairs": [["node1", "node2", 1e9], ["node1", "node3", 1e9], ["node2", "node3", 1e9]],
    "problems": [],
}


# --- one node


@pytest.fixture
def smi(tmp_path, monkeypatch):
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    monkeypatch.setattr(gpus, "KERNEL_LOG", tmp_path / "no-log")
    return folder


def _site(**fields):
    least = {"free_disk_gib": 0.0, "shared_memory_gib": 0.0}
    return SiteConfig(preflight=PreflightSite(**{**least, **fields}))


def _look(tmp_path, *, site=None, num_gpus=0):
    report = preflight(site or _site(), node="node1", run_dir=tmp_path, gpus=num_gpus, folder=tmp_path / "preflight/7.0")
    written = json.loads((tmp_path / "preflight/7.0/node1.json").read_text())
    assert written["problems"] == list(report.problems) and written["commit"] == report.commit
    return report


def test_a_node_without_gpus_is_fit_and_reports_what_it_runs(tmp_path):
    report = _look(tmp_path)
    assert not report.problems and not report.shared
    assert report.packages["torch"] and {f["subject"] for f in report.findings} == {"disk", "limits"}


def test_gpus_and_kernels_are_looked_at_where_there_must_be_some(tmp_path, smi, monkeypatch):
    asked = {}
    broken = Finding(subject="kernels", name="attention", level=Level.PROBLEM, said="wrong", remedy="update torch")

    def kernels(**given):
        asked.update(given)
        return [broken]

    monkeypatch.setattr(recipe, "kernel_findings", kernels)
    fake_smi.put_smi(smi, *[fake_smi.GOOD] * 6, {**fake_smi.GOOD, "ecc.errors.uncorrected.volatile.total": "1"})
    report = _look(tmp_path, site=_site(clock_share=0.6, timeout_s=100), num_gpus=8)
    missing, ecc, kernel = report.problems
    assert "and 8 are expected" in missing and ecc.startswith("gpus, GPU 6: 1 memory errors") and kernel.endswith("update torch")
    assert 60.0 < asked.pop("timeout_s") < 100.0  # nearly all that is left
    assert asked == {"num_gpus": 7, "clock_share": 0.6}


def test_a_node_whose_rdma_port_is_down_is_unfit_where_the_site_names_it(tmp_path, smi, monkeypatch):
    port = tmp_path / "sys/infiniband/mlx5_1/ports/1"
    port.mkdir(parents=True)
    (port / "state").write_text("1: DOWN\n")
    monkeypatch.setattr(network, "_SYS", tmp_path / "sys")
    monkeypatch.setattr(recipe, "kernel_findings", lambda **given: [])
    fake_smi.put_smi(smi, fake_smi.GOOD)
    assert not _look(tmp_path, num_gpus=1).problems
    (said,) = _look(tmp_path, site=_site().model_copy(update={"network": NetworkSite(hcas="mlx5_0,mlx5_1")}), num_gpus=1).problems
    assert said.startswith("network, mlx5_1:1: unknown, unknown, 1: DOWN; look at its cable")


def test_too_little_space_in_the_run_directory_is_nobodys_fault(tmp_path):
    report = _look(tmp_path, site=_site(free_disk_gib=1e9))
    assert not report.problems and "1e+09 are needed" in report.shared[0]


def test_shared_memory_an_interface_and_a_run_directory_are_a_nodes_own(tmp_path):
    site = _site(shared_memory_gib=1e9).model_copy(update={"network": NetworkSite(interface="nope9")})
    report = preflight(site, node="node1", run_dir=tmp_path / "none", gpus=0, folder=tmp_path)
    said = " | ".join(report.problems)
    assert (
        "--shm-size" in said and "there is no interface nope9" in said and "none can't be written" in said and not report.shared
    )


# --- all nodes


def _write(folder, *, without=(), **changes):
    for node in NODES:
        if node not in without:
            report = {"problems": [], "shared": [], "commit": "aaa", "packages": {"torch": "2.13.0"}}
            write_json(folder / f"{node}.json", {"node": node, **report, **changes.get(node, {})})


def _write_links(folder, *, ended=("done", "done", "done"), **changes):
    for rank, how in enumerate(ended):
        if how != "never":
            write_json(
                folder / f"links/rank-{rank}.json",
                {"node": NODES[rank], "ended": how, "said": "" if how in (None, "done") else "ow"},
            )
    if changes.pop("found", True):
        write_json(folder / "links.json", {**LINKS, **changes})


def _judge(folder, *, commit="aaa"):
    return verdict(folder, NODES, commit=commit)


def test_nodes_that_are_all_well_are_fit(tmp_path):
    _write(tmp_path)
    assert _judge(tmp_path).code == 0
    _write_links(tmp_path)
    found = _judge(tmp_path)
    assert (found.code, dict(found.unfit), found.shared) == (0, {}, ())


def test_a_node_with_a_problem_or_without_a_report_is_unfit(tmp_path):
    _write(tmp_path, without=["node3"], node2={"problems": ["gpus, GPU 6: 1 memory errors; reset it"]})
    found = _judge(tmp_path)
    assert found.code == 30 and list(found.unfit) == ["node2", "node3"]
    assert found.unfit["node2"] == ("gpus, GPU 6: 1 memory errors; reset it",)
    assert "did not finish looking at itself" in found.unfit["node3"][0]


def test_what_all_nodes_share_is_blamed_on_none_and_nobody_is_left_out_for_it(tmp_path):
    full = "disk, free space: 1 GiB; free some"
    _write(tmp_path, node1={"shared": [full]}, node2={"shared": [full]}, node3={"problems": ["shm"]})
    found = _judge(tmp_path)
    assert found.code == 31 and found.shared == (full,)


def test_when_every_node_is_unfit_it_is_not_the_nodes(tmp_path):
    _write(tmp_path, **{node: {"problems": ["limits, shared memory: too small"]} for node in NODES})
    assert _judge(tmp_path).code == 31
    assert verdict(tmp_path, ["node1"], commit=None).code == 30  # a node alone has nobody to be compared with


@pytest.mark.parametrize("what", [{"commit": "bbb"}, {"packages": {"torch": "2.12.0"}}, {"packages": {}}])
def test_the_node_that_runs_something_else_is_unfit(tmp_path, what):
    _write(tmp_path, node1=what)
    found = _judge(tmp_path, commit="bbb")
    assert found.code == 30 and list(found.unfit) == ["node1"] and "install the same on all nodes" in found.unfit["node1"][0]


def test_a_commit_that_is_not_known_is_no_other_commit(tmp_path):
    _write(tmp_path, node1={"commit": None}, node2={"commit": None})
    assert _judge(tmp_path).code == 0


def test_of_two_commits_that_as_many_nodes_run_the_submitted_one_is_right(tmp_path):
    _write(tmp_path, node2={"commit": "bbb"})
    found = verdict(tmp_path, NODES[:2], commit="bbb")
    assert found.code == 30 and "has commit aaa, and others bbb" in found.unfit["node1"][0]
    found = verdict(tmp_path, NODES[:2], commit="ccc")
    assert found.code == 31 and "nodes differ in commit (node1 aaa, node2 bbb)" in found.shared[0]


@pytest.mark.parametrize(
    "ended, words",
    [
        (("done", None, "done"), "ended, or hung, while links were tried"),
        (("lost contact", None, "lost contact"), "ended, or hung, while links were tried"),
        (("done", "never", "done"), "started no rank"),
        (("lost contact", "error", "lost contact"), "failed while links were tried: ow"),
        (("lost contact", "no head", "lost contact"), "does not reach node1, and others do"),
    ],
)
def test_a_rank_that_fails_or_falls_silent_is_its_nodes(tmp_path, ended, words):
    _write(tmp_path)
    _write_links(tmp_path, ended=ended, found=False)
    found = _judge(tmp_path)
    assert found.code == 30 and list(found.unfit) == ["node2"] and words in " ".join(found.unfit["node2"])


@pytest.mark.parametrize("found", [False, True])
def test_a_head_that_nobody_reaches_is_the_heads_fault(tmp_path, found):
    _write(tmp_path)
    _write_links(tmp_path, ended=("done", "no head", "no head"), found=found, nodes={"node1": 1})
    found = _judge(tmp_path)
    assert found.code == 30 and list(found.unfit) == ["node1"] and "no other node reaches it" in found.unfit["node1"][0]


def test_of_two_nodes_that_do_not_reach_each_other_neither_is_blamed(tmp_path):
    _write(tmp_path)
    _write_links(tmp_path, ended=("done", "no head", "never"), world=2, nodes={"node1": 1})
    found = verdict(tmp_path, NODES[:2], commit="aaa")
    assert found.code == 31 and found.shared == ("the links could not be tried: ow; look at the job's log",)


def test_contact_that_all_lost_is_blamed_on_none(tmp_path):
    _write(tmp_path)
    _write_links(tmp_path, ended=("lost contact",) * 3, found=False)
    found = _judge(tmp_path)
    assert found.code == 31 and found.shared == ("the links could not be tried: ow; look at the job's log",)


def test_ranks_that_were_all_ended_from_outside_are_blamed_on_none(tmp_path):
    _write(tmp_path)
    _write_links(tmp_path, ended=(None,) * 3, found=False)
    assert _judge(tmp_path).code == 31


def test_a_node_that_hides_behind_its_loopback_or_did_not_come_is_unfit(tmp_path):
    _write(tmp_path)
    _write_links(tmp_path, hidden=["node2"])
    assert "network.interface" in _judge(tmp_path).unfit["node2"][0]
    _write_links(tmp_path, nodes={"node1": 1, "node3": 1}, ended=("done", None, "done"))
    assert list(_judge(tmp_path).unfit) == ["node2"]


def test_a_node_that_others_do_not_reach_is_unfit_and_one_bad_link_is_nobodys(tmp_path):
    _write(tmp_path)
    _write_links(tmp_path, unreachable=[["node1", "node3"], ["node2", "node3"]])
    found = _judge(tmp_path)
    assert found.code == 30 and list(found.unfit) == ["node3"]
    _write_links(tmp_path, unreachable=[["node1", "node3"]])
    found = _judge(tmp_path)
    assert found.code == 31 and "these don't reach each other: node1 and node3" in found.shared[0]


def test_a_floor_that_is_missed_is_blamed_on_the_node_whose_links_are_slow_or_on_none(tmp_path):
    _write(tmp_path)
    slow = [["node1", "node2", 1e8], ["node1", "node3", 1e9], ["node2", "node3", 1e8]]
    _write_links(tmp_path, pairs=slow, problems=["all-reduce: 0.1 GB/s"])
    found = _judge(tmp_path)
    assert found.code == 30 and dict(found.unfit) == {"node2": ("all-reduce: 0.1 GB/s",)}
    _write_links(tmp_path, problems=["all-reduce: 0.1 GB/s"])
    assert _judge(tmp_path).code == 31


@pytest.mark.parametrize("slower, code", [(3, 0), (40, 30)])
def test_without_a_floor_a_node_is_blamed_whose_links_are_more_than_four_times_slower(tmp_path, slower, code):
    _write(tmp_path)
    rates = [["node1", "node2", 1e9 / slower], ["node1", "node3", 1e9], ["node2", "node3", 1e9 / slower]]
    _write_links(tmp_path, pairs=rates)
    found = _judge(tmp_path)
    assert found.code == code and list(found.unfit) == ["node2"] * (code != 0)
    assert code == 0 or "40 times slower than others' (more than 4 times is too slow" in found.unfit["node2"][0]


def test_blame_is_the_fewest_nodes_that_explain_it():
    assert cut_off([("a", "c"), ("c", "b"), ("b", "c")]) == ["c"]
    assert cut_off([("a", "b")]) == [] and cut_off([]) == []
    assert cut_off([("a", "x"), ("b", "x"), ("c", "x"), ("a", "y"), ("b", "y")]) == ["x", "y"]
    fast, slow = 1e9, 1e8
    pairs = {("a", "b"): fast, ("a", "x"): slow, ("a", "y"): slow, ("b", "x"): slow, ("b", "y"): slow, ("x", "y"): slow}
    assert slow_nodes(pairs, share=0.5) == {"x": 0.1, "y": 0.1} and slow_nodes(pairs, share=0.1) == {}
    assert slow_nodes({("a", "b"): slow}, share=0.5) == {}
