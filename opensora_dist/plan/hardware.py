"""What GPUs can do, by their data sheets: what model FLOPs use (MFU) is stated against, and what a plan reckons with."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Final

import torch

from opensora_dist.core.errors import ConfigError
from opensora_dist.core.registry import nearest


@dataclass(frozen=True, kw_only=True)
class Gpu:
    """A kind of GPU, from the vendor's data sheet.

    Args:
        name: As ``--gpu`` names it.
        device: Part of the name by which the driver knows it.
        flops_per_s: Dense bf16 tensor-core peak, sparsity left out.
        memory_bytes: Of one.
        memory_bytes_per_s: Between it and its memory.
        link_bytes_per_s: That one sends to the others of its node while it receives as much: half of NVLink's total.
        source: The document.
    """

    name: str
    device: str
    flops_per_s: float
    memory_bytes: int
    memory_bytes_per_s: float
    link_bytes_per_s: float
    source: str


# The SXM part where there are several. The first one whose ``device`` is in the name of a device counts, so that special parts stand first.
_GPUS: Final = (
    Gpu(
        name="h100-nvl",
        device="H100 NVL",
        flops_per_s=835e12,
        memory_bytes=94 << 30,
        memory_bytes_per_s=3.9e12,
        link_bytes_per_s=64e9,
        source="NVIDIA H100 data sheet, NVL; link: PCIe 5.0 x16, as NVLink joins two of them",
    ),
    Gpu(
        name="h100-pcie",
        device="H100 PCIe",
        flops_per_s=756e12,
        memory_bytes=80 << 30,
        memory_bytes_per_s=2.0e12,
        link_bytes_per_s=64e9,
        source="NVIDIA H100 data sheet, PCIe; link: PCIe 5.0 x16",
    ),
    Gpu(
        name="b200",
        device="B200",
        flops_per_s=2250e12,
        memory_bytes=180 << 30,
        memory_bytes_per_s=7.7e12,
        link_bytes_per_s=900e9,
        source="NVIDIA DGX B200 data sheet: 1,440 GB and 18 PFLOP/s dense bf16 of eight",
    ),
    Gpu(
        name="h200",
        device="H200",
        flops_per_s=989.5e12,
        memory_bytes=139 << 30,
        memory_bytes_per_s=4.8e12,
        link_bytes_per_s=450e9,
        source="NVIDIA H200 data sheet, SXM: 141 GB, of which the driver gives 139 GiB",
    ),
    Gpu(
        name="h100",
        device="H100",
        flops_per_s=989.5e12,
        memory_bytes=80 << 30,
        memory_bytes_per_s=3.35e12,
        link_bytes_per_s=450e9,
        source="NVIDIA H100 data sheet, SXM",
    ),
    Gpu(
        name="h800",
        device="H800",
        flops_per_s=989.5e12,
        memory_bytes=80 << 30,
        memory_bytes_per_s=3.35e12,
        link_bytes_per_s=200e9,
        source="NVIDIA H800: H100 SXM with NVLink at 400 GB/s",
    ),
    Gpu(
        name="a100",
        device="A100",
        flops_per_s=312e12,
        memory_bytes=80 << 30,
        memory_bytes_per_s=2.04e12,
        link_bytes_per_s=300e9,
        source="NVIDIA A100 80GB data sheet, SXM",
    ),
    Gpu(
        name="a800",
        device="A800",
        flops_per_s=312e12,
        memory_bytes=80 << 30,
        memory_bytes_per_s=2.04e12,
        link_bytes_per_s=200e9,
        source="NVIDIA A800 80GB data sheet, SXM: NVLink at 400 GB/s",
    ),
    Gpu(
        name="l40s",
        device="L40S",
        flops_per_s=362e12,
        memory_bytes=48 << 30,
        memory_bytes_per_s=0.864e12,
        link_bytes_per_s=32e9,
        source="NVIDIA L40S data sheet; link: PCIe 4.0 x16",
    ),
    Gpu(
        name="4090",
        device="4090",
        flops_per_s=165e12,
        memory_bytes=24 << 30,
        memory_bytes_per_s=1.01e12,
        link_bytes_per_s=32e9,
        source="NVIDIA Ada architecture white paper, RTX 4090; link: PCIe 4.0 x16",
    ),
)
_CPU_SIZE = 768
_CPU_TRIALS = 5


def gpu_names() -> list[str]:
    """Of the table."""
    return sorted(gpu.name for gpu in _GPUS)


def gpu_of(name: str) -> Gpu:
    """A kind of GPU by name.

    Raises:
        ConfigError: There is no such kind in the table.
    """
    found = next((gpu for gpu in _GPUS if gpu.name == name.lower()), None)
    if found is None:
        raise ConfigError(f"--gpu {name!r} is not known; use one of {', '.join(gpu_names())}{nearest(name, gpu_names())}")
    return found


def gpu_for_device(name: str) -> Gpu | None:
    """The kind of GPU that the driver calls so; None where the table has none."""
    return next((gpu for gpu in _GPUS if gpu.device in name), None)


def peak_flops(device: torch.device, *, dtype: str) -> float | None:
    """FLOP/s of one rank's device at its peak; None for a GPU that is not in the table, or computes in another precision than it.

    Args:
        dtype: ``run.dtype``.

    A CPU has no one figure: its float32 matrix-multiply rate with this process's threads is measured, best of five.
    """
    if device.type == "cuda" and dtype != "bfloat16":
        return None
    if device.type == "cuda":
        gpu = gpu_for_device(torch.cuda.get_device_name(device))
        return None if gpu is None else gpu.flops_per_s
    a = torch.full((_CPU_SIZE, _CPU_SIZE), 0.5)
    best_s = float("inf")
    for _ in range(_CPU_TRIALS):
        start = time.perf_counter()
        torch.mm(a, a)
        best_s = min(best_s, time.perf_counter() - start)
    return 2 * _CPU_SIZE**3 / best_s
