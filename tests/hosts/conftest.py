"""Hosts modelled on this machine, and a data set for them. ``make test-hosts`` runs these tests; they need root."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from dataset_factory import write_dataset
from training import SAMPLES

from opensora_dist.recipes.bench.hosts import Hosts, hosts_problems, modelled_hosts


@pytest.fixture(scope="module")
def hosts(request: pytest.FixtureRequest) -> Iterator[Hosts]:
    """Those that a module calls ``NAMES``."""
    names = request.module.NAMES
    if problems := hosts_problems(names):
        pytest.skip("; ".join(problems))
    with modelled_hosts(names) as made:
        yield made


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """To train on."""
    path = tmp_path_factory.mktemp("hosts") / "data"
    write_dataset(path, samples=SAMPLES)
    return path
