"""What only a GPU can show. Without one everything here is skipped; ``OPENSORA_GPU_TESTS=cpu`` runs it on the CPU, while it is written."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from opensora_dist.parallel.mesh import process_group

_ON_CPU = os.environ.get("OPENSORA_GPU_TESTS") == "cpu"


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Skips them as one where they can't run."""
    mine = [item for item in items if item.path.parent == Path(__file__).parent]
    if not mine or _ON_CPU or (torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1"):
        return  # where other tests have Triton interpret, this process can't do both
    mine[0].add_marker(pytest.mark.skip(f"{len(mine)} tests of what only a GPU shows: make test-gpu, on a machine that has one"))
    config.hook.pytest_deselected(items=mine[1:])
    items[:] = [item for item in items if item not in mine[1:]]


@pytest.fixture(scope="session")
def device() -> torch.device:
    return torch.device("cpu") if _ON_CPU else torch.device("cuda", torch.cuda.current_device())


@pytest.fixture
def group(device: torch.device) -> Iterator[None]:
    """A process group of one."""
    with process_group(device, timeout_s=60):
        yield
