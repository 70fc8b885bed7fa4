"""Fixtures of all tests. This file's place makes pytest put ``tests/`` on the import path, for the helpers beside it."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import pytest
import torch
from rank_pool import RankPool

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _package_log_as_found() -> Iterator[None]:
    """A test that runs the command line in this process leaves no log handler on a stream that is gone after it."""
    yield
    logger = logging.getLogger("opensora_dist")
    logger.handlers.clear()
    logger.propagate = True
    logger.setLevel(logging.NOTSET)


@pytest.fixture(scope="session")
def ranks() -> Iterator[RankPool]:
    """Four gloo ranks, shared by the session."""
    pool = RankPool(4)
    yield pool
    pool.close()
