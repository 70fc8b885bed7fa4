"""Regions that torch.compile makes kernels of, where ``run.compile`` asks for it.

A region is a pure function on tensors, without a branch on their values and without communication. One that is called by another while
that is compiled becomes part of it. All calls of a region share what was compiled for it, whichever module's parameters it is given.
"""

from __future__ import annotations

import os
import stat
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, wraps
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

import torch

from opensora_dist.core.errors import ConfigError
from opensora_dist.ops.choice import current

P = ParamSpec("P")
R = TypeVar("R")

CACHE_VARIABLE = "TORCHINDUCTOR_CACHE_DIR"
_RECOMPILE_LIMIT = 64
"""Graphs of one region. Where sizes are symbols, only kinds of input make new ones (a batch of one, one frame, a mask or none, gradients
or none), and there are fewer of these. Past the limit torch raises."""

_backend = "inductor"


def region(function: Callable[P, R]) -> Callable[P, R]:
    """``function``, a function or a method, as one graph while ``current().compile`` is not off; an error where that can't be."""
    return _region(function, replayed=False)


def replayed_region(function: Callable[P, R]) -> Callable[P, R]:
    """A region that ``graphs`` makes a CUDA graph of, for each shape. What it returns is overwritten after the next ``begin_forward``."""
    return _region(function, replayed=True)


def _region(function: Callable[P, R], *, replayed: bool) -> Callable[P, R]:
    @wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        if torch.compiler.is_compiling() or not compiles():
            return function(*args, **kwargs)
        graphs = replayed and current().compile == "graphs"
        compiled: Callable[P, R] = _compiled(function, backend=_backend, graphs=graphs, dynamic=current().dynamic_shapes)
        return compiled(*args, **kwargs)

    return call


def compiles() -> bool:
    """Whether regions are compiled now."""
    return current().compile != "off"


def begin_forward() -> None:
    """Before the forward of a micro-batch: what CUDA graphs gave for the one before is needed no more."""
    if current().compile == "graphs":
        torch.compiler.cudagraph_mark_step_begin()  # type: ignore[no-untyped-call]


@cache
def _compiled(function: Callable[P, R], *, backend: str, graphs: bool, dynamic: bool) -> Callable[P, R]:
    # Dimensions that happen to be equal (frames and text tokens) would be taken for one, and part at the next shape.
    torch.fx.experimental._config.use_duck_shape = False
    torch._dynamo.config.recompile_limit = _RECOMPILE_LIMIT
    options: dict[str, Any] | None = {"triton.cudagraphs": True} if graphs else None
    # None: the first graph has the sizes of its input, and a size that was seen to change is a symbol in those after it.
    compiled: Callable[P, R] = torch.compile(function, fullgraph=True, dynamic=dynamic or None, backend=backend, options=options)
    return compiled


@contextmanager
def using_backend(backend: str) -> Iterator[None]:
    """Another compiler than inductor within; for tests, which have no time for C++."""
    global _backend
    before, _backend = _backend, backend
    try:
        yield
    finally:
        _backend = before


# --- what it costs


@dataclass(frozen=True, kw_only=True)
class Compiled:
    """What was compiled so far.

    Args:
        seconds: That something waited for it, recording of CUDA graphs included.
        graphs: Regions that were compiled, each forward with its backward; every time one was.
        recompilations: Those among them of a region that there was a graph of, which an input didn't fit.
        from_cache: Graphs whose kernels were found in the cache.
    """

    seconds: float
    graphs: int
    recompilations: int
    from_cache: int

    def __str__(self) -> str:
        return (
            f"{self.seconds:.1f} s spent on compiling {self.graphs} graphs, {self.from_cache} of them found in the cache; "
            f"{self.recompilations} were of a region compiled before, for another kind of input"
        )


class Compilations:
    """Counts what torch compiles in this process, from ``start`` to ``stop``."""

    def __init__(self) -> None:
        # Imported here: it takes more than a second, which a run without compiling doesn't have to wait for.
        from torch._dynamo.callback import callback_handler
        from torch._dynamo.utils import counters

        self._handler, self._counters = callback_handler, counters
        self._seconds, self._graphs, self._recompilations, self._began = 0.0, 0, 0, 0.0
        self._hits_before = self._hits()

    @property
    def sofar(self) -> Compiled:
        """Now."""
        return Compiled(
            seconds=self._seconds,
            graphs=self._graphs,
            recompilations=self._recompilations,
            from_cache=self._hits() - self._hits_before,
        )

    def start(self) -> None:
        """From now on."""
        self._handler.register_start_callback(self._start)
        self._handler.register_end_callback(self._end)

    def stop(self) -> None:
        """No more."""
        self._handler.remove_start_callback(self._start)
        self._handler.remove_end_callback(self._end)

    def _start(self, args: Any) -> None:
        self._began = time.perf_counter()
        if args.callback_trigger.name == "DYNAMO":
            self._graphs += 1
            # "region/graph", both counted from 0
            self._recompilations += not args.compile_id.endswith("/0")

    def _end(self, _args: Any) -> None:
        self._seconds += time.perf_counter() - self._began

    def _hits(self) -> int:
        return int(self._counters["aot_autograd"]["autograd_cache_hit"])


# --- what a restart finds again


def keep_compiled(folder: Path) -> Path:
    """From now on, what is compiled is kept in ``folder``, and looked up there; the environment's TORCHINDUCTOR_CACHE_DIR goes first.

    Returns:
        The folder, without symbolic links.
    Raises:
        ConfigError: Others than this user could write there, or put another folder in its place: what is found in it is run.
    """
    asked = Path(os.environ.get(CACHE_VARIABLE) or folder)
    asked.mkdir(mode=0o700, parents=True, exist_ok=True)
    folder = asked.resolve()
    about = folder.stat()
    if about.st_uid != os.geteuid() or about.st_mode & _OTHERS_WRITE:
        raise _not_only_yours(asked, folder)
    for parent in folder.parents:
        about = parent.stat()
        # Where the sticky bit is set, as in /tmp, each takes away only what is theirs.
        if about.st_uid not in (0, os.geteuid()) or (about.st_mode & _OTHERS_WRITE and not about.st_mode & stat.S_ISVTX):
            raise _not_only_yours(asked, parent)
    os.environ[CACHE_VARIABLE] = str(folder)  # a link that is changed later leads nowhere else
    return folder


_OTHERS_WRITE = stat.S_IWGRP | stat.S_IWOTH


def _not_only_yours(asked: Path, folder: Path) -> ConfigError:
    return ConfigError(
        f"run.compile_cache={str(asked)!r}: {folder} can be written by others than you, and what is found in the cache is run; "
        f"use a folder of your own (chmod 700), by run.compile_cache or {CACHE_VARIABLE}"
    )
