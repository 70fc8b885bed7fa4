"""A preparation that is killed again and again, at every kind of moment, ends as one that was left alone."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from opensora_dist.config.prepare import PrepareConfig
from opensora_dist.core.video import write_video

# Forks before anything has run: a child prepares, and kills itself before its n-th write; the next one comes further, until one is through.
_DRIVER = """
import json, os, pathlib, signal, sys
import opensora_dist.prepare.run as run
from opensora_dist.config.prepare import PrepareConfig
from opensora_dist.prepare.blobs import Blobs
from opensora_dist.prepare.pipeline import prepare
from opensora_dist.prepare.shards import ShardWriter
from opensora_dist.prepare.store import StageStore
from opensora_dist.recipes.prepare import build_networks

run._BATCH_CLIPS = 2
config, first, step = PrepareConfig.model_validate_json(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])


def child(attempt):
    left = first + step * attempt

    def counted(function):
        def counting(*args, **kwargs):
            nonlocal left
            left -= 1
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*args, **kwargs)

        return counting

    for owner, name in ((StageStore, "put_all"), (Blobs, "put"), (ShardWriter, "add"), (os, "replace"), (pathlib.Path, "unlink")):
        setattr(owner, name, counted(getattr(owner, name)))
    codec, text, device = build_networks(config)
    prepare(config, codec=codec, text=text, device=device)


ends = []
for attempt in range(200):
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            child(attempt)
            code = 0
        finally:
            os._exit(code)
    ends.append(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
    if ends[-1] != -signal.SIGKILL:
        break
print(json.dumps(ends))
"""


def prepared(config: PrepareConfig, *, first: int, step: int) -> list[int]:
    """Exit codes of the processes that it took, killed before their write ``first``, ``first + step``, ..."""
    command = [sys.executable, "-c", _DRIVER, config.model_dump_json(), str(first), str(step)]
    done = subprocess.run(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, timeout=200, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    ends: list[int] = json.loads(done.stdout)
    assert ends[-1] == 0, done.stderr
    return ends


def contents(out: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in out.iterdir() if p.is_file() and p.name != "report.json"}


@pytest.mark.parametrize("first, step", [pytest.param(1, 1, marks=pytest.mark.slow), (2, 5)])
def test_killed_at_one_write_after_the_other_no_clip_is_lost_or_there_twice(tmp_path: Path, first: int, step: int) -> None:
    for i in range(5):
        noise = np.random.default_rng(i).integers(0, 60, (9, 4, 4, 3), dtype=np.uint8).repeat(8, 1).repeat(8, 2)
        write_video(tmp_path / "in" / f"{i}.mp4", noise + np.uint8(30 * i), fps=8)
        (tmp_path / "in" / f"{i}.txt").write_text(f"clip {i}")

    def config(out: str, **sections: Any) -> PrepareConfig:
        plain: dict[str, Any] = {
            "input": {"path": str(tmp_path / "in")},
            "output": {"path": str(tmp_path / out), "shard_samples": 3},
            "clip": {"fps": 8, "buckets": ((4, 16, 16),)},
            "shots": {"windows": "all"},
            "filter": {"duplicates": 0},
            "codec": {"name": "dct", "channels": 4},
            "text": {"name": "hash", "width": 8, "max_tokens": 6},
            "device": "cpu",
        }
        return PrepareConfig.model_validate(plain | sections)

    strict = {"filter": {"duplicates": 0, "brightness": (100, None)}}
    kills = prepared(config("killed"), first=first, step=step)
    assert len(kills) > 4
    rows = pq.read_table(tmp_path / "killed" / "clips.parquet").to_pylist()
    assert len(rows) == len({row["key"] for row in rows}) == 10
    assert prepared(config("straight"), first=100_000, step=1) == [0]
    assert contents(tmp_path / "killed") == contents(tmp_path / "straight")

    # And while one data set takes the place of another.
    assert len(prepared(config("killed", **strict), first=first, step=step)) > 1
    assert prepared(config("straight", **strict), first=100_000, step=1) == [0]
    assert contents(tmp_path / "killed") == contents(tmp_path / "straight")
    assert not list((tmp_path / "killed").rglob(".*partial*"))
