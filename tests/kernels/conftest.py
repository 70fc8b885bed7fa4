"""Kernels are run by Triton's interpreter, on CPU tensors: asked for before Triton is imported by anything.

``OPENSORA_KERNEL_TESTS=cuda``, which ``tests/gpu`` sets, runs them on the GPU.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import nullcontext

import pytest
import torch

_DEVICE = os.environ.get("OPENSORA_KERNEL_TESTS", "cpu")
if _DEVICE == "cpu":
    os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.fixture(autouse=True)
def _where_kernels_run() -> Iterator[None]:
    # Not on the CPU, where all is anyway: dynamo doesn't trace everything under a default device (torch 2.13).
    with nullcontext() if _DEVICE == "cpu" else torch.device(_DEVICE):
        yield
