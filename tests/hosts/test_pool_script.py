"""What pods and rented machines run, taken from the manifests and run on two modelled hosts: trained, killed, told to stop, started again.

No cluster and no cloud is here: the variables that Kubeflow Trainer and SkyPilot set, and what each does with an exit code, are played.
`make test-hosts` runs these, as root.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path
from threading import Event

import pytest
import yaml
from fake_schedulers import Scheduler
from pool_jobs import as_kubernetes_reads
from training import curve, metrics, overrides

from opensora_dist.cli.main import main
from opensora_dist.launch.pools import AGAIN_CODE, SUBMISSION_VARIABLE

ROOT = Path(__file__).parents[2]
NAMES = ("pod0", "pod1")
LIMIT_S = 150.0
STEPS = 40
STEPS_SET = f"run.steps={STEPS}"
SAVES = ["checkpoint.every_steps=2", "checkpoint.asynchronous=false", "run.log_every=1", "parallel.timeout_s=60"]

pytestmark = pytest.mark.timeout(900)  # three starts of torchrun on two hosts, and a minute that a host's last word is waited for


@pytest.fixture(scope="module")
def never_stopped(data, tmp_path_factory):
    """What the same training gives in one go, with both ranks on this machine."""
    folder = tmp_path_factory.mktemp("one")
    command = [str(ROOT / "launch/torchrun.sh"), "--nproc", "2", "train", *overrides(data, folder / "run", *SAVES, STEPS_SET)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "PYTHON": sys.executable}
    subprocess.run(command, env=environment, check=True, timeout=LIMIT_S)
    return curve(folder / "run")


class Submitted:
    """A training of two nodes, submitted to a stand-in for the scheduler; its nodes are started here."""

    def __init__(self, backend: str, folder: Path, data: Path, hosts, monkeypatch, *args: str) -> None:
        self.run_dir, self._hosts, self._backend = folder / "run", hosts, backend
        site = folder / "site.yaml"
        pool = {"k8s": {"image": "x", "claims": {"runs": str(folder)}}, "sky": {"volumes": {str(folder): "runs"}}}[backend]
        site.write_text(yaml.safe_dump({backend: pool, "node": {"python": sys.executable}, "preflight": {"enabled": False}}))
        scheduler = Scheduler(backend, folder / "scheduler")
        monkeypatch.setenv("PATH", f"{scheduler.path}{os.pathsep}{os.environ['PATH']}")
        # Kept where no node looks for it: they have what the manifest brings along.
        options = ["--backend", backend, "--nodes", "2", "--gpus-per-node", "0", "--max-requeues", "2", "--name", "pool"]
        words = ["submit", *options, "--site", str(site), "--records", str(folder / "records")]
        assert main([*words, "--", "train", *overrides(data, self.run_dir, *SAVES, *args)]) == 0
        (manifest,) = (folder / "records").glob("launch/0001/t*.yaml")
        self.manifest = yaml.safe_load(manifest.read_text())

    def _node(self, rank: int) -> tuple[str, dict[str, str]]:
        """Its script, and its variables."""
        addresses = [host.address for host in self._hosts.values()]
        if self._backend == "k8s":
            trainer = self.manifest["spec"]["trainer"]
            given = {e["name"]: as_kubernetes_reads(e["value"]) for e in trainer["env"]}
            return as_kubernetes_reads(trainer["args"][0]), {
                **given,
                "PET_NODE_RANK": str(rank),
                "PET_MASTER_ADDR": NAMES[0],
                "PET_NNODES": "2",
            }
        given = {"SKYPILOT_NODE_RANK": str(rank), "SKYPILOT_NODE_IPS": "\n".join(addresses), "SKYPILOT_NUM_NODES": "2"}
        return self.manifest["run"], {**self.manifest["envs"], **given}

    @contextmanager
    def started(self):
        nodes = []
        try:
            for rank, host in enumerate(self._hosts.values()):
                script, variables = self._node(rank)
                environment = {
                    "OMP_NUM_THREADS": "1",
                    "PYTHONPATH": str(ROOT),
                    "RES_OPTIONS": "timeout:1 attempts:1",
                    **os.environ,
                    **variables,
                }
                nodes.append(subprocess.Popen(host.command(["bash", "-c", script]), env=environment, stdin=subprocess.DEVNULL))
            yield nodes
        finally:
            for name in NAMES:
                self._hosts.kill(name)
            for node in nodes:
                node.wait()

    def run(self) -> list[int]:
        with self.started() as nodes:
            return [node.wait(LIMIT_S) for node in nodes]

    def steps_done(self) -> int:
        return len(metrics(self.run_dir)) if (self.run_dir / "metrics.jsonl").exists() else 0

    def wait_for_steps(self, count: int, nodes) -> None:
        until = time.monotonic() + LIMIT_S
        while self.steps_done() < count:
            assert all(node.poll() is None for node in nodes) and time.monotonic() < until
            Event().wait(0.05)

    def attempts(self) -> list[dict]:
        return [json.loads(line) for line in (self.run_dir / "launch" / "attempts.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("backend", ["k8s", "sky"])
def test_a_host_that_dies_starts_all_again_from_the_last_checkpoint(backend, hosts, data, never_stopped, tmp_path, monkeypatch):
    job = Submitted(backend, tmp_path, data, hosts, monkeypatch, STEPS_SET)
    with job.started() as nodes:
        job.wait_for_steps(5, nodes)
        hosts.kill(NAMES[1])
        assert nodes[0].wait(LIMIT_S) == AGAIN_CODE
    assert job.run() == [0, 0]
    began = [json.loads(line)["step"] for line in (job.run_dir / "restarts.jsonl").read_text().splitlines()]
    assert began[0] == 0 and began[1] >= 4 and curve(job.run_dir) == never_stopped
    assert len(list((job.run_dir / "logs").glob("*/node-*/rank-*.log"))) == 4
    # Started once more, as a pod is whose machine went after the end: there is nothing to do, and all say so.
    assert job.run() == [0, 0] and job.steps_done() == STEPS


def test_the_head_that_dies_is_no_word_and_the_other_asks_for_another_start(hosts, data, tmp_path, monkeypatch):
    job = Submitted("k8s", tmp_path, data, hosts, monkeypatch, "run.steps=4000")
    with job.started() as nodes:
        job.wait_for_steps(3, nodes)
        hosts.kill(NAMES[0])
        assert nodes[1].wait(LIMIT_S) == AGAIN_CODE


def test_a_pod_that_is_told_to_stop_has_all_ranks_saved_and_the_next_start_goes_on(
    hosts, data, never_stopped, tmp_path, monkeypatch
):
    job = Submitted("k8s", tmp_path, data, hosts, monkeypatch, STEPS_SET, "checkpoint.every_steps=1000")
    with job.started() as nodes:
        job.wait_for_steps(3, nodes)
        nodes[1].send_signal(signal.SIGTERM)
        assert [node.wait(LIMIT_S) for node in nodes] == [AGAIN_CODE, AGAIN_CODE]
    stopped = json.loads((job.run_dir / "STOPPED").read_text())
    assert job.steps_done() == stopped["step"] < STEPS
    assert job.run() == [0, 0]
    assert curve(job.run_dir) == never_stopped


def test_a_mistake_is_never_started_again(hosts, data, tmp_path, monkeypatch):
    job = Submitted("sky", tmp_path, data, hosts, monkeypatch, "run.steps=4")
    job.manifest["envs"][SUBMISSION_VARIABLE] = job.manifest["envs"][SUBMISSION_VARIABLE].replace("device: cpu", "device: cuda")
    assert job.run() == [1, 1]
    assert job.run() == [1, 1]
    assert sum(line["event"] == "begin" for line in job.attempts()) == 1  # the second one was refused before its ranks began
