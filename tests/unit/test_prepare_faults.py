"""What one bad file, one dead worker or one failed read costs: that file, and it is said so."""

from __future__ import annotations

import errno
import math
import multiprocessing
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from opensora_dist.config.prepare import PrepareConfig
from opensora_dist.core.errors import ConfigError, DataError
from opensora_dist.core.video import write_video
from opensora_dist.prepare import clip_model, scores, work
from opensora_dist.prepare.clips import resize_and_crop
from opensora_dist.prepare.pipeline import prepare, prepare_part
from opensora_dist.prepare.report import PrepareReport
from opensora_dist.prepare.run import PrepareProgress
from opensora_dist.recipes.prepare import build_networks


def noise(path: Path, *, seed: int, frames: int = 9) -> None:
    texture = np.random.default_rng(seed).integers(0, 200, (frames, 8, 8, 3), dtype=np.uint8).repeat(4, 1).repeat(4, 2)
    write_video(path, texture, fps=8)
    path.with_suffix(".txt").write_text(f"clip {path.stem}")


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve videos of two clips each."""
    folder = tmp_path_factory.mktemp("source")
    for i in range(12):
        noise(folder / f"{i:02d}.mp4", seed=i)
    return folder


def settings(source: Path, out: Path, **sections: Any) -> PrepareConfig:
    plain: dict[str, Any] = {
        "input": {"path": str(source)},
        "output": {"path": str(out), "shard_samples": 5},
        "clip": {"fps": 8, "buckets": ((4, 16, 16),)},
        "shots": {"windows": "all"},
        "codec": {"name": "dct", "channels": 4},
        "text": {"name": "hash", "width": 8, "max_tokens": 6},
        "device": "cpu",
    }
    return PrepareConfig.model_validate(plain | sections)


def run(config: PrepareConfig, on_progress: Callable[[PrepareProgress], None] = lambda progress: None) -> PrepareReport:
    codec, text, device = build_networks(config)
    return prepare(config, codec=codec, text=text, device=device, on_progress=on_progress)


def contents(out: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in out.iterdir() if p.is_file() and p.name != "report.json"}


def breaking(monkeypatch: pytest.MonkeyPatch, name: str, error: Exception, *, after: int = 0) -> Callable[[], None]:
    """Decoding of one file fails with an error behind so many frames, until what is returned is called."""
    whole = work.iter_frames

    def broken(path: Path) -> Iterator[Any]:
        frames = whole(path)
        if path.name == name:
            for _ in range(after):
                yield next(frames)
            raise error
        yield from frames

    monkeypatch.setattr(work, "iter_frames", broken)
    return lambda: monkeypatch.setattr(work, "iter_frames", whole)


def unreadable() -> DataError:
    error = DataError("03.mp4: can't be decoded")
    error.__cause__ = OSError(errno.EIO, "Input/output error")
    return error


# One file


def test_an_error_that_nobody_foresaw_costs_its_source_and_is_told(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    breaking(monkeypatch, "03.mp4", UnicodeDecodeError("utf-8", b"\xe9", 0, 1, "invalid continuation byte"))
    report = run(settings(source, tmp_path))
    (drop,) = report.dropped
    assert (drop.source, drop.stage, report.samples) == ("03.mp4", "cut", 22)
    assert "UnicodeDecodeError: 'utf-8' codec" in drop.reason


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), ImportError("no cv2"), ConfigError("none")])
def test_what_every_source_would_meet_ends_the_run(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    breaking(monkeypatch, "03.mp4", error)
    with pytest.raises((DataError, ImportError, ConfigError)):
        run(settings(source, tmp_path))


def test_a_picture_of_any_shape_takes_no_more_memory_than_it_has_or_gets(monkeypatch: pytest.MonkeyPatch) -> None:
    import cv2

    seen, resize = [], cv2.resize

    def watched(frame: Any, size: tuple[int, int], **options: Any) -> Any:
        seen.append(max(frame.size, 3 * size[0] * size[1]))
        return resize(frame, size, **options)

    monkeypatch.setattr(cv2, "resize", watched)
    for height, width in ((1, 60_000), (60_000, 1), (3, 2000)):
        assert resize_and_crop(np.zeros((height, width, 3), np.uint8), height=256, width=256).shape == (256, 256, 3)
    assert max(seen) <= 3 * 256 * 256


# A read that failed


def test_a_read_that_failed_is_tried_again_by_the_next_run_and_other_problems_are_not(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for after in (0, 6):  # before and behind its first clip
        out = tmp_path / str(after)
        mend = breaking(monkeypatch, "03.mp4", unreadable(), after=after)
        report = run(settings(source, out))
        assert [drop.source for drop in report.dropped] == ["03.mp4"]
        assert report.samples == 22 + (after > 0)
        mend()
        assert run(settings(source, out)).samples == 24
    run(settings(source, tmp_path / "straight"))
    assert contents(tmp_path / "0") == contents(tmp_path / "6") == contents(tmp_path / "straight")
    mend = breaking(monkeypatch, "03.mp4", DataError("03.mp4: damaged"))
    run(settings(source, tmp_path / "other"))
    mend()
    assert run(settings(source, tmp_path / "other")).samples == 22


def test_clips_that_can_no_longer_be_read_are_told_and_nothing_waits_for_them(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(settings(source, tmp_path))
    mend = breaking(monkeypatch, "03.mp4", unreadable())
    strict = settings(source, tmp_path, filter={"duplicates": 0, "sharpness": 0.0})  # asks for scores of every clip
    report = run(strict)
    assert report.samples == 22
    assert {drop.source for drop in report.dropped} == {"03.mp4"}
    config = settings(source, tmp_path / "part", filter={"duplicates": 0})
    codec, text, _ = build_networks(config)
    assert not prepare_part(config, part=(1, 1), codec=codec, text=text).waits
    mend()
    assert run(strict).samples == 24


# A worker that died


def killing(when: Callable[[PrepareProgress], bool], signal_number: int) -> Callable[[PrepareProgress], None]:
    others = set(multiprocessing.active_children())  # the ranks that multi-process tests share

    def kill(progress: PrepareProgress) -> None:
        if progress.what == "clips" and when(progress):
            for child in set(multiprocessing.active_children()) - others:
                os.kill(child.pid or 0, signal_number)

    return kill


def test_a_file_that_kills_its_worker_is_left_out_and_the_run_goes_on(source: Path, tmp_path: Path) -> None:
    config = settings(source, tmp_path / "a", workers=2)
    report = run(config, killing(lambda progress: progress.done == 2, signal.SIGSEGV))
    assert 0 < len(report.dropped) <= 2
    assert {drop.reason for drop in report.dropped} == {f"its worker died (signal {int(signal.SIGSEGV)})"}
    assert report.samples >= 24 - 2 * len(report.dropped)
    assert run(settings(source, tmp_path / "a")).dropped == report.dropped  # it would kill the next one too


def test_a_worker_that_was_killed_from_outside_costs_one_run(source: Path, tmp_path: Path) -> None:
    config = settings(source, tmp_path / "a", workers=2)
    assert run(config, killing(lambda progress: progress.done == 2, signal.SIGKILL)).dropped
    assert not run(settings(source, tmp_path / "a")).dropped
    run(settings(source, tmp_path / "b"))
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


def test_workers_that_die_one_after_the_other_are_an_error(source: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"4 worker processes died, the last while it worked on .*\.mp4"):
        run(settings(source, tmp_path, workers=2), killing(lambda progress: True, signal.SIGKILL))


# Videos that hold less than they say


def test_a_video_that_ends_before_its_headers_say_is_told_beside_its_clips(tmp_path: Path) -> None:
    noise(tmp_path / "in" / "a.mp4", seed=1, frames=80)
    import av

    with av.open(str(tmp_path / "in" / "a.mp4")) as had, av.open(str(tmp_path / "in" / "b.mkv"), "w") as out:
        stream = out.add_stream_from_template(had.streams.video[0])
        for packet in had.demux(had.streams.video[0]):
            if packet.dts is not None:
                packet.stream = stream
                out.mux(packet)
    (tmp_path / "in" / "b.txt").write_text("b")
    whole = run(settings(tmp_path / "in", tmp_path / "whole"))
    assert (whole.samples, whole.num_dropped) == (40, 0)
    data = (tmp_path / "in" / "b.mkv").read_bytes()
    (tmp_path / "in" / "b.mkv").write_bytes(data[: len(data) // 2])
    report = run(settings(tmp_path / "in", tmp_path / "out"))
    assert 20 < report.samples < 40
    (drop,) = report.dropped
    assert drop.source == "b.mkv"
    assert "breaks off at" in drop.reason or "can't be decoded" in drop.reason
    rows = pq.read_table(tmp_path / "out" / "clips.parquet").to_pylist()
    assert [row["path"] for row in rows if not row["kept"]] == ["b.mkv"]


# Scores that are no numbers


def test_a_clip_whose_score_is_no_number_is_dropped_where_that_is_asked_for(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measure = scores.score_frames

    def some(frames: Any, **options: Any) -> dict[str, Any]:
        found = measure(frames, **options)
        return {name: math.nan if found["brightness"] < 100 else x for name, x in found.items()}

    monkeypatch.setattr(scores, "score_frames", some)
    also = {"also": ("brightness", "sharpness")}
    assert run(settings(source, tmp_path, scores=also)).samples == 24
    report = run(settings(source, tmp_path, scores=also, filter={"sharpness": 0.0}))
    assert 0 < report.samples < 24
    assert {drop.reason for drop in report.dropped} == {"sharpness is not a number, and filter.sharpness asks for one"}


def test_a_network_that_answers_nan_costs_the_clip_and_not_the_run(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Model:
        asked = 0

        def __init__(self, path: str, **options: Any) -> None:
            pass

        def aesthetic(self, frames: Any) -> float:
            Model.asked += 1
            return math.nan if frames.mean() < 100 else 5.0

        def match(self, frames: Any, caption: str) -> float:
            return math.nan if caption == "clip 03" else 0.5

    monkeypatch.setattr(clip_model, "ClipModel", Model)
    model = {"clip_model": "a", "aesthetic_head": "b"}
    report = run(settings(source, tmp_path, scores=model, filter={"aesthetic": 1.0, "match": 0.1}))
    assert 0 < report.samples < 24
    assert {drop.stage for drop in report.dropped} == {"filter", "match"}
    assert all("is not a number" in drop.reason for drop in report.dropped)
    asked = Model.asked
    run(settings(source, tmp_path, scores=model, filter={"aesthetic": 1.0, "match": 0.1}))
    assert Model.asked == asked == 24


# Refusals


def test_an_output_that_is_a_file_is_refused_by_name(source: Path, tmp_path: Path) -> None:
    (tmp_path / "out").write_text("precious")
    with pytest.raises(ConfigError, match=r"output\.path=.* is a file; give a folder"):
        run(settings(source, tmp_path / "out"))


def test_arrays_that_are_lost_again_and_again_are_an_error(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from opensora_dist.prepare.blobs import Blobs

    monkeypatch.setattr(Blobs, "read", lambda self, key, xxh3: None)
    with pytest.raises(DataError, match="again and again"):
        run(settings(source, tmp_path))
