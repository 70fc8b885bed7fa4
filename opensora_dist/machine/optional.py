"""Packages that training can do without: whether they are here, and work.

Run as ``python -m opensora_dist.machine.optional``, in a process of its own (``children``): one that crashes makes no node unfit, and
hides none of what is needed.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
from collections.abc import Callable
from typing import Final

import torch
from torch import Tensor

from opensora_dist.machine.children import Teller
from opensora_dist.machine.finding import Finding, Level, Subject
from opensora_dist.machine.kernels import compared

_KERNELS: Final = Subject("kernels")
_ZERO: Final = Subject("zero backends")
_VIDEO: Final = Subject("video")


def main() -> None:
    """Tells all findings."""
    tell = Teller().check
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    tell("kernels", "flash-attn", lambda: _optional("flash-attn", "flash_attn", lambda: _flash_attn(device)))
    tell("kernels", "triton", lambda: _optional("triton", "triton", lambda: _triton(device)))
    tell("zero backends", "deepspeed", lambda: _backend("deepspeed", extra="pip install 'opensora-dist[deepspeed]'"))
    tell("zero backends", "colossalai", lambda: _backend("colossalai", extra="see requirements/colossalai.txt"))
    tell("video", "cv2", _cv2)


def _optional(name: str, module: str, check: Callable[[], Finding]) -> Finding:
    """A package that may be left out: a note where it is; a warning where it is here and broken."""
    if importlib.util.find_spec(module) is None:
        return _KERNELS.finding(name, Level.NOTE, "not installed; nothing needs it")
    try:
        return check()
    except Exception as error:  # noqa: BLE001 - whatever a package raises, it is told what it is
        said = f"is installed and does not work: {type(error).__name__}: {' '.join(str(error).split())[:300]}"
        return _KERNELS.finding(name, Level.WARNING, said, f"install {name} again for this torch and this driver, or remove it")


def _flash_attn(device: torch.device) -> Finding:
    flash_attn = importlib.import_module("flash_attn")
    if device.type != "cuda":
        return _KERNELS.finding("flash-attn", Level.NOTE, f"{flash_attn.__version__} can be imported; it runs on GPUs alone")

    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out: Tensor = flash_attn.flash_attn_func(*(x.transpose(1, 2) for x in (q, k, v)))
        return out.transpose(1, 2)

    return compared("flash-attn", call, device, level=Level.WARNING)


def _triton(device: torch.device) -> Finding:
    if device.type == "cpu":
        os.environ["TRITON_INTERPRET"] = "1"  # nothing has imported it yet that would have been told otherwise
    kernel = importlib.import_module("opensora_dist.machine.triton_kernel")
    version = importlib.import_module("triton").__version__
    if not kernel.runs(device):
        said = f"{version} runs a kernel on {device.type}, whose result is wrong"
        return _KERNELS.finding("triton", Level.PROBLEM, said, "install the Triton that this torch asks for")
    if device.type == "cuda":
        return _KERNELS.finding("triton", Level.OK, f"{version} compiles and runs a kernel")
    compiles = "and compiles it for sm_90" if kernel.compiles(90) else "and does not compile it for sm_90"
    return _KERNELS.finding("triton", Level.OK, f"{version} runs a kernel by its interpreter on the CPU, {compiles}")


def _backend(name: str, *, extra: str) -> Finding:
    """A package that ``parallel.zero.backend`` may name."""
    if importlib.util.find_spec(name) is None:
        return _ZERO.finding(name, Level.NOTE, f"not installed; parallel.zero.backend={name} needs it", extra)
    try:
        if name == "deepspeed":
            from opensora_dist.parallel.zero.deepspeed import import_deepspeed

            package = import_deepspeed(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
        else:
            package = importlib.import_module(name)
    except Exception as error:  # noqa: BLE001 - whatever a package raises, it is told what it is
        said = f"is installed and can't be imported: {type(error).__name__}: {' '.join(str(error).split())[:300]}"
        return _ZERO.finding(name, Level.WARNING, said, f"parallel.zero.backend=native works without it; {extra}")
    return _ZERO.finding(name, Level.OK, f"{getattr(package, '__version__', 'unknown version')}")


def _cv2() -> list[Finding]:
    """Part of the extra ``prepare``; it fails to load where system libraries are missing."""
    if importlib.util.find_spec("cv2") is None:
        return []
    try:
        return [_VIDEO.finding("cv2", Level.OK, importlib.import_module("cv2").__version__)]
    except ImportError as error:
        way_out = "use opencv-python-headless in place of opencv-python, or install the library that is named"
        return [_VIDEO.finding("cv2", Level.WARNING, f"can't be imported: {error}", way_out)]


if __name__ == "__main__":
    main()
