"""Nodes of a pool meet, run their ranks under torchrun, and end as node 0 decides: as processes, over this machine's loopback."""

from __future__ import annotations

import json
import multiprocessing
import os
import resource
import signal
import socket
import sys
import time
from contextlib import ExitStack, contextmanager
from pathlib import Path
from threading import Event, Timer

import pytest
from pool_jobs import SMALL_SITE, pool_job

from opensora_dist.launch.pools import AGAIN_CODE, SUBMISSION_VARIABLE, packed
from opensora_dist.launch.records import Record, read_record
from opensora_dist.recipes import pool as pool_module
from opensora_dist.recipes.pool import PoolNode, run_node

LIMIT_S = 60
# Stands for `opensora-dist`: `node begin` and `node end` answer as CODES says and note what they were asked; ranks do as RANKS says.
PROGRAM = """
import json, os, signal, sys, time
from pathlib import Path

if sys.argv[1] == "node":
    action, folder, attempt = sys.argv[2], Path(sys.argv[3]), sys.argv[5]
    with open(folder / "asked.jsonl", "a") as asked:
        asked.write(json.dumps([action, attempt, *sys.argv[6:]]) + "\\n")
    sys.exit(json.loads(os.environ["CODES"])[action])
rank = os.environ["RANK"]
print("rank", rank, "of", os.environ["WORLD_SIZE"], *sys.argv[1:], flush=True)
endings = Path(os.environ["OPENSORA_ENDINGS"])
assert endings.is_dir() and "OPENSORA_SUBMISSION" not in os.environ
if os.environ["RANKS"] == "wait":
    def stop(number, frame):
        print("saved", flush=True)
        sys.exit(0)
    signal.signal(signal.SIGUSR1, stop)
    (endings / f"ready-{rank}").touch()
    time.sleep(60)
if os.environ["RANKS"] == "late":
    time.sleep(0 if rank == "1" else 4)
    sys.exit(3)
sys.exit(int(os.environ["RANKS"]))
"""


def _free_port():
    """One whose neighbour, for torchrun, is free as well."""
    for port in range(20000 + os.getpid() % 10000, 64000, 2):
        with ExitStack() as stack:
            try:
                for number in (port, port + 1):
                    stack.enter_context(socket.create_server(("", number)))
            except OSError:
                continue
            return port
    raise AssertionError("no port is free")


def _end(node) -> int | None:
    node.join(timeout=LIMIT_S)
    return node.exitcode


class Pool:
    """A job's nodes, each a process."""

    def __init__(self, folder: Path, *, nodes: int, kind: str = "train") -> None:
        self.run_dir = folder / "run"
        self.submission = self.run_dir / "launch" / "0001"
        config = self.submission / "config.yaml"
        self.nodes, self.program = nodes, folder / "program.py"
        self.program.write_text(PROGRAM)
        self.job = pool_job(
            SMALL_SITE,
            kind=kind,
            nodes=nodes,
            gpus_per_node=0,
            run_dir=self.run_dir,
            folder=self.submission,
            config=config,
            argv=("train", str(config)),
        )

    @contextmanager
    def started(self, *, ranks: str, codes: dict[str, int]):
        # Forked, since each node would import torch for seconds otherwise.
        fork, port = multiprocessing.get_context("fork"), _free_port()
        variables = {SUBMISSION_VARIABLE: packed(self.job, backend="k8s"), "CODES": json.dumps(codes), "RANKS": ranks}
        nodes = [fork.Process(target=self._node, args=(rank, port, variables)) for rank in range(self.nodes)]
        for node in reversed(nodes):  # node 0 comes last
            node.start()
        try:
            yield nodes
        finally:
            for node in nodes:
                node.kill()
                node.join()

    def _node(self, rank: int, port: int, variables: dict[str, str]) -> None:
        os.environ.update(variables)
        node = PoolNode(rank=rank, nodes=self.nodes, head="127.0.0.1", port=port, grace_s=20, meet_s=30)
        os._exit(run_node(self.submission, node=node, program=(sys.executable, str(self.program))))

    def run(self, **given) -> list[int]:
        with self.started(**given) as nodes:
            return [_end(node) for node in nodes]

    def asked(self):
        return [json.loads(line) for line in (self.submission / "asked.jsonl").read_text().splitlines()]

    def log(self, attempt: int, rank: int) -> str:
        return (self.run_dir / "logs" / f"{self.job.id}.{attempt}" / f"node-{rank}" / f"rank-{rank}.log").read_text()


def test_two_nodes_run_one_world_and_end_as_node_0_decides(tmp_path, monkeypatch):
    monkeypatch.setattr(pool_module, "_DECIDE_S", 1.0)
    pool = Pool(tmp_path, nodes=2)
    first = f"{pool.job.id}.0"
    # A mistake ends ranks of node 1 while those of node 0 sit in a collective, for longer: all end for good, and nothing starts again.
    assert pool.run(ranks="late", codes={"begin": 0, "end": 11}) == [1, 1]
    assert pool.asked() == [["begin", first], ["end", first, "--code", "1"]]  # torchrun's code is 1 whatever happened
    assert read_record(pool.submission).job.max_requeues == pool.job.max_requeues
    assert (pool.submission / "config.yaml").read_text() == pool.job.config_text
    for rank in range(2):
        assert f"rank {rank} of 2 train {pool.submission / 'config.yaml'}" in pool.log(0, rank)
    # The next start has a name of its own, and nothing of the first one is taken for an answer.
    assert pool.run(ranks="0", codes={"begin": 20}) == [0, 0]
    assert pool.asked()[2:] == [["begin", f"{pool.job.id}.1"]]


def test_node_0_is_waited_for_as_long_as_its_connection_is_open(tmp_path, monkeypatch):
    monkeypatch.setattr(pool_module, "_DECIDE_S", 0.3)
    ours, heads = socket.socketpair()
    with ours, heads:
        decided = Timer(1.2, (tmp_path / "decision.json").write_text, ['{"code": 1}'])
        decided.start()
        assert pool_module._hear(tmp_path, ours) == 1
        decided.join()
        (tmp_path / "decision.json").unlink()
        heads.close()
        assert pool_module._hear(tmp_path, ours) == AGAIN_CODE


@pytest.mark.parametrize(("said", "answer"), [(b'"clips.0"\n', "clips.0"), (b"1\n", 1), (b'"cli', None), (b"", None)])
def test_half_a_line_of_node_0_is_no_answer(said, answer):
    ours, heads = socket.socketpair()
    with ours, heads:
        heads.sendall(said)
        assert pool_module._line(ours, Event(), time.monotonic() + 0.5) == answer


@pytest.mark.parametrize(
    ("backend", "device", "user", "limit", "warned"),
    [
        ("k8s", "rdma/hca", 10001, 8 << 20, True),
        ("k8s", "rdma/hca", 10001, resource.RLIM_INFINITY, False),
        ("k8s", "rdma/hca", 0, 8 << 20, False),
        ("k8s", None, 10001, 8 << 20, False),
        ("sky", "rdma/hca", 10001, 8 << 20, False),
    ],
)
def test_a_pod_that_may_not_pin_memory_for_rdma_says_so(backend, device, user, limit, warned, monkeypatch, caplog):
    monkeypatch.setattr(resource, "getrlimit", lambda _: (limit, limit))
    monkeypatch.setattr(os, "geteuid", lambda: user)
    site = SMALL_SITE.model_copy(update={"k8s": SMALL_SITE.k8s.model_copy(update={"rdma_resource": device})})
    with caplog.at_level("WARNING", logger=pool_module.__name__):
        pool_module._warn_of_locked_memory(Record(backend=backend, job=pool_job(site), job_ids=None, git=None, time=""))
    assert ("LimitMEMLOCK=infinity" in caplog.text) is warned


@pytest.mark.parametrize(("begin", "code"), [(20, 0), (21, 1)])
def test_where_there_is_nothing_to_begin_no_node_begins(tmp_path, begin, code):
    pool = Pool(tmp_path, nodes=3)
    assert pool.run(ranks="0", codes={"begin": begin}) == [code] * 3
    assert [words[0] for words in pool.asked()] == ["begin"] and not (pool.run_dir / "logs").exists()


def test_a_pod_that_is_told_to_stop_lets_its_ranks_save_and_asks_for_another_start(tmp_path):
    pool = Pool(tmp_path, nodes=1)
    ready = pool.submission / "endings" / f"{pool.job.id}.0" / "ready-0"
    with pool.started(ranks="wait", codes={"begin": 0, "end": 12}) as (node,):
        for _ in range(LIMIT_S * 10):
            if ready.exists():
                break
            assert node.is_alive()
            Event().wait(0.1)
        os.kill(node.pid, signal.SIGTERM)
        assert _end(node) == AGAIN_CODE
    assert "saved" in pool.log(0, 0) and pool.asked()[-1][0] == "end"


@pytest.mark.parametrize(("end", "code"), [(11, 1), (10, AGAIN_CODE)])
def test_a_benchmark_is_one_process_and_whether_it_starts_again_is_node_0s_word(tmp_path, end, code):
    pool = Pool(tmp_path, nodes=1, kind="bench")
    # Without torchrun it has no rank, which the stand-in takes for a mistake.
    assert pool.run(ranks="0", codes={"begin": 0, "end": end}) == [code]
    assert pool.asked()[-1] == ["end", f"{pool.job.id}.0", "--code", "1"]
