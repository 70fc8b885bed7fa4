"""Fixtures of all tests. This file's place makes pytest put ``tests/`` on the import path, for the helpers beside it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from rank_pool import RankPool

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def ranks() -> Iterator[RankPool]:
    """Four gloo ranks, shared by the session."""
    pool = RankPool(4)
    yield pool
    pool.close()
