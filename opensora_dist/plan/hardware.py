"""Peak matrix-multiply rates, against which model FLOPs use (MFU) is stated."""

from __future__ import annotations

import time

import torch

# Dense bf16 tensor-core peaks in FLOP/s, from the vendor's data sheets (SXM parts where there are several; sparsity left out).
# The first name that a device's name contains counts, so special parts stand before their family.
_GPU_PEAK_FLOPS = {
    "H100 NVL": 835e12,
    "H100 PCIe": 756e12,
    "B200": 2250e12,
    "H200": 989.5e12,
    "H100": 989.5e12,
    "H800": 989.5e12,
    "A100": 312e12,
    "A800": 312e12,
    "L40S": 362e12,
    "4090": 165e12,
}
_CPU_SIZE = 768
_CPU_TRIALS = 5


def peak_flops(device: torch.device, *, dtype: str) -> float | None:
    """FLOP/s of one rank's device at its peak; None for a GPU that is not in the table, or computes in another precision than it.

    Args:
        dtype: ``run.dtype``.

    A CPU has no one figure: its float32 matrix-multiply rate with this process's threads is measured, best of five.
    """
    if device.type == "cuda" and dtype != "bfloat16":
        return None
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        return next((peak for part, peak in _GPU_PEAK_FLOPS.items() if part in name), None)
    a = torch.full((_CPU_SIZE, _CPU_SIZE), 0.5)
    best_s = float("inf")
    for _ in range(_CPU_TRIALS):
        start = time.perf_counter()
        torch.mm(a, a)
        best_s = min(best_s, time.perf_counter() - start)
    return 2 * _CPU_SIZE**3 / best_s
