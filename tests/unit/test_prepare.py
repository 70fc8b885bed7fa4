"""Preparation as a whole: tiny videos in, a data set out, through every interruption."""

from __future__ import annotations

import errno
import io
import json
import signal
import subprocess
import sys
import tarfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import webdataset as wds
import xxhash

from opensora_dist.codecs.registry import build_codec, build_text_encoder
from opensora_dist.config.codec import DctCodecConfig, HashTextConfig
from opensora_dist.config.dataset import DatasetSpec
from opensora_dist.config.prepare import ClipConfig, InputConfig, OutputConfig, PrepareConfig
from opensora_dist.core.errors import ConfigError, DataError
from opensora_dist.core.index import read_header, read_rows
from opensora_dist.core.io import hash_file
from opensora_dist.core.protocols import LatentStats
from opensora_dist.core.types import Thw
from opensora_dist.core.video import iter_frames, write_video
from opensora_dist.prepare import output, resume, shards
from opensora_dist.prepare import run as run_module
from opensora_dist.prepare.pipeline import prepare
from opensora_dist.prepare.report import PrepareReport
from opensora_dist.prepare.run import PrepareProgress
from opensora_dist.prepare.shards import sample_key
from opensora_dist.prepare.stats import ChannelSums, measured_stats

CPU = torch.device("cpu")
CODEC = DctCodecConfig(channels=4)
TEXT = HashTextConfig(width=8, max_tokens=6)


class BatchCodec:
    """Latents tell the batch they were encoded in: [place, size, mean, 1]; a white clip overflows float16."""

    channels, spatial_factor, temporal_factor = 4, 8, 1
    stats = LatentStats(mean=(0.0,) * 4, std=(1.0,) * 4)

    def __init__(self, *, white: float = 1e6) -> None:
        self.white = white

    def latent_shape(self, clip: Thw) -> Thw:
        return Thw(clip.t, clip.h // 8, clip.w // 8)

    def encode(self, frames: torch.Tensor, *, generators: Sequence[torch.Generator] | None = None) -> torch.Tensor:
        batch, frames_, height, width, _ = frames.shape
        mean = frames.float().mean(dim=(1, 2, 3, 4))
        mean[mean > 250] = self.white
        values = torch.stack([torch.arange(batch).float(), torch.full((batch,), float(batch)), mean, torch.ones(batch)], dim=1)
        return values[..., None, None, None].expand(-1, -1, frames_, height // 8, width // 8)

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        raise NotImplementedError


def rows_of(folder: Path) -> list[dict[str, Any]]:
    return [asdict(row) for row in read_rows(folder)]


def video(path: Path, *, frames: int = 4, height: int = 16, width: int = 16, level: int = 100) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    ramp = np.linspace(0, 40, width).astype(np.uint8)[None, None, :, None]
    clip = np.zeros((frames, height, width, 3), np.uint8) + (np.uint8(level) if level == 255 else ramp + np.uint8(level))
    write_video(path, clip, fps=8)
    path.with_suffix(".txt").write_text(f"a clip, {path.stem}", encoding="utf-8")


def config(source: Path, out: Path, *, workers: int = 1, shard_samples: int = 3, dtype: str = "float16") -> PrepareConfig:
    return PrepareConfig(
        input=InputConfig(path=str(source)),
        output=OutputConfig(path=str(out), shard_samples=shard_samples, dtype=dtype),
        clip=ClipConfig(fps=8, buckets=((4, 16, 16), (1, 16, 16), (4, 16, 32))),
        codec=CODEC,
        text=TEXT,
        workers=workers,
        device="cpu",
    )


def run(
    config: PrepareConfig, *, codec: object = None, on_progress: Callable[[PrepareProgress], None] | None = None
) -> PrepareReport:
    return prepare(
        config,
        codec=codec or build_codec(config.codec, device=CPU),  # type: ignore[arg-type]
        text=build_text_encoder(config.text, device=CPU),
        on_progress=on_progress or (lambda progress: None),
    )


def contents(out: Path) -> dict[str, bytes]:
    """Every file of a data set but its report, which tells how long it took."""
    return {p.name: p.read_bytes() for p in out.iterdir() if p.is_file() and p.name != "report.json"}


@pytest.fixture(scope="module", autouse=True)
def _small_batches() -> Iterator[None]:
    """Two clips a batch, so that a shard of three takes several."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run_module, "_BATCH_CLIPS", 2)
        yield


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eleven good videos in three buckets, a white one, and every kind of bad one."""
    folder = tmp_path_factory.mktemp("source")
    for i in range(6):
        video(folder / f"square {i}.mp4", level=20 * i)
    for i in range(2):
        video(folder / "wide" / f"square {i}.mp4", height=33, width=65, level=30 * i)  # stems of the others, odd sizes
    video(folder / "größe é.mp4", height=32, width=16)
    video(folder / "one.frame.mp4", frames=1)
    video(folder / "square 2b.mp4", level=255)
    video(folder / "z last.mp4", level=7)
    whole = (folder / "square 0.mp4").read_bytes()
    for name, content in {"broken.mp4": whole[: len(whole) // 2], "empty.mp4": b"", "text.mp4": b"no video at all"}.items():
        (folder / name).write_bytes(content)
        (folder / name).with_suffix(".txt").write_text("bad")
    (folder / "silent.mp4").write_bytes(whole)
    return folder


@pytest.fixture(scope="module")
def straight(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The data set of a run that was never interrupted, with a codec that shows how clips were batched."""
    out = tmp_path_factory.mktemp("straight")
    run(config(source, out), codec=BatchCodec())
    return out


# What comes out


def test_report_counts_buckets_and_names_every_drop(source: Path, tmp_path: Path) -> None:
    report = run(config(source, tmp_path), codec=BatchCodec())
    assert report.samples == 11
    assert report.buckets == {"1x16x16": 1, "4x16x16": 8, "4x16x32": 2}
    assert report.shards == 5
    reasons = {drop.source: drop.reason for drop in report.dropped}
    assert list(reasons) == ["broken.mp4", "empty.mp4", "silent.mp4", "square 2b.mp4", "text.mp4"]
    assert "can't be decoded" in reasons["broken.mp4"] or "no video stream" in reasons["broken.mp4"]
    assert "0 bytes" in reasons["empty.mp4"]
    assert "no caption" in reasons["silent.mp4"]
    assert "beyond float16" in reasons["square 2b.mp4"]
    assert "output.dtype=float32" in reasons["square 2b.mp4"]
    assert "can't be decoded" in reasons["text.mp4"]
    written = json.loads((tmp_path / "report.json").read_text())
    assert [drop["source"] for drop in written["dropped"]] == list(reasons)
    assert written["samples"] == 11


def test_offsets_of_the_index_point_at_raw_array_bytes(source: Path, tmp_path: Path) -> None:
    run(config(source, tmp_path))
    for row in rows_of(tmp_path):
        data = (tmp_path / row["shard"]).read_bytes()
        for part, shape in (
            ("latents", (row["latent_t"], 4, row["latent_h"], row["latent_w"])),
            ("text", (row["text_tokens"], 8)),
        ):
            raw = data[row[f"{part}_offset"] :][: row[f"{part}_bytes"]]
            if part == "latents":
                frame_bytes = len(raw) // shape[0]
                frames = [raw[i : i + frame_bytes] for i in range(0, len(raw), frame_bytes)]
                assert [xxhash.xxh3_64_intdigest(frame) for frame in frames] == list(row["latents_frame_xxh3"])
            else:
                assert xxhash.xxh3_64_intdigest(raw) == row["text_xxh3"]
            with tarfile.open(tmp_path / row["shard"]) as tar:
                member = tar.extractfile(f"{row['key']}.{part}.npy")
                assert member is not None
                array = np.load(io.BytesIO(member.read()), allow_pickle=False)
            assert array.shape == shape
            assert array.dtype.name == row["dtype"] == "float16"
            assert array.tobytes() == raw


def test_shards_are_listed_with_their_size_and_hash_and_hold_one_bucket_each(straight: Path) -> None:
    index = read_header(straight)
    assert sum(shard.num_samples for shard in index.shards) == index.num_samples == 11
    assert {shard.name for shard in index.shards} == {p.name for p in straight.glob("*.tar")}
    for shard in index.shards:
        assert hash_file(straight / shard.name) == shard.xxh3
        assert (straight / shard.name).stat().st_size == shard.num_bytes
        clips = {(r["clip_t"], r["clip_h"], r["clip_w"]) for r in rows_of(straight) if r["shard"] == shard.name}
        assert len(clips) == 1


def test_latents_and_text_are_what_codec_and_encoder_give(source: Path, tmp_path: Path) -> None:
    from opensora_dist.prepare.clips import cut_clips

    settings = config(source, tmp_path, dtype="float32")
    run(settings)
    row = next(r for r in rows_of(tmp_path) if r["source"] == "größe é.mp4")
    buckets = [Thw(*bucket) for bucket in settings.clip.buckets]
    (cut,) = cut_clips(iter_frames(source / "größe é.mp4"), fps=8, buckets=buckets)
    data = (tmp_path / row["shard"]).read_bytes()
    latents = np.frombuffer(data, np.float32, row["latents_bytes"] // 4, row["latents_offset"]).reshape(4, 4, 2, 2)
    wanted = build_codec(CODEC, device=CPU).encode(torch.from_numpy(cut.frames_THW3)[None])[0].transpose(0, 1)
    torch.testing.assert_close(torch.from_numpy(latents.copy()), wanted)
    text = np.frombuffer(data, np.float32, row["text_bytes"] // 4, row["text_offset"]).reshape(-1, 8)
    torch.testing.assert_close(torch.from_numpy(text.copy()), build_text_encoder(TEXT, device=CPU).encode([row["caption"]])[0])


def test_webdatasets_own_reader_reads_the_shards(straight: Path) -> None:
    urls = sorted(str(p) for p in straight.glob("*.tar"))
    samples = list(wds.WebDataset(urls, shardshuffle=False).decode())
    rows = {row["key"]: row for row in rows_of(straight)}
    assert [s["__key__"] for s in samples] == list(rows)
    for sample in samples:
        row = rows[sample["__key__"]]
        assert set(sample) >= {"latents.npy", "text.npy", "json"}
        assert sample["latents.npy"].shape == (row["latent_t"], 4, row["latent_h"], row["latent_w"])
        assert sample["text.npy"].shape == (row["text_tokens"], 8)
        assert sample["json"]["source"] == row["source"]
        assert sample["json"]["caption"] == row["caption"]
        assert sample["json"]["clip"] == [row["clip_t"], row["clip_h"], row["clip_w"]]
        assert sample["json"]["latents"] == list(sample["latents.npy"].shape)


def test_shards_hold_nothing_of_this_machine_or_moment(straight: Path) -> None:
    for path in straight.glob("*.tar"):
        with tarfile.open(path) as tar:
            for member in tar:
                assert (member.mtime, member.uid, member.gid, member.uname, member.gname) == (0, 0, 0, "", "")
                assert member.isreg()


def test_keys_are_unique_and_safe_for_tar_and_webdataset() -> None:
    names = ["a.mp4", "b/a.mp4", "a.mov", "a.b.mp4", "größe é.mp4", "日本.mp4", "..mp4", "x" * 300 + ".mp4", "a b/c-d_e.mkv"]
    keys = [sample_key(name) for name in names]
    assert len(set(keys)) == len(names)
    assert all(set(key) <= set("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789-_") for key in keys)
    assert all(len(f"{key}.latents.npy") <= 100 for key in keys)
    assert sample_key("b/a.mp4").startswith("b-a-")


def test_spec_has_what_training_and_sampling_need(source: Path, tmp_path: Path) -> None:
    run(config(source, tmp_path))
    spec = DatasetSpec.model_validate(read_header(tmp_path).spec)
    assert (spec.codec, spec.text, spec.fps) == (CODEC, TEXT, 8)
    assert (spec.channels, spec.spatial_factor, spec.temporal_factor, spec.text_width, spec.max_tokens) == (4, 8, 1, 8, 6)
    assert spec.buckets == ((4, 16, 16), (4, 16, 32), (1, 16, 16))


def test_stats_are_measured_over_what_is_stored_and_floored(source: Path, tmp_path: Path) -> None:
    run(config(source, tmp_path))
    spec = DatasetSpec.model_validate(read_header(tmp_path).spec)
    stored = []
    for row in rows_of(tmp_path):
        raw = np.frombuffer((tmp_path / row["shard"]).read_bytes(), np.float16, row["latents_bytes"] // 2, row["latents_offset"])
        latents = raw.reshape(row["latent_t"], 4, row["latent_h"], row["latent_w"]).astype(np.float64)
        stored.append(latents.transpose(1, 0, 2, 3).reshape(4, -1))
    positions = np.concatenate(stored, axis=1)
    np.testing.assert_allclose(spec.latent_mean, positions.mean(1), rtol=1e-9, atol=1e-9)
    floored = np.maximum(positions.std(1), 0.35 * positions.std(1).max())
    np.testing.assert_allclose(spec.latent_std, floored, rtol=1e-9)
    assert (floored > positions.std(1)).any()


def test_a_codecs_own_stats_are_kept(straight: Path) -> None:
    assert DatasetSpec.model_validate(read_header(straight).spec).latent_std == (1.0,) * 4


def test_stats_of_latents_that_never_vary_are_positive() -> None:
    stats = measured_stats(ChannelSums.of(np.full((2, 3, 4, 4), 5.0, np.float32)))
    assert stats.mean == (5.0,) * 3
    assert min(stats.std) > 0


def test_cut_captions_are_counted(tmp_path: Path) -> None:
    video(tmp_path / "in" / "a.mp4")
    (tmp_path / "in" / "a.txt").write_text("one two three four five six seven")
    assert run(config(tmp_path / "in", tmp_path / "out")).cut_captions == 1


def test_an_empty_caption_is_a_caption(tmp_path: Path) -> None:
    video(tmp_path / "in" / "a.mp4")
    (tmp_path / "in" / "a.txt").write_text("")
    run(config(tmp_path / "in", tmp_path / "out"))
    (row,) = rows_of(tmp_path / "out")
    assert (row["caption"], row["text_tokens"]) == ("", 1)


def test_posterior_is_keyed_by_the_sample_not_by_its_place(source: Path, tmp_path: Path) -> None:
    class Drawing(BatchCodec):
        def encode(self, frames: torch.Tensor, *, generators: Sequence[torch.Generator] | None = None) -> torch.Tensor:
            assert generators is not None
            assert len(generators) == len(frames)
            draws = torch.stack([torch.empty(4).normal_(generator=g) for g in generators])
            return draws[..., None, None, None].expand(-1, -1, frames.shape[1], frames.shape[2] // 8, frames.shape[3] // 8)

    hashes = []
    for name, size in (("a", 3), ("b", 5)):
        run(config(source, tmp_path / name, shard_samples=size), codec=Drawing())
        hashes.append({row["key"]: row["latents_frame_xxh3"] for row in rows_of(tmp_path / name)})
    assert hashes[0] == hashes[1]


# Interruptions


class Stop(Exception):
    pass


def stop_after(calls: int) -> Callable[[PrepareProgress], None]:
    def on_progress(progress: PrepareProgress) -> None:
        nonlocal calls
        calls -= 1
        if calls == 0:
            raise Stop

    return on_progress


def test_two_workers_write_the_same_bytes_as_one(source: Path, straight: Path, tmp_path: Path) -> None:
    run(config(source, tmp_path, workers=2), codec=BatchCodec())
    assert contents(tmp_path) == contents(straight)


def test_interrupted_anywhere_and_resumed_it_writes_the_same_bytes(source: Path, straight: Path, tmp_path: Path) -> None:
    for calls in range(1, 19, 2):
        out = tmp_path / str(calls)
        with pytest.raises(Stop):
            run(config(source, out), codec=BatchCodec(), on_progress=stop_after(calls))
        assert not (out / "index.parquet").exists()
        assert not list(out.glob(".*partial*"))
        run(config(source, out), codec=BatchCodec())
        assert contents(out) == contents(straight)


def test_interrupted_at_every_step_of_one_preparation_it_still_ends_the_same(
    source: Path, straight: Path, tmp_path: Path
) -> None:
    for attempt in range(60):
        try:
            run(config(source, tmp_path), codec=BatchCodec(), on_progress=stop_after(10))
        except Stop:
            continue
        break
    assert 0 < attempt < 15
    assert contents(tmp_path) == contents(straight)


def test_killed_by_sigkill_and_resumed_it_writes_the_same_bytes(source: Path, tmp_path: Path) -> None:
    settings = config(source, tmp_path / "killed")
    script = (
        "import os, signal, sys, torch\n"
        "from opensora_dist.codecs.registry import build_codec, build_text_encoder\n"
        "from opensora_dist.config.prepare import PrepareConfig\n"
        "from opensora_dist.prepare import pipeline, run\n"
        "run._BATCH_CLIPS = 2\n"
        "config = PrepareConfig.model_validate_json(sys.argv[1])\n"
        "cpu = torch.device('cpu')\n"
        "kill = lambda progress: progress.done == 11 and os.kill(os.getpid(), signal.SIGKILL)\n"
        "codec, text = build_codec(config.codec, device=cpu), build_text_encoder(config.text, device=cpu)\n"
        "pipeline.prepare(config, codec=codec, text=text, on_progress=kill)\n"
    )
    done = subprocess.run([sys.executable, "-c", script, settings.model_dump_json()], timeout=120, capture_output=True)
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()
    assert not list((tmp_path / "killed").glob("*.tar"))
    seen: list[PrepareProgress] = []
    run(settings, on_progress=seen.append)
    assert seen[0].samples >= 3  # went on, did not start again
    run(config(source, tmp_path / "straight"))
    assert contents(tmp_path / "killed") == contents(tmp_path / "straight")


def test_a_shard_without_its_record_is_written_again(
    source: Path, straight: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(folder: Path, finished: resume.Finished) -> None:
        raise Stop

    with monkeypatch.context() as patch:
        patch.setattr(output, "write_finished", killed)
        with pytest.raises(Stop):
            run(config(source, tmp_path), codec=BatchCodec())
    assert len(list(tmp_path.glob("*.tar"))) == 1
    run(config(source, tmp_path), codec=BatchCodec())
    assert contents(tmp_path) == contents(straight)


@pytest.mark.parametrize("damage", ["gone", "cut"])
def test_a_finished_shard_that_was_lost_is_written_again(source: Path, straight: Path, tmp_path: Path, damage: str) -> None:
    run(config(source, tmp_path), codec=BatchCodec())
    (shard,) = tmp_path.glob("4x16x16-000000-*.tar")
    if damage == "gone":
        shard.unlink()
    else:
        shard.write_bytes(shard.read_bytes()[:-512])
    run(config(source, tmp_path), codec=BatchCodec())
    assert contents(tmp_path) == contents(straight)


def test_a_finished_preparation_run_again_encodes_nothing(source: Path, straight: Path, tmp_path: Path) -> None:
    class Untouched(BatchCodec):
        def encode(self, frames: torch.Tensor, *, generators: Sequence[torch.Generator] | None = None) -> torch.Tensor:
            raise AssertionError("encoded again")

    first = run(config(source, tmp_path), codec=BatchCodec())
    second = run(config(source, tmp_path, workers=2), codec=Untouched())
    assert contents(tmp_path) == contents(straight)
    assert (second.samples, second.buckets, second.dropped) == (first.samples, first.buckets, first.dropped)


# Refusals


def test_a_data_set_of_other_origin_is_not_overwritten(source: Path, tmp_path: Path) -> None:
    (tmp_path / "index.parquet").write_bytes(b"precious")
    with pytest.raises(DataError, match="already holds a data set that was not prepared here"):
        run(config(source, tmp_path))
    assert (tmp_path / "index.parquet").read_bytes() == b"precious"


def test_two_preparations_at_once_into_one_folder_are_refused(source: Path, tmp_path: Path) -> None:
    with resume.exclusive(tmp_path):
        with pytest.raises(DataError, match="another process"):
            run(config(source, tmp_path))


def test_no_sample_at_all_fails_and_says_why_for_each(tmp_path: Path) -> None:
    video(tmp_path / "in" / "short.mp4", frames=3)
    (tmp_path / "in" / "empty.mp4").write_bytes(b"")
    (tmp_path / "in" / "empty.txt").write_text("x")
    settings = config(tmp_path / "in", tmp_path / "out").model_copy(update={"clip": ClipConfig(buckets=((4, 16, 16),))})
    with pytest.raises(DataError, match=r"none of 2 videos.*\n.*empty\.mp4: .*0 bytes.*\n.*short\.mp4: has 3 frames .* needs 4"):
        run(settings)
    assert not (tmp_path / "out" / "index.parquet").exists()
    assert len(json.loads((tmp_path / "out" / "report.json").read_text())["dropped"]) == 2


def test_only_unstorable_clips_leave_no_shard(tmp_path: Path) -> None:
    video(tmp_path / "in" / "white.mp4", level=255)
    with pytest.raises(DataError, match=r"white\.mp4: its latents hold NaN"):
        run(config(tmp_path / "in", tmp_path / "out"), codec=BatchCodec(white=float("nan")))
    assert not list((tmp_path / "out").rglob("*.tar*"))


def test_every_problem_of_the_config_is_reported_at_once() -> None:
    settings = PrepareConfig(clip=ClipConfig(buckets=((4, 15, 16), (4, 16, 17))), codec=CODEC, text=TEXT)
    with pytest.raises(ConfigError) as error:
        run(settings)
    assert len(error.value.problems) == 4
    assert {problem.split(" ")[0] for problem in error.value.problems} == {"input.path", "output.path", "clip.buckets:"}


def test_a_full_disk_is_named_and_leaves_no_half_shard(
    source: Path, straight: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = shards.ShardWriter.add
    added = 0

    def full(self: shards.ShardWriter, sample: shards.Sample) -> object:
        nonlocal added
        added += 1
        if added > 5:
            raise OSError(errno.ENOSPC, "No space left on device")
        return whole(self, sample)

    with monkeypatch.context() as patch:
        patch.setattr(shards.ShardWriter, "add", full)
        with pytest.raises(DataError, match=r"output\.path=.*full; free some space and run the same command again"):
            run(config(source, tmp_path), codec=BatchCodec())
    assert len(list(tmp_path.glob("*.tar"))) == 2
    assert not list(tmp_path.glob(".*partial*"))
    assert not (tmp_path / "index.parquet").exists()
    run(config(source, tmp_path), codec=BatchCodec())
    assert contents(tmp_path) == contents(straight)


def test_without_opencv_the_error_says_what_to_install(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cv2", None)
    with pytest.raises(ConfigError, match=r"pip install 'opensora-dist\[prepare\]'"):
        run(config(source, tmp_path))
