"""Who computes what has more than one implementation: chosen once, before the first step, and said in one line of the log."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import torch

from opensora_dist.core.errors import ConfigError

Kernels = Literal["torch", "triton"]
Compile = Literal["off", "blocks", "graphs"]


@dataclass(frozen=True, kw_only=True)
class Choice:
    """
    Args:
        kernels: Who does norms, gates, GELU, and attention over few frames or to a caption (``run.kernels``).
        compile: Whether torch.compile makes kernels of the regions of ``ops.compiled`` (``run.compile``).
    """

    kernels: Kernels = "torch"
    compile: Compile = "off"

    def __str__(self) -> str:
        return f"norms, gates and GELU by {self.kernels}"


_now = Choice()


def current() -> Choice:
    """What operators go by."""
    return _now


def use(choice: Choice) -> None:
    """From now on, in this process. Backward of what was computed before goes by what computed it."""
    global _now
    _now = choice


@contextmanager
def using(choice: Choice) -> Iterator[None]:
    """``use`` within; for tests and benchmarks, which compare."""
    before = _now
    use(choice)
    try:
        yield
    finally:
        use(before)


def choose(kernels: Kernels, *, device: torch.device, dtype: str) -> Choice:
    """What a config asks for, on this machine.

    Args:
        kernels: ``run.kernels``.
        dtype: ``run.dtype``.
    Raises:
        ConfigError: It can't be had here.
    """
    if kernels == "triton":
        problems = []
        if importlib.util.find_spec("triton") is None:
            problems.append("run.kernels=triton needs Triton: pip install 'opensora-dist[kernels]', or use run.kernels=torch")
        if device.type != "cuda" and not interpreted():
            problems.append(f"run.kernels=triton needs a GPU, and the run is on {device.type}; use run.kernels=torch")
        if dtype == "float64":
            problems.append(
                "run.kernels=triton computes in float32 inside, and run.dtype=float64 asks for more; use run.kernels=torch"
            )
        if problems:
            raise ConfigError(problems)
    return Choice(kernels=kernels)


def interpreted() -> bool:
    """Whether Triton's kernels run in its interpreter, on the CPU: slow, for tests."""
    return os.environ.get("TRITON_INTERPRET") == "1"
