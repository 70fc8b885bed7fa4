"""A sweep of benchmarks as a job of a real Slurm: each point over as many of the job's nodes as it asks for."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from cluster import REPOSITORY, Cluster

GRID = """
device: cpu
ranks_per_node: 1
rounds: 1
warmup: 0
steps: 1
timeout_s: 60
grid: {nodes: [1, 2, 3], depth: [1], width: [16], heads: [2], clip: [2x4x4], text_tokens: [3], sp: [1, 2]}
"""


def test_a_sweep_runs_each_point_over_the_first_nodes_of_its_job(cluster: Cluster, tmp_path: Path) -> None:
    grid, out = tmp_path / "sweep.yaml", tmp_path / "out"
    grid.write_text(GRID)
    variables = {"PYTHON": sys.executable, "PYTHONPATH": REPOSITORY, "OMP_NUM_THREADS": 1, "GLOO_SOCKET_IFNAME": "eth0"}
    export = ",".join(["ALL", *(f"{name}={value}" for name, value in variables.items())])
    options = ["--parsable", "--nodes=2", f"--output={tmp_path}/job.out", f"--export={export}"]
    job = cluster.call("sbatch", *options, REPOSITORY / "launch/slurm/bench.sbatch", grid, out).strip()
    state = cluster.ends(job, limit_s=200)
    assert state == "COMPLETED", (tmp_path / "job.out").read_text()
    found = {tuple(p["point"][key] for key in ("nodes", "sp")): p for p in json.loads((out / "sweep.json").read_text())["points"]}
    ran = {key: point["result"]["world"] for key, point in found.items() if point["state"] == "done"}
    assert ran == {(1, 1): 1, (2, 1): 2, (2, 2): 2}
    assert "--sp=2 must divide the 1 ranks" in found[1, 2]["reason"]
    assert f"nodes=3, and the Slurm job {job} has 2 nodes" in found[3, 1]["reason"]
    hosts = {found[key]["result"]["environment"]["host"] for key in ran}
    assert hosts == {cluster.call("scontrol", "show", "hostnames", cluster.job(job)["NodeList"]).split()[0]}
    assert (out / "efficiency.svg").exists()
