"""Kernels are run by Triton's interpreter, on CPU tensors: asked for before Triton is imported by anything."""

from __future__ import annotations

import os

os.environ.setdefault("TRITON_INTERPRET", "1")
