"""Fixtures of all tests. This file's place makes pytest put ``tests/`` on the import path, for the helpers beside it."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import promises
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


class Promise:
    """One promise that a test is about to show."""

    def __init__(self, name: str, properties: list[tuple[str, Any]]) -> None:
        self._name, self._properties = name, properties

    def measured(self, text: str) -> None:
        """What was seen, for the table: ``"found after 6.2 s"``. It counts where the test passes."""
        self._properties.append(("promise", (self._name, text)))


@pytest.fixture
def promise(request: pytest.FixtureRequest) -> Callable[[str], Promise]:
    """``promise(promises.KILL).measured("...")``: this test shows that a promise is kept. See ``promises``."""

    def make(name: str) -> Promise:
        assert name in promises.TARGETS, f"{name!r} is not promised; tests/promises.py lists what is"
        return Promise(name, request.node.user_properties)

    return make


_kept: list[promises.Kept] = []


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if "promise" in getattr(item, "fixturenames", ()):
            item.add_marker("promise")


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if report.when == "call" and report.passed:
        said = [value for name, value in report.user_properties if name == "promise"]
        _kept.extend(promises.Kept(promise=name, measured=text, test=report.nodeid) for name, text in said)


def pytest_terminal_summary(terminalreporter: Any) -> None:
    if page := os.environ.get("OPENSORA_RELIABILITY_TABLE"):
        for name in promises.rewrite(Path(page), _kept):
            terminalreporter.write_line(f"no passed test shows the promise {name!r}: it has no row in {page}")
