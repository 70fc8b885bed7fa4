"""torch, ranks, kernels and codecs that training needs, by calling them: what imports may still crash, or give something else.

Run as ``python -m opensora_dist.machine.kernels NUM_GPUS CLOCK_SHARE``, in a process of its own (``children``).
"""

# B batch, N heads, L queries, K head dim

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from datetime import timedelta
from typing import Final

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from opensora_dist.machine.children import Teller
from opensora_dist.machine.collective import collective_finding
from opensora_dist.machine.finding import Finding, Level, Subject
from opensora_dist.machine.load import under_load
from opensora_dist.ops.attention import attention, attention_backward, attention_with_lse

_TORCH: Final = Subject("torch")
_KERNELS: Final = Subject("kernels")
_ZERO: Final = Subject("zero backends")
_GPUS: Final = Subject("gpus")
_VIDEO: Final = Subject("video")
_SHAPE: Final = (2, 4, 64, 32)
_SDPA: Final = {
    "SDPA math": SDPBackend.MATH,
    "SDPA flash": SDPBackend.FLASH_ATTENTION,
    "SDPA memory-efficient": SDPBackend.EFFICIENT_ATTENTION,
    "SDPA cuDNN": SDPBackend.CUDNN_ATTENTION,
}
_TOLERANCE: Final = {torch.float32: 1e-5, torch.bfloat16: 2e-2}


def main(*, num_gpus: int, clock_share: float) -> None:
    """Tells all findings.

    Args:
        num_gpus: That torch has to see, by what the driver knows of and what was asked for.
        clock_share: As ``under_load`` has it.
    """
    tell = Teller().check
    tell("network", "ranks of this machine", collective_finding)  # first, as it forks
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    tell("torch", "build", lambda: torch_finding(num_gpus=num_gpus))
    for name, backend in _SDPA.items():
        tell("kernels", name, lambda name=name, backend=backend: _sdpa(name, backend, device))  # type: ignore[misc]
    tell("kernels", "attention", lambda: _own_attention(device))
    tell("zero backends", "native", _native)
    if device.type == "cuda":
        tell("gpus", "NCCL", _nccl)
        tell("gpus", "under load", lambda: under_load(clock_share=clock_share))
    tell("video", "av", _av)


def torch_finding(*, num_gpus: int) -> Finding:
    """torch's build, against the GPUs that it has to see: a run starts a rank for each, and the one that finds none fails."""
    build = f"CUDA {torch.version.cuda}" if torch.version.cuda else f"ROCm {torch.version.hip}" if torch.version.hip else "CPU"
    seen = torch.cuda.device_count() if torch.cuda.is_available() else 0
    said = f"{torch.__version__}, build for {build}, {torch.get_num_threads()} threads"
    values = {"version": torch.__version__, "cuda": torch.version.cuda, "gpus": seen, "threads": torch.get_num_threads()}
    if num_gpus and not torch.version.cuda:
        way_out = "install a CUDA build of torch (pytorch.org says how)"
        return _TORCH.finding("build", Level.PROBLEM, f"{said}, and there are {num_gpus} GPUs", way_out, values=values)
    if num_gpus and not seen:
        way_out = "check CUDA_VISIBLE_DEVICES; update the driver, or install torch for an older CUDA; in a container --gpus all"
        return _TORCH.finding(
            "build", Level.PROBLEM, f"{said}, and torch can use none of {num_gpus} GPUs", way_out, values=values
        )
    if num_gpus > seen:
        way_out = "check CUDA_VISIBLE_DEVICES; look for Xid in `dmesg`; restart the machine, or take it out of service"
        return _TORCH.finding("build", Level.PROBLEM, f"{said}, sees {seen} of {num_gpus} GPUs", way_out, values=values)
    return _TORCH.finding("build", Level.OK, said if not seen else f"{said}, {seen} GPUs", values=values)


def _inputs(device: torch.device, dtype: torch.dtype) -> list[Tensor]:
    """q, k and v, [B, N, L, K], the same everywhere."""
    count = torch.Size(_SHAPE).numel()
    whole = torch.arange(3 * count, dtype=torch.float64).mul(0.7).sin().view(3, *_SHAPE)
    return [x.to(device, dtype).requires_grad_() for x in whole]


def _error(call: Callable[[Tensor, Tensor, Tensor], Tensor], device: torch.device) -> tuple[float, torch.dtype]:
    """Largest difference of outputs and gradients from softmax attention in float64, of numbers about 1; and the dtype of ``call``."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    q, k, v = (x.detach().double().cpu().requires_grad_() for x in _inputs(device, dtype))
    wanted = torch.softmax(q @ k.mT * _SHAPE[-1] ** -0.5, dim=-1) @ v
    mine = _inputs(device, dtype)
    out = call(*mine)
    weights = torch.cos(wanted.detach())
    found = (out, *torch.autograd.grad(out, mine, weights.to(out)))
    right = (wanted, *torch.autograd.grad(wanted, (q, k, v), weights))
    return max(float((a.double().cpu() - b).abs().max().detach()) for a, b in zip(found, right)), dtype


def compared(name: str, call: Callable[[Tensor, Tensor, Tensor], Tensor], device: torch.device, *, level: Level) -> Finding:
    """Whether a form of attention runs and is right; ``level`` where it doesn't run. A wrong result is a problem in any case."""
    try:
        error, dtype = _error(call, device)
    except (RuntimeError, ImportError, TypeError) as failure:
        said = f"does not run on {device.type}: {str(failure).partition(chr(10))[0].partition('. ')[0]}"
        way_out = None if level is Level.NOTE else "install torch again; its version and the driver's have to fit"
        return _KERNELS.finding(name, level, said, way_out)
    kind = str(dtype).removeprefix("torch.")
    if error > _TOLERANCE[dtype]:
        said = f"differs from attention in float64 by {error:.1e} ({device.type}, {kind})"
        return _KERNELS.finding(name, Level.PROBLEM, said, "update torch, or whatever package it is from, or remove it")
    return _KERNELS.finding(name, Level.OK, f"forward and backward on {device.type}, {kind}, off by {error:.0e}")


def _sdpa(name: str, backend: SDPBackend, device: torch.device) -> Finding:
    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(q, k, v)

    return compared(name, call, device, level=Level.PROBLEM if backend is SDPBackend.MATH else Level.NOTE)


def _own_attention(device: torch.device) -> list[Finding]:
    """The two functions that models call; the second is what ring and usp need."""
    with_lse = compared("attention with log-sum-exp", _WithLse.apply, device, level=Level.PROBLEM)
    return [compared("attention", attention, device, level=Level.PROBLEM), with_lse]


class _WithLse(torch.autograd.Function):
    """``attention_with_lse``, whose backward is a function of its own."""

    @staticmethod
    def forward(ctx, q, k, v):  # type: ignore[no-untyped-def]
        out, lse = attention_with_lse(q, k, v)
        ctx.save_for_backward(q, k, v, out, lse)
        return out

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        return attention_backward(grad, *ctx.saved_tensors)


def _native() -> Finding:
    from opensora_dist.parallel.zero.native import NativeBackend

    return _ZERO.finding("native", Level.OK, f"FSDP2 of torch ({NativeBackend.__name__})")


def _av() -> Finding:
    """av reads and writes video."""
    av = importlib.import_module("av")
    missing = [name for name in ("h264", "libx264") if name not in av.codecs_available]
    if missing:
        way_out = "install the wheel of av from PyPI, which brings ffmpeg with it"
        return _VIDEO.finding("av", Level.WARNING, f"av {av.__version__}, without {', '.join(missing)}", way_out)
    return _VIDEO.finding("av", Level.OK, f"av {av.__version__} reads and writes H.264")


def _nccl() -> Finding:
    """A collective of one rank: enough to load NCCL, and to see it refuse this driver."""
    version = ".".join(map(str, torch.cuda.nccl.version()))  # type: ignore[no-untyped-call]
    device, value = torch.device("cuda", 0), torch.ones(1, device="cuda:0")
    store = dist.HashStore()  # type: ignore[attr-defined]  # not in torch's __all__
    dist.init_process_group("nccl", store=store, rank=0, world_size=1, timeout=timedelta(seconds=30), device_id=device)
    dist.all_reduce(value)
    torch.cuda.synchronize(device)
    dist.destroy_process_group()
    return _GPUS.finding("NCCL", Level.OK, f"{version} starts", values={"version": version})


if __name__ == "__main__":
    main(num_gpus=int(sys.argv[1]), clock_share=float(sys.argv[2]))
