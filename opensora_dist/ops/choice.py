"""Who computes what has more than one implementation: chosen once, before the first step, and said in one line of the log."""

from __future__ import annotations

import importlib
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
AskedAttention = Literal["auto", "sdpa", "flash_attn"]
Attention = Literal["sdpa", "flash_attn_2", "flash_attn_3"]
_FLASH: dict[Attention, tuple[str, str, tuple[int, int] | None]] = {
    "flash_attn_3": ("flash_attn_interface", "flash_attn_3", (9, 0)),
    "flash_attn_2": ("flash_attn", "flash_attn", None),
}
"""Module, where it registers operators, and the one compute capability it is for, best first; all want at least 8.0."""


_FLASH_FUNCTION = "flash_attn_varlen_func"  # of packages that have it, one is used


@dataclass(frozen=True, kw_only=True)
class Choice:
    """
    Args:
        kernels: Who does norms, gates, GELU, and attention over few frames or to a caption (``run.kernels``).
        compile: Whether torch.compile makes kernels of the regions of ``ops.compiled`` (``run.compile``).
        dynamic_shapes: There are many, so that sizes are symbols in every graph; else in those after a region's first.
        attention: Who does attentions, but for those that ``kernels=triton`` does (``run.attention``).
    """

    kernels: Kernels = "torch"
    compile: Compile = "off"
    dynamic_shapes: bool = False
    attention: Attention = "sdpa"

    def __str__(self) -> str:
        others = " (over frames, to captions, in packs of short sequences: triton)" if self.kernels == "triton" else ""
        attention = f"torch SDPA ({_sdpa_backends()})" if self.attention == "sdpa" else self.attention.replace("_", "-")
        return f"norms, gates and GELU by {self.kernels}; attention by {attention}{others}; compiled: {self.compile}"


_now = Choice()


def current() -> Choice:
    """What operators go by."""
    return _now


@contextmanager
def using(choice: Choice) -> Iterator[None]:
    """Within, in this process. What backward computes again (``parallel.recompute``) goes by the choice at that time."""
    global _now
    before, _now = _now, choice
    try:
        yield
    finally:
        _now = before


def choose(
    kernels: Kernels,
    *,
    device: torch.device,
    dtype: str,
    compile: Compile = "off",
    attention: AskedAttention = "sdpa",
) -> Choice:
    """What a config asks for, on this machine.

    Args:
        kernels: ``run.kernels``.
        dtype: ``run.dtype``.
        compile: ``run.compile``.
        attention: ``run.attention``.
    Raises:
        ConfigError: It can't be had here.
    """
    problems = []
    if compile == "graphs" and device.type != "cuda":
        problems.append(f"run.compile=graphs needs a GPU, and the run is on {device.type}; use run.compile=blocks or off")
    if kernels == "triton":
        if importlib.util.find_spec("triton") is None:
            problems.append("run.kernels=triton needs Triton: pip install 'opensora-dist[kernels]', or use run.kernels=torch")
        if device.type != "cuda" and not interpreted():
            problems.append(f"run.kernels=triton needs a GPU, and the run is on {device.type}; use run.kernels=torch")
        if dtype == "float64":
            problems.append(
                "run.kernels=triton computes in float32 inside, and run.dtype=float64 asks for more; use run.kernels=torch"
            )
    flash, missing = (None, []) if attention == "sdpa" else _flash_attn(device, dtype, compile=compile)
    if attention == "flash_attn" and flash is None:
        problems.append(f"run.attention=flash_attn can't be had: {'; '.join(missing)}; use run.attention=auto or sdpa")
    if problems:
        raise ConfigError(problems)
    return Choice(kernels=kernels, compile=compile, attention=flash or "sdpa")


def _flash_attn(device: torch.device, dtype: str, *, compile: Compile) -> tuple[Attention | None, list[str]]:
    """The best flash-attn of this machine, or why there is none.

    Args:
        compile: Unless off, it is called within graphs, and so has to be an operator that torch knows.
    """
    missing = []
    if device.type != "cuda":
        missing.append(f"it needs a GPU, and the run is on {device.type}")
    if dtype not in ("float16", "bfloat16"):
        missing.append(f"it computes in float16 and bfloat16, and run.dtype is {dtype}")
    if missing:
        return None, missing
    capability = torch.cuda.get_device_capability(device)
    for version, (name, operators, only) in _FLASH.items():
        if capability < (8, 0) or (only is not None and capability != only):
            missing.append(f"{name} is not for compute capability {capability[0]}.{capability[1]}")
            continue
        try:
            getattr(importlib.import_module(name), _FLASH_FUNCTION)
        except (ImportError, AttributeError) as error:
            missing.append(f"{name}: {error}")
            continue
        if compile == "off" or hasattr(getattr(torch.ops, operators), "_flash_attn_forward"):
            return version, []
        missing.append(
            f"run.compile={compile} wants an operator {operators}::_flash_attn_forward, which this build of {name} lacks"
        )
    return None, [*missing, "pip install flash-attn --no-build-isolation, next to a CUDA toolkit"]


def _sdpa_backends() -> str:
    """Which of its kernels torch may take; which it takes, it decides by shape and GPU."""
    if not torch.cuda.is_available():
        return "of the CPU"
    cuda = torch.backends.cuda
    allowed = {
        "flash": cuda.flash_sdp_enabled(),  # type: ignore[no-untyped-call]
        "cudnn": cuda.cudnn_sdp_enabled(),  # type: ignore[no-untyped-call]
        "efficient": cuda.mem_efficient_sdp_enabled(),  # type: ignore[no-untyped-call]
        "math": cuda.math_sdp_enabled(),  # type: ignore[no-untyped-call]
    }
    return "any of " + ", ".join(name for name, is_allowed in allowed.items() if is_allowed)


def interpreted() -> bool:
    """Whether Triton's kernels run in its interpreter, on the CPU: slow, for tests."""
    return os.environ.get("TRITON_INTERPRET") == "1"
