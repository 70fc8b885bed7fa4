"""What is said of a real preparation of tiny videos: what it holds, what was left out and why, what a training makes of it."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
from dataset_factory import write_dataset
from PIL import Image

from opensora_dist.cli.main import main
from opensora_dist.core.errors import ConfigError, DataError
from opensora_dist.core.video import write_video
from opensora_dist.observe.data_stats import DataStats, Distribution
from opensora_dist.recipes.data_stats import data_stats, in_words, write_page

TRAIN = """
model: {name: stdit, depth: 1, width: 16, heads: 2, patch: [1, 2, 2]}
data: {global_batch: 4}
"""


def video(path: Path, *, frames: int = 4, level: int = 100, size: tuple[int, int] = (16, 16)) -> None:
    ramp = np.linspace(0, 40, size[1]).astype(np.uint8)[None, None, :, None]
    write_video(path, np.zeros((frames, *size, 3), np.uint8) + ramp + np.uint8(level), fps=8)
    path.with_suffix(".txt").write_text(f"a clip called {path.stem}", encoding="utf-8")


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Nine clips of four frames, one image; left out: two dark ones, one without caption, one that is no video."""
    folder = tmp_path_factory.mktemp("stats")
    (folder / "videos").mkdir()
    for i in range(9):
        video(folder / "videos" / f"clip{i}.mp4", level=60 + 10 * i)
    for i in range(2):
        video(folder / "videos" / f"dark{i}.mp4", level=i)
    video(folder / "videos" / "mute.mp4")
    (folder / "videos" / "mute.txt").unlink()
    (folder / "videos" / "noise.mp4").write_bytes(np.random.default_rng(0).bytes(4000))
    (folder / "videos" / "noise.txt").write_text("noise")
    Image.fromarray(np.full((20, 20, 3), 130, np.uint8)).save(folder / "videos" / "still.png")
    (folder / "videos" / "still.txt").write_text("")
    code = main(
        [
            *("data", "prepare", f"input.path={folder / 'videos'}", f"output.path={folder / 'set'}", "clip.fps=8"),
            *("clip.buckets=[[4,16,16],[1,16,16]]", "codec.channels=4", "text.width=8", "text.max_tokens=6"),
            *("filter.brightness=[50,null]", "output.shard_samples=4"),
        ]
    )
    assert code == 0
    return folder / "set"


@pytest.fixture
def train(tmp_path: Path) -> Path:
    (tmp_path / "train.yaml").write_text(TRAIN)
    return tmp_path / "train.yaml"


def stats_of(path: Path, **options: object) -> DataStats:
    return data_stats(str(path), **options)[0]  # type: ignore[arg-type]


def test_samples_buckets_tokens_and_captions_are_counted(prepared: Path) -> None:
    stats = stats_of(prepared)
    assert (stats.samples, stats.looked_at, stats.empty_captions) == (10, 14, 1)
    assert [(b.bucket, b.samples, b.seconds, b.latent) for b in stats.buckets] == [
        ("4x16x16", 9, 0.5, "4x2x2"),
        ("1x16x16", 1, 0.0, "1x2x2"),
    ]
    assert stats.duration_s == 4.5 and stats.training is None
    words = next(d for d in stats.distributions if d.name == "Caption length")
    assert (words.lowest, words.median, words.highest, sum(words.kept)) == (0, 4, 4, 10)


def test_every_drop_is_counted_by_stage_and_reason_with_examples(prepared: Path) -> None:
    drops = {drop.examples: drop for drop in stats_of(prepared).drops}
    assert set(drops) == {("dark0.mp4", "dark1.mp4"), ("mute.mp4",), ("noise.mp4",)}
    dark = drops["dark0.mp4", "dark1.mp4"]
    assert (dark.stage, dark.count) == ("filter", 2) and "filter.brightness" in dark.reason
    assert "no caption" in drops["mute.mp4",].reason and "can't be decoded" in drops["noise.mp4",].reason


def test_scores_show_what_was_kept_and_what_was_not(prepared: Path) -> None:
    brightness, height = stats_of(prepared).scores
    assert (height.name, height.lowest, height.highest) == ("Height of the video", 16, 20)
    assert (brightness.name, sum(brightness.kept), sum(brightness.dropped)) == ("Brightness", 10, 2)
    assert all(d == 0 for d, edge in zip(brightness.dropped, brightness.edges[1:], strict=True) if edge > 60)


def test_a_training_config_says_what_each_bucket_yields(prepared: Path, train: Path) -> None:
    training = stats_of(prepared, config=train).training
    assert training is not None and training.problem is None
    yields = {b.bucket: (b.samples, b.used, b.steps, b.reason) for b in training.buckets}
    assert yields["4x16x16"] == (9, 8, 2, "tail of each epoch")
    assert yields["1x16x16"] == (1, 0, 0, "fewer than a global batch of 4")
    assert training.steps_per_epoch == 2 and sum(training.left_out.values()) == 2


def test_a_bucket_without_a_batch_is_loud(prepared: Path, train: Path) -> None:
    words = "\n".join(in_words(stats_of(prepared, config=train)))
    assert "1x16x16: NO BATCH: 0 of 1 samples used per epoch" in words
    assert "4x16x16: 8 of 9 samples used per epoch, in 2 steps (tail of each epoch)" in words
    assert "EMPTY CAPTION" in words


def test_a_config_that_drops_everything_is_an_error_with_each_buckets_reason(
    prepared: Path, train: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["data", "stats", str(prepared), "--config", str(train), "--set", "data.global_batch=64"]) == 1
    out = capsys.readouterr()
    assert "data.global_batch=64 is more than any bucket" in out.err and "4x16x16: 9" in out.err and "1x16x16: 1" in out.err
    assert "4x16x16: NO BATCH" in out.out and "1x16x16: NO BATCH" in out.out


def test_a_model_whose_patch_does_not_divide_the_latents_is_said(prepared: Path, train: Path) -> None:
    training = stats_of(
        prepared, config=train, overrides=["model.patch=[3,2,2]", "data.batching=tokens", "data.unit_tokens=64"]
    ).training
    assert training is not None and training.problem is not None and "model.patch" in training.problem


def test_packs_tell_how_much_of_the_budget_they_use_and_how_alike_they_cost(tmp_path: Path, train: Path) -> None:
    write_dataset(tmp_path / "set", samples={(4, 32, 32): 40, (1, 32, 32): 60, (8, 32, 64): 12})
    overrides = ["data.batching=packed", "data.unit_tokens=128", "data.global_batch=4"]
    training = stats_of(tmp_path / "set", config=train, overrides=overrides).training
    assert training is not None and training.efficiency is not None and training.imbalance is not None
    assert 0.5 < training.efficiency <= 1 and training.imbalance >= 0
    assert "packs of at most 128 tokens" in training.batch
    assert any(
        "% of the budget of tokens" in line for line in in_words(stats_of(tmp_path / "set", config=train, overrides=overrides))
    )


def test_token_batches_tell_how_much_of_the_budget_they_use(tmp_path: Path, train: Path) -> None:
    write_dataset(tmp_path / "set", samples={(4, 32, 32): 40})
    overrides = ["data.batching=tokens", "data.unit_tokens=56", "data.global_batch=2"]  # 16 tokens a sample: three of them
    training = stats_of(tmp_path / "set", config=train, overrides=overrides).training
    assert training is not None and training.efficiency == pytest.approx(48 / 56)


def test_data_without_a_record_of_its_preparation_has_stats_too(tmp_path: Path) -> None:
    write_dataset(tmp_path / "set", samples={(4, 32, 32): 5})
    stats = stats_of(tmp_path / "set")
    assert stats.looked_at is None and not stats.drops and not stats.scores


def test_the_configs_own_data_is_meant_where_no_path_is_given(prepared: Path, train: Path) -> None:
    stats, _ = data_stats(None, config=train, overrides=[f"data.path={prepared}"])
    assert stats.samples == 10
    with pytest.raises(ConfigError, match=r"neither PATH nor a --config"):
        data_stats(None)


def test_a_mixture_is_one_set_with_the_records_of_all(prepared: Path, tmp_path: Path, train: Path) -> None:
    write_dataset(tmp_path / "set", samples={(4, 16, 16): 5})
    overrides = [f"data.mixture=[{{path: {prepared}, name: a}}, {{path: {prepared}, name: b}}]"]
    stats, _ = data_stats(None, config=train, overrides=overrides)
    assert (stats.samples, stats.looked_at) == (20, 28)


def test_where_everything_was_left_out_it_says_why_and_shows_scores_to_choose_thresholds_from(
    prepared: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    videos, out = prepared.parent / "videos", tmp_path / "set"
    options = ["clip.buckets=[[4,16,16]]", "codec.channels=4", "filter.brightness=[250,null]"]
    assert main(["data", "prepare", f"input.path={videos}", f"output.path={out}", *options]) == 1
    stats, index = data_stats(str(out))
    assert index is None and (stats.samples, stats.looked_at) == (0, 14)
    assert next(drop.count for drop in stats.drops if "filter.brightness" in drop.reason) == 11
    assert sum(next(d for d in stats.scores if d.name == "Brightness").dropped) == 11
    assert main(["data", "stats", str(out), "--html", str(tmp_path / "page.html")]) == 1
    told = capsys.readouterr()
    assert "NO SAMPLE" in told.out and "has no sample" in told.err
    assert "Every clip was left out" in (tmp_path / "page.html").read_text()


def test_no_data_set_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DataError):
        stats_of(tmp_path)


def test_the_command_prints_json_that_holds_everything(prepared: Path, train: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["data", "stats", str(prepared), "--config", str(train), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["samples"] == 10 and told["training"]["steps_per_epoch"] == 2 and len(told["drops"]) == 3


def test_the_page_has_pictures_of_samples_and_of_what_was_left_out(prepared: Path, train: Path, tmp_path: Path) -> None:
    stats, index = data_stats(str(prepared), config=train)
    page = write_page(tmp_path / "page.html", stats, index).read_text()
    assert page.count("data:image/jpeg;base64,") == 10 + 2 + 1  # all samples; the dark and the mute one; noise can't be decoded
    assert "a clip called clip3" in page and "filter.brightness" in page
    assert not re.search(r'(src|href)="(?!data:)', page)


def test_bins_hold_every_value_and_whole_numbers_get_whole_bins() -> None:
    rng = np.random.default_rng(0)
    for kept, dropped in (
        (rng.normal(size=500), rng.normal(size=30)),
        (rng.integers(0, 9, 99), []),
        ([5.0], []),
        ([0.25, 0.25], []),
    ):
        d = Distribution.of("x", kept, dropped)
        assert sum(d.kept) == len(kept) and sum(d.dropped) == len(dropped) and len(d.edges) == len(d.kept) + 1
    assert Distribution.of("x", [1, 2, 2, 4]).kept == (1, 2, 0, 1)
    assert sum(Distribution.of("x", np.arange(1000)).kept) == 1000
