"""The kernels' own suite, compiled and on the GPU in place of interpreted; and what float32 means there."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import torch

_KERNELS = Path(__file__).parents[1] / "kernels"


def test_every_kernel_is_its_reference_in_every_case_of_its_suite(device):
    """In a process of its own, whose Triton doesn't interpret."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    files = [str(_KERNELS / name) for name in ("test_row_kernels.py", "test_attention_kernels.py")]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *files]
    said = subprocess.run(
        command, env=environment | {"OPENSORA_KERNEL_TESTS": device.type}, capture_output=True, text=True, timeout=280
    )
    assert said.returncode == 0, said.stdout[-4000:] + said.stderr[-2000:]


def test_a_product_of_float32_is_not_rounded_to_tf32(device):
    """torch's default, which nothing here changes: TF32 would round factors to 11 bits."""
    assert torch.get_float32_matmul_precision() == "highest"
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(512, 512, generator=generator).to(device) for _ in range(2))
    exact = a.double() @ b.double()
    assert float(((a @ b).double() - exact).abs().max() / exact.abs().max()) < 1e-5
