"""A cluster for each of pytest's processes, and what its tests share. ``make test-slurm`` runs them; they need root and Debian's Slurm."""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from cli_process import cli
from cluster import Cluster, install_slurm, slurm_cluster
from dataset_factory import write_dataset
from runs import EVERY, STEPS, Run, site_file
from training import SAMPLES, overrides

from opensora_dist.recipes.bench.hosts import hosts_problems

NODES = 4


@pytest.fixture(scope="session")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of all of pytest's processes."""
    own = tmp_path_factory.getbasetemp()
    return own.parent if "PYTEST_XDIST_WORKER" in os.environ else own


@contextmanager
def _alone(shared: Path, name: str) -> Iterator[None]:
    with (shared / f"{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


@pytest.fixture(scope="session")
def slurm(shared: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """Four nodes."""
    if problems := hosts_problems(["a"]):
        pytest.skip(" ".join(problems))
    if shutil.which("apt-get") is None and shutil.which("slurmctld") is None:
        pytest.skip("Slurm isn't installed, and this isn't Debian, where it would be; install slurmctld, slurmd and munge")
    with _alone(shared, "install"):
        install_slurm()
    with slurm_cluster(tmp_path_factory.mktemp("cluster") / "slurm", nodes=NODES) as made:
        yield made


@pytest.fixture
def cluster(slurm: Cluster) -> Iterator[Cluster]:
    """With nothing in its queue, and all nodes up; what a test did to it is mended."""
    slurm.recover()
    yield slurm
    slurm.clear()


@pytest.fixture(scope="session")
def data(shared: Path) -> Path:
    """A data set."""
    path = shared / "data"
    with _alone(shared, "data"):
        if not path.exists():
            write_dataset(path, samples=SAMPLES)
    return path


@pytest.fixture(scope="session")
def never_stopped(shared: Path, data: Path) -> Callable[[int], list[tuple[Any, ...]]]:
    """The curve of a run on so many ranks that nothing happened to."""

    def train(world: int) -> list[tuple[Any, ...]]:
        folder = shared / f"never-stopped-{world}"
        with _alone(shared, f"never-stopped-{world}"):
            if not (folder / "ended").exists():
                ended = cli("train", *_args(data, folder), f"parallel.nproc={world}", limit_s=200)
                assert ended.code == 0, ended.err
                (folder / "ended").touch()
        return Run(cluster=None, folder=folder).curve()  # type: ignore[arg-type]

    return train


@pytest.fixture
def submit(cluster: Cluster, data: Path, tmp_path: Path) -> Callable[..., Run]:
    """``submit(nodes, ranks, *options, config=[...], name=..., **site)``: a training of ``ranks`` per node."""

    def hand_over(nodes: int, ranks: int, *options: str, config: tuple[str, ...] = (), name: str = "run", **site: Any) -> Run:
        run = Run(cluster=cluster, folder=tmp_path / name)
        where = ["--backend", "slurm", "--nodes", nodes, "--gpus-per-node", 0, "--ranks-per-node", ranks]
        profile = site_file(tmp_path / f"{name}.yaml", **site)
        cluster.call(
            "opensora-dist", "submit", *where, *options, "--site", profile, "--", "train", *_args(data, run.folder), *config
        )
        return run

    return hand_over


def _args(data: Path, run_dir: Path) -> list[str]:
    """Of ``train``, for ranks that share sequences by two."""
    more = ["parallel.sp.degree=2", f"run.steps={STEPS}", "run.log_every=1", f"checkpoint.every_steps={EVERY}"]
    more += ["checkpoint.asynchronous=false", "resilience.watchdog_s=10", "parallel.timeout_s=30", "run.name=tiny"]
    return overrides(data, run_dir, *more)
