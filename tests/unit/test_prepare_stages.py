"""What a changed config, a second process or a killed one reruns, and what comes out then."""

from __future__ import annotations

import csv
import os
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from opensora_dist.codecs.registry import build_codec, build_text_encoder
from opensora_dist.config.prepare import PrepareConfig
from opensora_dist.core.errors import ConfigError, DataError
from opensora_dist.core.index import read_header, read_rows
from opensora_dist.core.types import Thw
from opensora_dist.core.video import Frames, read_video, write_video
from opensora_dist.prepare import captions, clean, output, resume, stages
from opensora_dist.prepare.pipeline import prepare, prepare_part
from opensora_dist.prepare.report import PrepareReport
from opensora_dist.prepare.sources import Source
from opensora_dist.recipes.prepare import build_networks

CPU = torch.device("cpu")


def moving(path: Path, *, frames: int = 8, level: int = 100, step: int = 1, seed: int = 0) -> None:
    """A textured video that moves ``step`` pixels a frame to the right."""
    path.parent.mkdir(parents=True, exist_ok=True)
    texture = np.random.default_rng(seed).integers(0, 60, (8, 8, 1), dtype=np.uint8).repeat(8, 0).repeat(8, 1)
    clip = np.stack([np.roll(texture, step * i, axis=1) for i in range(frames)]).repeat(3, -1) + np.uint8(level)
    write_video(path, clip, fps=8)
    path.with_suffix(".txt").write_text(f"a clip, {path.stem}")


def settings(source: Path, out: Path, **sections: Any) -> PrepareConfig:
    """Four frames of 16x16, three samples a shard, and what a test changes."""
    plain: dict[str, Any] = {
        "input": {"path": str(source)},
        "output": {"path": str(out), "shard_samples": 3},
        "clip": {"fps": 8, "buckets": ((4, 16, 16),)},
        "codec": {"name": "dct", "channels": 4},
        "text": {"name": "hash", "width": 8, "max_tokens": 12},
        "device": "cpu",
    }
    for name, value in sections.items():
        plain[name] = plain[name] | value if isinstance(value, dict) and name in plain else value
    return PrepareConfig.model_validate(plain)


def run(config: PrepareConfig) -> PrepareReport:
    codec, text, device = build_networks(config)
    return prepare(config, codec=codec, text=text, device=device)


def calls(report: PrepareReport) -> dict[str, int]:
    return {stage: int(said["calls"]) for stage, said in report.stages.items() if said["calls"]}


def contents(out: Path) -> dict[str, bytes]:
    """Every file of a data set but its report, which tells how long it took."""
    return {p.name: p.read_bytes() for p in out.iterdir() if p.is_file() and p.name != "report.json"}


def clips_of(out: Path) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = pq.read_table(out / "clips.parquet").to_pylist()
    return rows


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ten videos from dark to bright; the last two look like the first."""
    folder = tmp_path_factory.mktemp("source")
    for i in range(8):
        moving(folder / f"{i}.mp4", level=20 * i, seed=i)
    for i in (8, 9):
        moving(folder / f"{i}.mp4", level=0, seed=0)
    return folder


# What a changed config reruns

_CAPTION, _LATENTS, _TEXT, _CUT, _SCORES, _IMAGES = {"caption"}, {"latents"}, {"text"}, {"cut"}, {"scores"}, {"images"}
_REST = {"aesthetic", "match"}
_ALL_OF_CLIPS = {"scores", "aesthetic", "match", "images", "caption", "latents"}
# Every field of the config: another value, and the stages whose keys it changes.
_KEYS_OF: dict[str, tuple[Any, set[str]]] = {
    "input.path": ("elsewhere", set()),
    "output.path": ("elsewhere", set()),
    "output.shard_samples": (3, set()),
    "output.dtype": ("float32", _LATENTS | _TEXT),
    "shots.detector": ("content", {"shots", "cut", "key"} | _LATENTS | _TEXT),  # clips of shots have other names
    "shots.threshold": (3.0, {"shots", "cut"}),
    "shots.dissolves": (True, {"shots", "cut", "key"} | _LATENTS | _TEXT),
    "shots.min_s": (2.0, _CUT),
    "shots.windows": ("all", {"cut", "key"} | _LATENTS | _TEXT),
    "shots.trim_s": (2.0, _CUT),
    "clip.fps": (4.0, _CUT | _ALL_OF_CLIPS),
    "clip.buckets": (((8, 8, 8),), _CUT),
    "clip.save": ("elsewhere", set()),
    "scores.also": (("motion",), set()),
    "scores.clip_model": ("other", _REST),
    "scores.aesthetic_head": ("other", {"aesthetic"}),
    "scores.frames": (4, _SCORES | _REST),
    **{
        f"filter.{name}": (value, set())
        for name, value in {
            "min_s": 1.0,
            "min_side": 8,
            "brightness": (1.0, None),
            "static": 0.5,
            "sharpness": 1.0,
            "motion": (1.0, None),
            "text_area": 0.5,
            "compression": 0.1,
            "camera": ("static",),
            "duplicates": 4,
            "aesthetic": 5.0,
            "match": 0.2,
        }.items()
    },
    "caption.model": ("other", _CAPTION),
    "caption.keep_existing": (False, set()),
    "caption.prompts": ({"descriptive": "Say."}, _CAPTION),
    "caption.use": ("short", set()),
    "caption.frames": (2, _CAPTION),
    "caption.batch": (2, set()),
    "caption.max_new_tokens": (7, _CAPTION),
    "caption.dtype": ("bfloat16", _CAPTION),
    "caption.append": (("motion",), set()),
    "clean.enabled": (True, set()),
    "clean.min_words": (3, set()),
    "safety.words": ("other", set()),
    "safety.images": ("nudenet", _IMAGES),
    "safety.image_classes": (("FEET_EXPOSED",), set()),
    "safety.image_threshold": (0.3, set()),
    "safety.image_frames": (3, _IMAGES),
    "codec": ({"name": "dct", "channels": 6}, _LATENTS),
    "text": ({"name": "hash", "width": 24}, _TEXT),
    "workers": (3, set()),
    "executor": ("ray", set()),
    "device": ("cpu", set()),
    "seed": (1, set()),  # the default codec draws nothing
}


def _fields() -> set[str]:
    names = set()
    for name, field in PrepareConfig.model_fields.items():
        section = getattr(field.default, "__class__", None)
        inside = getattr(section, "model_fields", None) if name not in ("codec", "text") else None
        names |= {f"{name}.{inner}" for inner in inside} if inside is not None else {name}
    return names


def _keys(config: PrepareConfig) -> dict[str, str]:
    source = Source(path=Path("a.mp4"), name="a.mp4", caption="x", num_bytes=1, mtime_ns=1)
    keys = stages.StageKeys(config)
    clip = stages.named_clip(source, config, keys, ordinal=0, start_s=0.0, shape=Thw(16, 64, 64), size=(1, 1))
    return {
        "source": keys.source(source),
        "probe": keys.probe(source),
        "shots": keys.shots(source),
        "cut": keys.cut(source),
        "key": clip.key,
        "scores": keys.scores(clip),
        "aesthetic": keys.aesthetic(clip),
        "match": keys.match(clip, "x"),
        "images": keys.images(clip),
        "caption": keys.caption(clip),
        "latents": keys.latents(clip),
        "text": keys.text(clip, "x"),
    }


def test_every_field_of_the_config_changes_the_keys_of_the_stages_that_depend_on_it_and_no_others() -> None:
    assert _fields() == set(_KEYS_OF)  # a new field: decide which records it makes stale
    before = _keys(PrepareConfig())
    for name, (value, changed) in _KEYS_OF.items():
        section, _, inner = name.partition(".")
        config = PrepareConfig.model_validate({section: {inner: value} if inner else value})
        assert config != PrepareConfig(), name
        after = _keys(config)
        assert {stage for stage in after if after[stage] != before[stage]} == changed, name


@pytest.mark.parametrize(
    "version, changed",
    [
        ("probe", {"probe", "scores"}),
        ("shots", {"shots", "cut"}),
        ("cut", {"cut", "scores", "aesthetic", "match", "images", "caption", "latents"}),
        ("scores", {"scores"}),
        ("aesthetic", {"aesthetic"}),
        ("images", {"images"}),
        ("caption", {"caption"}),
        ("match", {"match"}),
        ("latents", {"latents"}),
        ("text", {"text"}),
    ],
)
def test_another_version_of_a_stage_changes_the_keys_of_all_that_follows_from_it(
    version: str, changed: set[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    before = _keys(PrepareConfig())
    monkeypatch.setitem(stages._VERSIONS, version, stages._VERSIONS[version] + 1)
    after = _keys(PrepareConfig())
    assert {stage for stage in after if after[stage] != before[stage]} == changed


def test_another_threshold_decodes_scores_and_encodes_only_what_no_clip_was_known_for(source: Path, tmp_path: Path) -> None:
    strict, loose = ({"filter": {"brightness": (least, None)}} for least in (80, 40))
    first = run(settings(source, tmp_path / "a", **strict))
    assert calls(first) == {"probe": 10, "cut": 10, "score": 10, "encode": first.samples, "text": first.samples}
    assert 0 < first.samples < 8
    before = contents(tmp_path / "a")

    second = run(settings(source, tmp_path / "a", **loose))
    new = second.samples - first.samples
    assert new > 0
    assert calls(second) == {"cut": new, "encode": new, "text": new}  # of clips that are kept now, and nothing else

    third = run(settings(source, tmp_path / "a", **strict))
    assert calls(third) == {}
    assert contents(tmp_path / "a") == before
    fourth = run(settings(source, tmp_path / "a", **loose))
    assert calls(fourth) == {}  # what the stricter set left out was put aside
    run(settings(source, tmp_path / "b", **loose))
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


def test_another_score_is_measured_alone_and_encodes_nothing(source: Path, tmp_path: Path) -> None:
    run(settings(source, tmp_path, scores={"also": ("brightness",)}))
    report = run(settings(source, tmp_path, scores={"also": ("brightness", "sharpness")}))
    assert calls(report) == {"cut": 10, "score": 10}
    assert all(row["brightness"] is not None and row["sharpness"] is not None for row in clips_of(tmp_path))


class CountingCaptioner:
    """Says the prompt and how bright the clip is."""

    asked = 0

    def __init__(self, config: Any, *, device: torch.device) -> None:
        self.config = config

    def caption(self, clips: Sequence[Frames]) -> list[dict[str, str]]:
        type(self).asked += len(clips)
        return [{form: f"{prompt} {clip.mean():.0f}" for form, prompt in self.config.prompts.items()} for clip in clips]


def test_other_prompts_rerun_captions_and_text_but_neither_scores_nor_latents(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(captions, "Captioner", CountingCaptioner)

    def config(prompt: str, **caption: Any) -> PrepareConfig:
        said = {"model": "a-model", "keep_existing": False, "prompts": {"descriptive": prompt}} | caption
        return settings(source, tmp_path, scores={"also": ("brightness",)}, caption=said)

    first = run(config("one"))
    assert calls(first) == {"probe": 10, "cut": 10, "score": 10, "caption": 10, "encode": 10, "text": 10}
    latents = {row.key: row.latents_frame_xxh3 for row in read_rows(tmp_path)}
    second = run(config("two"))
    assert calls(second) == {"cut": 10, "caption": 10, "text": 10}
    assert {row.key: row.latents_frame_xxh3 for row in read_rows(tmp_path)} == latents
    assert all(row.caption.startswith("two ") for row in read_rows(tmp_path))
    asked = CountingCaptioner.asked
    third = run(config("two", keep_existing=True))
    assert CountingCaptioner.asked == asked
    assert calls(third) == {"cut": 10, "text": 10}
    assert all(row.caption.startswith("a clip, ") for row in read_rows(tmp_path))


def test_clips_that_are_dropped_are_not_captioned(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(captions, "Captioner", CountingCaptioner)
    caption = {"model": "a-model", "keep_existing": False, "prompts": {"descriptive": "say"}}
    for _ in range(2):
        asked = CountingCaptioner.asked
        report = run(settings(source, tmp_path, filter={"brightness": (80, None)}, caption=caption))
        assert CountingCaptioner.asked - asked in (report.samples, 0)
        assert 0 < report.samples < 10
    assert CountingCaptioner.asked == asked


def test_a_video_that_breaks_off_gives_the_clips_before_the_damage(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 64, 3), dtype=np.uint8)
    write_video(tmp_path / "in" / "a.mp4", noise, fps=8)
    (tmp_path / "in" / "a.txt").write_text("noise")
    whole = run(settings(tmp_path / "in", tmp_path / "out", shots={"windows": "all"}))
    assert whole.samples == 16
    data = bytearray((tmp_path / "in" / "a.mp4").read_bytes())
    data[len(data) // 2 : -20_000] = bytes(len(data) - 20_000 - len(data) // 2)  # the table of frames, at the end, stays
    (tmp_path / "in" / "a.mp4").write_bytes(data)
    for out in ("out", "fresh"):
        report = run(settings(tmp_path / "in", tmp_path / out, shots={"windows": "all"}))
        assert 0 < report.samples < 16
    assert contents(tmp_path / "out") == contents(tmp_path / "fresh")


def test_appended_scores_and_cleaning_change_text_alone(source: Path, tmp_path: Path) -> None:
    run(settings(source, tmp_path, scores={"also": ("motion",)}))
    report = run(settings(source, tmp_path, caption={"append": ("motion",)}))
    assert calls(report) == {"cut": 10, "text": 10}
    assert all("motion score: " in row.caption for row in read_rows(tmp_path))


def test_a_caption_is_cleaned_once_a_run(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked, clean_caption = [], clean.clean_caption

    def counted(text: str, config: Any) -> str:
        asked.append(text)
        return clean_caption(text, config)

    monkeypatch.setattr(clean, "clean_caption", counted)
    run(settings(source, tmp_path, clean={"enabled": True}))
    assert len(asked) == len(set(asked)) == 10


def test_captions_that_were_cut_are_told_of_those_that_fill_the_encoder(tmp_path: Path) -> None:
    for i, words in enumerate((3, 20, 30)):
        moving(tmp_path / "in" / f"{i}.mp4", level=60 * i, seed=i)
        (tmp_path / "in" / f"{i}.txt").write_text(" ".join(f"word{k}" for k in range(words)))
    assert run(settings(tmp_path / "in", tmp_path / "out")).cut_captions == 2
    bright = settings(tmp_path / "in", tmp_path / "out", filter={"brightness": (70, None)})
    assert run(bright).cut_captions == 2  # the short one is gone


# What comes out


def test_of_clips_that_look_alike_the_first_is_kept_whatever_the_workers(source: Path, tmp_path: Path) -> None:
    for workers in (1, 2):
        report = run(settings(source, tmp_path / str(workers), filter={"duplicates": 2}, workers=workers))
        assert list(report.reasons) == ["duplicates"]
        assert {drop.source for drop in report.dropped} == {"8.mp4", "9.mp4"}
        assert all("near-duplicate: looks like 0-" in drop.reason for drop in report.dropped)
    assert contents(tmp_path / "1") == contents(tmp_path / "2")


def test_no_clip_is_a_duplicate_of_one_whose_caption_is_refused(tmp_path: Path) -> None:
    for name in "abcd":
        moving(tmp_path / "in" / f"{name}.mp4")
    (tmp_path / "in" / "a.txt").write_text("short")
    (tmp_path / "in" / "b.txt").write_text("a clip that shows what is not wanted")
    (tmp_path / "words.txt").write_text("wanted\n")
    refused = {"clean": {"min_words": 2}, "safety": {"words": str(tmp_path / "words.txt")}}
    report = run(settings(tmp_path / "in", tmp_path / "out", filter={"duplicates": 2}, **refused))
    assert report.reasons.keys() == {"duplicates", "clean", "safety"}
    assert [row.caption for row in read_rows(tmp_path / "out")] == ["a clip, c"]
    assert [drop.source for drop in report.dropped if "looks like c-" in drop.reason] == ["d.mp4"]


class SilentAtFirst(CountingCaptioner):
    """Has nothing to say about the first clip it sees."""

    def caption(self, clips: Sequence[Frames]) -> list[dict[str, str]]:
        first, answers = self.asked == 0, super().caption(clips)
        return [dict.fromkeys(answers[0], ""), *answers[1:]] if first else answers


def test_a_clip_comes_back_when_the_one_kept_in_its_stead_is_dropped(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(captions, "Captioner", SilentAtFirst)
    caption = {"model": "a-model", "keep_existing": False, "prompts": {"descriptive": "say what"}}
    config = settings(source, tmp_path, filter={"duplicates": 2}, caption=caption, clean={"min_words": 1})
    for _ in range(2):
        monkeypatch.setattr(SilentAtFirst, "asked", 0)
        report = run(config)
        drops = {drop.source: (drop.stage, drop.reason) for drop in report.dropped}
        assert drops.keys() == {"0.mp4", "9.mp4"} and drops["0.mp4"][0] == "clean"
        assert "looks like 8-" in drops["9.mp4"][1]
    assert SilentAtFirst.asked == 0  # the second run went by the records


def test_a_filter_of_time_leaves_images_alone(tmp_path: Path) -> None:
    moving(tmp_path / "in" / "short.mp4", frames=4)
    moving(tmp_path / "in" / "long.mp4", frames=8)
    Image.fromarray(np.full((16, 16, 3), 9, np.uint8)).save(tmp_path / "in" / "picture.png")
    (tmp_path / "in" / "picture.txt").write_text("a picture")
    clip = {"fps": 8, "buckets": ((1, 16, 16), (4, 16, 16), (8, 16, 16))}
    report = run(settings(tmp_path / "in", tmp_path / "out", clip=clip, filter={"min_s": 0.75}))
    assert [drop.source for drop in report.dropped] == ["short.mp4"] and report.samples == 2


def test_every_window_of_a_video_is_a_sample_known_by_where_it_is(tmp_path: Path) -> None:
    moving(tmp_path / "in" / "a.mp4", frames=23, seed=1)
    moving(tmp_path / "in" / "c.mp4", frames=9, seed=2)
    every = {"shots": {"windows": "all"}}
    report = run(settings(tmp_path / "in", tmp_path / "out", **every))
    assert report.samples == report.clips == 5 + 2
    rows = {row["key"]: row for row in clips_of(tmp_path / "out")}
    assert sorted((r["path"], r["start_s"]) for r in rows.values()) == [
        *(("a.mp4", i / 2) for i in range(5)),
        *(("c.mp4", i / 2) for i in range(2)),
    ]
    assert {row.key for row in read_rows(tmp_path / "out")} == set(rows)
    moving(tmp_path / "in" / "b.mp4", frames=4, seed=3)
    again = run(settings(tmp_path / "in", tmp_path / "out", **every, workers=2))
    assert calls(again) == {"probe": 1, "cut": 1, "encode": 1, "text": 1}
    assert set(rows) < {row.key for row in read_rows(tmp_path / "out")}


def test_a_table_tells_of_every_clip_what_is_known(source: Path, tmp_path: Path) -> None:
    also = ("brightness", "static", "sharpness", "motion", "camera", "compression", "duplicates")
    broken = tmp_path / "in"
    broken.mkdir()
    for path in source.iterdir():
        os.link(path, broken / path.name)
    (broken / "broken.mp4").write_bytes(b"no video at all")
    (broken / "broken.txt").write_text("bad")
    (broken / "silent.mp4").write_bytes((source / "0.mp4").read_bytes())
    report = run(settings(broken, tmp_path / "out", filter={"brightness": (80, None)}, scores={"also": also}))
    rows = clips_of(tmp_path / "out")
    assert len(rows) == 12
    assert sum(row["kept"] for row in rows) == report.samples
    for row in rows:
        assert row["kept"] == (row["reason"] is None)
        if row["path"] == "broken.mp4":
            assert (row["stage"], row["num_frames"]) == ("cut", 0)
        elif row["path"] == "silent.mp4":
            assert (row["stage"], row["text"]) == ("caption", None)
        else:
            assert (row["num_frames"], row["height"], row["width"], row["resolution"]) == (4, 64, 64, 4096)
            assert row["kept"] == (row["brightness"] >= 80)
            assert None not in (row["flow"], row["cmotion"], row["phash"], row["compression"], row["aspect_ratio"])
    assert set(report.reasons) == {"cut", "filter", "caption"}
    assert sum(sum(reasons.values()) for reasons in report.reasons.values()) == report.num_dropped == 12 - report.samples


def test_images_in_a_tar_are_samples_of_one_frame(tmp_path: Path) -> None:
    from PIL import Image

    folder = tmp_path / "in"
    folder.mkdir()
    with tarfile.open(folder / "images.tar", "w") as tar:
        for i in range(5):
            Image.fromarray(np.full((40, 40, 3), 40 * i, np.uint8)).save(tmp_path / f"{i}.png")
            (tmp_path / f"{i}.txt").write_text(f"grey {i}")
            tar.add(tmp_path / f"{i}.png", f"{i}.png")
            tar.add(tmp_path / f"{i}.txt", f"{i}.txt")
    clip = {"buckets": ((1, 16, 16), (4, 16, 16))}
    scores = {"also": ("brightness", "motion", "duplicates")}
    report = run(settings(folder, tmp_path / "out", clip=clip, scores=scores, workers=2))
    assert report.buckets == {"1x16x16": 5, "4x16x16": 0}
    assert [row["flow"] for row in clips_of(tmp_path / "out")] == [None] * 5


def test_kept_clips_are_saved_as_video_and_a_lost_one_is_written_again(source: Path, tmp_path: Path) -> None:
    config = settings(source, tmp_path / "out", clip={"save": str(tmp_path / "clips")}, filter={"brightness": (80, None)})
    report = run(config)
    saved = sorted((tmp_path / "clips").glob("*.mp4"))
    assert len(saved) == report.samples
    assert read_video(saved[0])[0].shape == (4, 16, 16, 3)
    with open(tmp_path / "clips" / "metadata.csv", newline="") as handle:
        table = list(csv.DictReader(handle))
    assert {row["path"] for row in table} == {path.name for path in saved}
    assert all(row["text"].startswith("a clip, ") for row in table)
    was = saved[1].read_bytes()
    saved[1].unlink()
    again = run(config)
    assert saved[1].read_bytes() == was
    assert calls(again) == {"cut": 1, "save": 1}


def test_a_saved_video_is_that_of_its_clip_whatever_lay_there_before(source: Path, tmp_path: Path) -> None:
    for size, frames in ((16, 4), (24, 2)):
        clip = {"save": str(tmp_path / "clips"), "buckets": ((frames, size, size),)}
        report = run(settings(source, tmp_path / "out", clip=clip))
        with open(tmp_path / "clips" / "metadata.csv", newline="") as handle:
            table = list(csv.DictReader(handle))
        assert len(table) == report.samples == 10
        for row in table:
            assert read_video(tmp_path / "clips" / row["path"])[0].shape == (frames, size, size, 3)


# One data set in another's place


def test_where_nothing_is_left_the_old_data_set_stays_and_the_error_says_so(source: Path, tmp_path: Path) -> None:
    config = settings(source, tmp_path, filter={"brightness": (255, None)})
    with pytest.raises(DataError, match="so there is no data set"):
        run(config)
    run(settings(source, tmp_path))
    index = (tmp_path / "index.parquet").read_bytes()
    with pytest.raises(DataError, match="still holds the data set that was there before"):
        run(config)
    assert (tmp_path / "index.parquet").read_bytes() == index
    assert not any(row["kept"] for row in clips_of(tmp_path))


def test_the_old_data_set_is_whole_until_the_new_index_is_there(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(settings(source, tmp_path, filter={"brightness": (80, None)}))
    old = contents(tmp_path)
    write_index, seen = output.write_index, []

    def watched(folder: Path, **parts: Any) -> Path:
        seen.append({path.name for path in folder.glob("*.tar")})
        if len(seen) == 1:
            raise KeyboardInterrupt
        return write_index(folder, **parts)

    monkeypatch.setattr(output, "write_index", watched)
    for _ in range(1):
        with pytest.raises(KeyboardInterrupt):
            run(settings(source, tmp_path, filter={"brightness": (40, None)}))
    for name in ("index.parquet", "clips.parquet", *(shard.name for shard in read_header(tmp_path).shards)):
        assert (tmp_path / name).read_bytes() == old[name]  # readers of the old index lack nothing
    run(settings(source, tmp_path, filter={"brightness": (40, None)}))
    new = {shard.name for shard in read_header(tmp_path).shards}
    assert seen[1] >= new | {name for name in old if name.endswith(".tar")}  # both were there as the index changed
    assert {path.name for path in tmp_path.glob("*.tar")} == new
    assert not [p for p in (tmp_path / ".prepare" / "shards").iterdir() if p.name.removesuffix(".json") not in new]


def test_disk_holds_no_array_that_neither_shards_nor_thresholds_could_ask_for(source: Path, tmp_path: Path) -> None:
    run(settings(source, tmp_path))
    assert not list(tmp_path.rglob("*.safetensors"))
    report = run(settings(source, tmp_path, filter={"brightness": (80, None)}))
    assert len(list(tmp_path.rglob("*.safetensors"))) == 2 * (10 - report.samples)  # put aside
    run(settings(source, tmp_path, filter={"brightness": (80, None)}, codec={"channels": 6}))
    assert len(list(tmp_path.rglob("*.safetensors"))) == 10 - report.samples  # text vectors; the latents were of another codec


# Parts


def test_parts_are_numbered_from_one() -> None:
    config = PrepareConfig()
    with pytest.raises(ConfigError, match="from 1 to 4"):
        prepare_part(
            config, part=(5, 4), codec=build_codec(config.codec, device=CPU), text=build_text_encoder(config.text, device=CPU)
        )


def test_parts_share_a_folder_but_not_with_a_whole_preparation(source: Path, tmp_path: Path) -> None:
    config = settings(source, tmp_path)
    codec, text, _ = build_networks(config)
    with resume.shared(tmp_path, (1, 2)):
        assert prepare_part(config, part=(2, 2), codec=codec, text=text).sources > 0
        with pytest.raises(DataError, match="another process"):
            prepare_part(config, part=(1, 2), codec=codec, text=text)
        with pytest.raises(DataError, match="another process"):
            run(config)
    with resume.exclusive(tmp_path), pytest.raises(DataError, match="another process"):
        prepare_part(config, part=(1, 2), codec=codec, text=text)


def test_duplicates_across_parts_take_a_second_round(source: Path, tmp_path: Path) -> None:
    config = settings(source, tmp_path / "parts", filter={"duplicates": 2})
    codec, text, _ = build_networks(config)
    parts = [(1, 2), (2, 2)]
    assert [prepare_part(config, part=part, codec=codec, text=text).waits for part in parts] == [True, False]
    assert [prepare_part(config, part=part, codec=codec, text=text).waits for part in parts] == [False, False]
    report = run(config)
    assert calls(report) == {}
    run(settings(source, tmp_path / "straight", filter={"duplicates": 2}))
    assert contents(tmp_path / "parts") == contents(tmp_path / "straight")


_PART = """
import os, signal, sys
import opensora_dist.prepare.run as run
from opensora_dist.config.prepare import PrepareConfig
from opensora_dist.prepare.pipeline import prepare_part
from opensora_dist.recipes.prepare import build_networks
run._LOT_SOURCES["video"] = 2
config = PrepareConfig.model_validate_json(sys.argv[1])
codec, text, device = build_networks(config)
kill = lambda progress: progress.done == int(sys.argv[3]) and os.kill(os.getpid(), signal.SIGKILL)
prepare_part(config, part=(int(sys.argv[2]), 4), codec=codec, text=text, device=device, on_progress=kill)
"""


def test_four_parts_at_once_one_of_them_killed_make_the_shards_of_one_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from opensora_dist.prepare import run as run_module

    monkeypatch.setitem(run_module._LOT_SOURCES, "video", 2)
    for i in range(16):
        moving(tmp_path / "in" / f"{i:02d}.mp4", frames=9, level=10 * i, seed=i)
    config = settings(tmp_path / "in", tmp_path / "parts", shots={"windows": "all"})
    command = [sys.executable, "-c", _PART, config.model_dump_json()]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    jobs = [subprocess.Popen([*command, str(k), "3" if k == 2 else "-1"], env=env) for k in (1, 2, 3, 4)]
    deadline = time.monotonic() + 120
    assert [job.wait(max(0.0, deadline - time.monotonic())) for job in jobs] == [0, -signal.SIGKILL, 0, 0]
    assert not (tmp_path / "parts" / "index.parquet").exists()
    report = run(config)
    assert 0 < calls(report)["encode"] <= 4  # what the killed one had in hand, and had not begun
    run(settings(tmp_path / "in", tmp_path / "straight", shots={"windows": "all"}))
    assert contents(tmp_path / "parts") == contents(tmp_path / "straight")


@pytest.mark.slow
def test_ray_makes_the_shards_of_one_process(source: Path, tmp_path: Path) -> None:
    script = (
        "import sys\n"
        "from opensora_dist.config.prepare import PrepareConfig\n"
        "from opensora_dist.prepare.pipeline import prepare\n"
        "from opensora_dist.recipes.prepare import build_networks\n"
        "config = PrepareConfig.model_validate_json(sys.argv[1])\n"
        "codec, text, device = build_networks(config)\n"
        "report = prepare(config, codec=codec, text=text, device=device, build=build_networks)\n"
        "assert not sum(said['calls'] for said in report.stages.values()), report.stages\n"  # all was done by actors
    )
    config = settings(source, tmp_path / "ray", executor="ray", workers=2, filter={"duplicates": 2})
    pytest.importorskip("ray")
    done = subprocess.run([sys.executable, "-c", script, config.model_dump_json()], timeout=240, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    run(settings(source, tmp_path / "straight", filter={"duplicates": 2}))
    assert contents(tmp_path / "ray") == contents(tmp_path / "straight")
