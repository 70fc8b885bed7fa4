"""Tiny trainings handed to a cluster by ``opensora-dist submit``, and what they left."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from cluster import REPOSITORY, Cluster, wait_for
from training import curve, metrics

STEPS, EVERY = 24, 4
ON_NODES = Path(__file__).parent / "on_nodes"


@dataclass(frozen=True, kw_only=True)
class Run:
    """A run directory, and what the cluster knows of its newest submission."""

    cluster: Cluster
    folder: Path

    @property
    def submission(self) -> Path:
        """Folder of the newest."""
        return max((self.folder / "launch").glob("[0-9]*"))

    @property
    def job_ids(self) -> list[str]:
        """Slurm's, oldest first."""
        return json.loads((self.submission / "submission.json").read_text())["job_ids"]

    def step(self) -> int:
        """The last one of the metrics; 0 where there is none."""
        steps = metrics(self.folder) if (self.folder / "metrics.jsonl").exists() else []
        return steps[-1]["step"] if steps else 0

    def reaches(self, step: int, *, limit_s: float = 90) -> None:
        """Waits until a step was made."""
        wait_for(lambda: self.step() >= step, limit_s=limit_s, what=self.said)

    def ends(self, *, limit_s: float = 150) -> str:
        """Waits until the newest job is over; its state."""
        try:
            return self.cluster.ends(self.job_ids[-1], limit_s=limit_s)
        except AssertionError as error:
            raise AssertionError(f"{error}\n{self.said()}") from error

    def node_of(self, rank: int, *, ranks_per_node: int) -> str:
        """The host that runs a rank."""
        nodes = self.cluster.call("scontrol", "show", "hostnames", self.cluster.job(self.job_ids[-1])["NodeList"]).split()
        return nodes[rank // ranks_per_node]

    def attempts(self) -> list[dict[str, Any]]:
        """Lines of the attempts' history."""
        path = self.folder / "launch" / "attempts.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def starts(self) -> list[int]:
        """The steps that starts went on from."""
        path = self.folder / "restarts.jsonl"
        return [json.loads(line)["step"] for line in path.read_text().splitlines()] if path.exists() else []

    def logs(self) -> dict[str, str]:
        """Of ranks, by their path in ``logs/``, and of the batch scripts, by their names."""
        ranks = {str(p.relative_to(self.folder / "logs")): p for p in sorted((self.folder / "logs").rglob("*")) if p.is_file()}
        scripts = {p.name: p for p in sorted((self.folder / "launch").glob("*/slurm-*.log"))}
        return {name: path.read_text(errors="replace") for name, path in (ranks | scripts).items()}

    def said(self) -> str:
        """All that helps to see why a test failed."""
        logs = [f"=== {name}\n{text[-2500:]}" for name, text in self.logs().items()]
        return "\n".join(["=== attempts", *map(json.dumps, self.attempts()), *logs])

    def curve(self) -> list[tuple[Any, ...]]:
        """What must not depend on how the run came about, per step."""
        return curve(self.folder)


def site_file(path: Path, **sections: Any) -> Path:
    """A site's profile for the modelled cluster; a section's values are laid over its own."""
    variables = {"PYTHONPATH": f"{ON_NODES}:{REPOSITORY}", "OMP_NUM_THREADS": "1", "OPENSORA_TEST_PAUSE_S": "1"}
    ours: dict[str, Any] = {
        "slurm": {"partition": "main", "gpus": "none", "memory": None, "signal_s": 10},
        "node": {"python": sys.executable, "variables": variables},
        "network": {"interface": "eth0"},
        "preflight": {"enabled": False, "free_disk_gib": 0.1, "shared_memory_gib": 0.1},
    }
    for name, values in sections.items():
        ours[name] = {**ours.get(name, {}), **values}
    ours["node"]["variables"] = {**variables, **ours["node"]["variables"]}
    path.write_text(yaml.safe_dump(ours))
    return path
