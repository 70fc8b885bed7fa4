"""Kernels are run by Triton's interpreter, on CPU tensors: asked for before Triton is imported by anything.

``OPENSORA_KERNEL_TESTS=cuda``, which ``tests/gpu`` sets, runs them on the GPU.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch

_DEVICE = os.environ.get("OPENSORA_KERNEL_TESTS", "cpu")
if _DEVICE == "cpu":
    os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.fixture(autouse=True)
def _where_kernels_run() -> Iterator[None]:
    with torch.device(_DEVICE):
        yield
