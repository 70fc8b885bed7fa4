"""The kernels' own suite, compiled and on the GPU in place of interpreted; and what float32 means there."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
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


def test_elements_beyond_two_to_the_31st_are_found(device):
    """The last row of more than 2^31 numbers, which 32 bits can't reach, and the first, where a wrapped address would lie."""
    H = 4608
    R = 2**31 // H + 17
    needed = 6 * R * H * 2  # input, output, their gradients, and room
    if device.type != "cuda" or torch.cuda.mem_get_info(device)[0] < needed:
        pytest.skip(f"run it on a GPU with {needed / 2**30:.0f} GiB free")
    from opensora_kernels.bias_gelu import bias_gelu, reference

    generator = torch.Generator(device).manual_seed(0)
    ends = [slice(0, 16), slice(R - 16, R)]
    x = torch.zeros((R, H), dtype=torch.bfloat16, device=device)
    for rows in ends:
        x[rows] = torch.randn((16, H), generator=generator, device=device)
    bias = torch.zeros(H, device=device).requires_grad_()  # gelu(0) is 0, and its slope a half
    out = bias_gelu(x.requires_grad_(), bias)
    grad = torch.zeros_like(out)
    for rows in ends:
        grad[rows] = torch.randn((16, H), generator=generator, device=device)
    dx, dbias = torch.autograd.grad(out, (x, bias), grad)
    total = torch.zeros(H, dtype=torch.float64, device=device)
    for rows in ends:
        part = x.detach()[rows].double().requires_grad_()
        wanted = reference(part, bias.detach().double())
        (right,) = torch.autograd.grad(wanted, part, grad[rows].double())
        total += right.sum(dim=0)
        for found, exact in ((out.detach()[rows], wanted.detach()), (dx[rows], right)):
            assert float((found.double() - exact).abs().max() / exact.abs().max()) < 1e-2
    assert float((dbias.double() - total).abs().max() / total.abs().max()) < 1e-4


def test_a_product_of_float32_is_not_rounded_to_tf32(device):
    """torch's default, which nothing here changes: TF32 would round factors to 11 bits."""
    assert torch.get_float32_matmul_precision() == "highest"
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(512, 512, generator=generator).to(device) for _ in range(2))
    exact = a.double() @ b.double()
    assert float(((a @ b).double() - exact).abs().max() / exact.abs().max()) < 1e-5
