"""torch, ranks, kernels and backends of this install, by calling them: what imports may still crash, or give something else.

Run as ``python -m opensora_dist.machine.kernels NUM_GPUS CLOCK_SHARE``, in a process of its own (``children``).
"""

# B batch, N heads, L queries, K head dim

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
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
from opensora_dist.machine.gpus import SmiError, clock_finding, query_gpus
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
_SECONDS_OF_LOAD = 2.0
_PRODUCT = 4096


def main(*, num_gpus: int, clock_share: float) -> None:
    """Tells all findings.

    Args:
        num_gpus: That the driver knows of, whatever torch does.
        clock_share: As ``under_load`` has it.
    """
    tell = Teller().check
    tell("network", "ranks of this machine", collective_finding)  # first, as it forks
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    tell("torch", "build", lambda: torch_finding(num_gpus=num_gpus))
    for name, backend in _SDPA.items():
        tell("kernels", name, lambda name=name, backend=backend: _sdpa(name, backend, device))  # type: ignore[misc]
    tell("kernels", "attention", lambda: _own_attention(device))
    tell("kernels", "flash-attn", lambda: _optional("flash-attn", "flash_attn", lambda: _flash_attn(device)))
    tell("kernels", "triton", lambda: _optional("triton", "triton", lambda: _triton(device)))
    tell("zero backends", "native", _native)
    tell("zero backends", "deepspeed", lambda: _backend("deepspeed", extra="pip install 'opensora-dist[deepspeed]'"))
    tell("zero backends", "colossalai", lambda: _backend("colossalai", extra="see requirements/colossalai.txt"))
    tell("video", "codecs", _video)
    if device.type == "cuda":
        tell("gpus", "NCCL", _nccl)
        tell("gpus", "under load", lambda: under_load(clock_share=clock_share))


def torch_finding(*, num_gpus: int) -> Finding:
    """torch's build, against the GPUs that the driver knows of."""
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
        way_out = "check CUDA_VISIBLE_DEVICES"
        return _TORCH.finding("build", Level.WARNING, f"{said}, sees {seen} of {num_gpus} GPUs", way_out, values=values)
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


def _compared(name: str, call: Callable[[Tensor, Tensor, Tensor], Tensor], device: torch.device, *, level: Level) -> Finding:
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

    return _compared(name, call, device, level=Level.PROBLEM if backend is SDPBackend.MATH else Level.NOTE)


def _own_attention(device: torch.device) -> list[Finding]:
    """The two functions that models call; the second is what ring and usp need."""
    with_lse = _compared("attention with log-sum-exp", _WithLse.apply, device, level=Level.PROBLEM)
    return [_compared("attention", attention, device, level=Level.PROBLEM), with_lse]


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

    return _compared("flash-attn", call, device, level=Level.WARNING)


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


def _native() -> Finding:
    from opensora_dist.parallel.zero.native import NativeBackend

    return _ZERO.finding("native", Level.OK, f"FSDP2 of torch ({NativeBackend.__name__})")


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


def _video() -> list[Finding]:
    """av reads and writes video; cv2 is part of the extra ``prepare``, and fails to load where system libraries are missing."""
    av = importlib.import_module("av")
    missing = [name for name in ("h264", "libx264") if name not in av.codecs_available]
    level, way_out = (
        (Level.WARNING, "install the wheel of av from PyPI, which brings ffmpeg with it") if missing else (Level.OK, None)
    )
    said = f"av {av.__version__}" + (f", without {', '.join(missing)}" if missing else " reads and writes H.264")
    found = [_VIDEO.finding("av", level, said, way_out)]
    if importlib.util.find_spec("cv2") is not None:
        try:
            found.append(_VIDEO.finding("cv2", Level.OK, importlib.import_module("cv2").__version__))
        except ImportError as error:
            way_out = "use opencv-python-headless in place of opencv-python, or install the library that is named"
            found.append(_VIDEO.finding("cv2", Level.WARNING, f"can't be imported: {error}", way_out))
    return found


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


def under_load(*, clock_share: float) -> list[Finding]:
    """All GPUs multiply matrices for about two seconds: clocks are read meanwhile, rates and results compared.

    Args:
        clock_share: What of its highest clock a GPU must run at least.
    """
    devices = [torch.device("cuda", i) for i in range(torch.cuda.device_count())]
    ramp = torch.arange(_PRODUCT**2).remainder(17).sub(8).view(_PRODUCT, _PRODUCT).bfloat16()
    factors = [ramp.to(device) for device in devices]
    sums, counts = [0.0 for _ in devices], 0
    with ThreadPoolExecutor(1) as asked:
        began, clocks = time.perf_counter(), None
        while (took := time.perf_counter() - began) < _SECONDS_OF_LOAD or (clocks is not None and not clocks.done()):
            products = [factor @ factor for factor in factors for _ in range(20)][::20]
            sums = [float(product.double().sum()) for product in products]
            counts += 20
            if clocks is None and took > _SECONDS_OF_LOAD / 2:  # they have left their idle clocks by then
                clocks = asked.submit(query_gpus)
        took = time.perf_counter() - began
    rate = 2 * _PRODUCT**3 * counts / took
    found = differing(sums)
    said = f"{rate / 1e12:.0f} TFLOP/s each in products of {_PRODUCT} (bfloat16)"
    found.append(_GPUS.finding("under load", Level.OK, said, values={"flops_per_s": rate}))
    mine = {str(torch.cuda.get_device_properties(device).uuid) for device in devices}
    try:
        seen = clocks.result() if clocks is not None else ()
    except SmiError as error:
        return [*found, _GPUS.finding("nvidia-smi", Level.PROBLEM, str(error), "restart the driver or the machine")]
    for gpu in seen:
        if gpu.uuid.removeprefix("GPU-") in mine:
            clock = clock_finding(f"GPU {gpu.index} under load", gpu.sm_mhz, gpu.most_sm_mhz, clock_share=clock_share)
            found += [] if clock is None else [clock]
    return found


def differing(sums: list[float]) -> list[Finding]:
    """GPUs whose result of the same products is another than that of most."""
    (most, count), *_ = Counter(sums).most_common()
    if count == len(sums):
        return []
    wrong = [i for i, value in enumerate(sums) if value != most]
    way_out = "take the node out of service and have its GPUs tested (`dcgmi diag -r 3`)"
    return [
        _GPUS.finding(f"GPU {i} (of torch)", Level.PROBLEM, f"the same products give {sums[i]!r}, and {most!r} on most", way_out)
        for i in wrong
    ]


if __name__ == "__main__":
    main(num_gpus=int(sys.argv[1]), clock_share=float(sys.argv[2]))
