"""Clips per second of one core, score by score: of clips of real or toy video, each looked at as preparation does.

    python benchmarks/scores.py VIDEO [VIDEO ...] --out benchmarks/results/cpu/scores.json

The clips are cut once; each score is then measured on all of them, anew each time, so that nothing is shared between scores: in a preparation
that asks for several, motion and camera share the optical flow. Times are the process's own, median of the rounds, with the fastest and
slowest beside it. Shots, hashes and the search for near duplicates are timed too; and a whole preparation of eight copies of each video, by
its own command, from decoding to shards: shots with a look for dissolves, every score, and the `dct` codec.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np

from opensora_dist.config.prepare import ScoresConfig, ShotsConfig
from opensora_dist.core.io import write_json
from opensora_dist.core.types import Thw
from opensora_dist.core.video import Frames, evenly_spaced, iter_frames
from opensora_dist.prepare.clips import cut_clips
from opensora_dist.prepare.duplicates import near_duplicates, phash
from opensora_dist.prepare.probe import Probe
from opensora_dist.prepare.scores import SCORES, score_frames
from opensora_dist.prepare.shots import find_shots

FPS = 8.0
HASHES = 1_000_000
COPIES = 8


def measured(work: Callable[[], int], *, rounds: int) -> dict[str, float]:
    """Items per second of process time."""
    rates = []
    for _ in range(rounds):
        since_s = time.process_time()
        count = work()
        rates.append(count / (time.process_time() - since_s))
    return {"per_s": statistics.median(rates), "slowest": min(rates), "fastest": max(rates)}


def clips_of(paths: list[Path], size: int) -> list[Frames]:
    """All clips of 16 frames."""
    shape = [Thw(16, size, size)]
    return [cut.frames_THW3 for path in paths for cut in cut_clips(iter_frames(path), fps=FPS, buckets=shape, every=True)]


def scored(clips: list[Frames], names: list[str]) -> int:
    """Measures scores of all clips; how many clips that were."""
    source = Probe(height=720, width=1280, fps=25, bits=1e6)
    for clip in clips:
        score_frames(clip, fps=FPS, names=names, source=source, looks=ScoresConfig().frames)
    return len(clips)


def hashed(clips: list[Frames]) -> int:
    """Hashes all clips; how many that were."""
    for clip in clips:
        phash(evenly_spaced(clip, ScoresConfig().frames))
    return len(clips)


def shot_frames(paths: list[Path], config: ShotsConfig) -> int:
    """Finds shots, decoding included; how many frames that were."""
    return sum(max(shot.end_frame for shot in find_shots(path, config)) for path in paths)


def searched(hashes: list[int], max_bits: int) -> int:
    """Searches near duplicates; how many hashes that were."""
    near_duplicates(hashes, max_bits)
    return len(hashes)


def some_hashes() -> list[int]:
    """Random hashes of which a tenth are near another."""
    rng = np.random.default_rng(0)
    hashes = rng.integers(0, 2**64, HASHES, dtype=np.uint64)
    near = rng.choice(HASHES, HASHES // 10, replace=False)
    hashes[near] = hashes[rng.integers(0, HASHES, len(near))] ^ (np.uint64(1) << rng.integers(0, 64, len(near)).astype(np.uint64))
    return [int(value) for value in hashes]


def prepared(paths: list[Path], *, size: int) -> dict[str, float]:
    """A whole preparation by one worker: clips a second of what all its processes computed, start-up included."""
    with tempfile.TemporaryDirectory() as folder:
        videos = Path(folder, "videos")
        videos.mkdir()
        rows = ["path,text"]
        for copy in range(COPIES):
            for path in paths:
                name = f"{copy}-{path.name}"
                (videos / name).symlink_to(path.resolve())
                rows.append(f"{name},clip {copy} of {path.stem}")
        (videos / "metadata.csv").write_text("\n".join(rows) + "\n")
        settings = [
            f"input.path={videos}",
            f"output.path={Path(folder, 'shards')}",
            "workers=1",
            "shots={detector: adaptive, dissolves: true, min_s: 1, windows: all}",
            f"clip={{fps: {FPS:g}, buckets: [[16, {size}, {size}]]}}",
            f"scores={{also: {json.dumps(list(SCORES))}}}",
        ]
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        command = [sys.executable, "-m", "opensora_dist", "data", "prepare", *settings, "--json"]
        report = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.splitlines()[-1])
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
    core_s = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return {"clips": report["samples"], "core_s": core_s, "clips_per_core_s": report["samples"] / core_s}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("videos", nargs="+", type=Path)
    parser.add_argument("--size", type=int, default=256, help="height and width in pixels")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    cv2.setNumThreads(1)
    clips, hashes = clips_of(args.videos, args.size), some_hashes()
    found = {name: measured(lambda name=name: scored(clips, [name]), rounds=args.rounds) for name in SCORES}
    found["all scores"] = measured(lambda: scored(clips, list(SCORES)), rounds=args.rounds)
    found["hash"] = measured(lambda: hashed(clips), rounds=args.rounds)
    for detector in ("content", "adaptive"):
        shots = ShotsConfig(detector=detector, dissolves=True)
        found[f"shots, {detector}, frames"] = measured(lambda shots=shots: shot_frames(args.videos, shots), rounds=args.rounds)
    for max_bits in (0, 3, 6):
        name = f"near duplicates, {max_bits} bits, hashes"
        found[name] = measured(lambda max_bits=max_bits: searched(hashes, max_bits), rounds=args.rounds)
    for name, rate in found.items():
        print(f"{name}: {rate['per_s']:.1f} per second of a core ({rate['slowest']:.1f} to {rate['fastest']:.1f})")
    whole = prepared(args.videos, size=args.size)
    print(f"a whole preparation: {whole['clips_per_core_s']:.2f} clips per second of a core ({whole['clips']} clips)")
    setup = {"videos": [path.name for path in args.videos], "clips": len(clips), "size": args.size, "hashes": HASHES}
    write_json(args.out, setup | {"rounds": args.rounds, "per_core_second": found, "whole": whole})


if __name__ == "__main__":
    main()
