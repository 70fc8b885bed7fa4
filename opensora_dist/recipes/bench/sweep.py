"""A grid of benchmarks."""

from __future__ import annotations

from pathlib import Path


def run_sweep(kind: str, path: Path, *, out: Path) -> int:
    """Runs every point that has not run."""
    raise NotImplementedError
