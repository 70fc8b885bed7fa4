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
OF_A_BATCH = {"L", "S", "T", "R", "Q", "M", "rows", "tiles"}
SPECIALIZED = """
from opensora_kernels.compile import cases
for case in cases():
    print(case.name.replace(" ", "_"), *(p.name for p in case.kernel.params if not (p.is_constexpr or p.do_not_specialize)))
"""


def _said(*arguments: str) -> list[str]:
    """Lines of a Python of its own: this one interprets."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    said = subprocess.run([sys.executable, *arguments], capture_output=True, text=True, timeout=280, env=environment)
    assert said.returncode == 0, said.stderr
    return said.stdout.splitlines()


def test_no_kernel_is_compiled_again_for_another_number_of_tokens():
    """Of numbers that are 1 or multiples of 16 Triton would make kernels of their own."""
    lines = [line.split() for line in _said("-c", SPECIALIZED)]
    assert len(lines) >= 13 and all(len(names) > 1 for names in lines)
    assert {name: found for name, *specialized in lines if (found := OF_A_BATCH & set(specialized))} == {}


def test_every_kernel_compiles_for_every_architecture():
    lines = _said("-m", "opensora_kernels.compile")
    rows = [line.strip("| ").split(" | ") for line in lines if line.startswith("| ") and "---" not in line][1:]
    assert all(len(row) == 4 for row in rows)
    files = {path.stem for path in Path(opensora_kernels.__file__).parent.glob("*.py")} - WITHOUT_A_KERNEL
    for name in files:
        of_file = [row[0] for row in rows if row[0].startswith(f"{name},") or row[0].startswith(f"{name} ")]
        assert any("forward" in row for row in of_file) and any("backward" in row for row in of_file), name
    spilled = {row[0]: cell for row in rows for cell in row[1:] if not row[0].startswith("varlen") and cell.split(", ")[1] != "0"}
    assert not spilled
