"""Every kernel compiles for every architecture, where there is no GPU."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="Triton runs on Linux only; pip install 'opensora-dist[kernels]'")

import opensora_kernels

WITHOUT_A_KERNEL = {"__init__", "compile", "rows", "products"}


def test_every_kernel_compiles_for_every_architecture():
    """In a process of its own: this one interprets."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "opensora_kernels.compile"]
    said = subprocess.run(command, capture_output=True, text=True, timeout=280, env=environment)
    assert said.returncode == 0, said.stderr
    rows = [line.strip("| ").split(" | ") for line in said.stdout.splitlines() if line.startswith("| ") and "---" not in line][1:]
    assert all(len(row) == 4 for row in rows)
    files = {path.stem for path in Path(opensora_kernels.__file__).parent.glob("*.py")} - WITHOUT_A_KERNEL
    for name in files:
        of_file = [row[0] for row in rows if row[0].startswith(f"{name},") or row[0].startswith(f"{name} ")]
        assert any("forward" in row for row in of_file) and any("backward" in row for row in of_file), name
    spilled = {row[0]: cell for row in rows for cell in row[1:] if not row[0].startswith("varlen") and cell.split(", ")[1] != "0"}
    assert not spilled
