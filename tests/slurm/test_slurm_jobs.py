"""What a real Slurm must not do again, what it does in many parts, and which nodes it must not do it on."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from cluster import Cluster, wait_for
from dataset_factory import write_dataset
from runs import STEPS, Run, site_file
from training import SAMPLES

Submit = Callable[..., Run]


def test_a_run_whose_code_fails_is_not_started_again(submit: Submit, cluster: Cluster) -> None:
    run = submit(2, 1, node={"variables": {"OPENSORA_TEST_BUG_AT": "2"}})
    assert run.ends() == "FAILED"
    wait_for(lambda: not cluster.jobs(), limit_s=30, what=run.said)
    assert cluster.job(run.job_ids[-1])["Restarts"] == "0"
    assert any("ZeroDivisionError: a bug" in text for text in run.logs().values())
    assert run.starts() == [0]


def test_a_config_that_fails_on_the_nodes_alone_is_not_started_again(submit: Submit, cluster: Cluster, tmp_path: Path) -> None:
    """The data set is there when it is submitted, and gone when the job starts."""
    own = tmp_path / "own"
    write_dataset(own, samples=SAMPLES)
    cluster.call("scontrol", "update", "PartitionName=main", "State=DOWN")
    run = submit(2, 1, config=(f"data.path={own}",))
    shutil.move(own, tmp_path / "moved")
    cluster.call("scontrol", "update", "PartitionName=main", "State=UP")
    assert run.ends() == "FAILED"
    wait_for(lambda: not cluster.jobs(), limit_s=30, what=run.said)
    assert cluster.job(run.job_ids[-1])["Restarts"] == "0"
    assert any(str(own) in text for text in run.logs().values())


def test_a_node_that_fails_the_preflight_is_named_and_left_out(submit: Submit, cluster: Cluster) -> None:
    """Its /dev/shm is too small."""
    cluster.hosts.kill("node1")
    cluster.start_node("node1", spoil=["mount", "-t", "tmpfs", "-o", "size=32m", "tmpfs", "/dev/shm"])
    run = submit(2, 1, preflight={"enabled": True}, node={"variables": {"OPENSORA_TEST_PAUSE_S": "0"}})
    first = run.job_ids[0]
    wait_for(lambda: len(run.job_ids) == 2, limit_s=150, what=run.said)
    assert run.ends() == "COMPLETED", run.said()
    assert cluster.job(first)["ExcNodeList"] == "(null)"
    assert cluster.job(run.job_ids[1])["ExcNodeList"] == "node1"
    assert "node1" not in cluster.call("scontrol", "show", "hostnames", cluster.job(run.job_ids[1])["NodeList"]).split()
    assert any("node1" in text and "/dev/shm" in text for text in run.logs().values())
    assert run.step() == STEPS


@pytest.fixture
def videos(tmp_path: Path, cluster: Cluster) -> Path:
    cluster.call("opensora-dist", "data", "toy", tmp_path / "videos", "--clips", 6, "--sizes", "32x32", "--lengths", 8)
    return tmp_path / "videos"


def test_an_array_prepares_its_parts_and_a_last_job_makes_the_shards(cluster: Cluster, videos: Path, tmp_path: Path) -> None:
    out, site = tmp_path / "shards", site_file(tmp_path / "site.yaml")
    config = [
        f"input.path={videos}",
        f"output.path={out}",
        "clip.buckets=[[4, 32, 32]]",
        "codec.name=dct",
        "text.name=hash",
        "device=cpu",
    ]
    where = ["--backend", "slurm", "--gpus-per-node", 0, "--array", 2, "--site", site]
    cluster.call("opensora-dist", "submit", *where, "--", "data", "prepare", *config)
    wait_for(lambda: not cluster.jobs(), limit_s=150, what=cluster.logs)
    assert "6 samples" in (said := cluster.call("opensora-dist", "data", "check", out)) and "whole" in said
