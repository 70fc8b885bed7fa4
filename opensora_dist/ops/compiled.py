"""Regions that torch.compile makes kernels of, where ``run.compile`` asks for it.

A region is a pure function on tensors, without a branch on their values and without communication. One that is called by another while
that is compiled becomes part of it. All calls of a region share what was compiled for it, whichever module's parameters it is given.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, wraps
from typing import Any, ParamSpec, TypeVar

import torch

from opensora_dist.ops.choice import current

P = ParamSpec("P")
R = TypeVar("R")

_RECOMPILE_LIMIT = 64
"""Graphs of one region. Sizes are symbols, so there are as many as there are kinds of input: with B == 1, T == 1, without gradients."""

_backend = "inductor"


def region(function: Callable[P, R]) -> Callable[P, R]:
    """``function``, compiled while ``current().compile`` is not off. Sizes are symbols; one graph, or an error.

    Args:
        function: Of this module's users' own: a function or a method. A 1 among sizes makes a graph of its own, other sizes none.
    """

    @wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        if torch.compiler.is_compiling() or not compiles():
            return function(*args, **kwargs)
        return _compiled(function, backend=_backend)(*args, **kwargs)

    return call


def compiles() -> bool:
    """Whether regions are compiled now."""
    return current().compile != "off"


@contextmanager
def using_backend(backend: str) -> Iterator[None]:
    """Another compiler than inductor within; for tests, which have no time for C++."""
    global _backend
    before, _backend = _backend, backend
    try:
        yield
    finally:
        _backend = before


@cache
def _compiled(function: Callable[P, R], *, backend: str) -> Callable[P, R]:
    torch._dynamo.config.recompile_limit = _RECOMPILE_LIMIT
    compiled: Any = torch.compile(function, fullgraph=True, dynamic=True, backend=backend)
    return compiled
