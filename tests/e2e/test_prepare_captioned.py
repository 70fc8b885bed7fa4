"""Toy clips to shards whose captions a vision-language model wrote: cleaned, held to a word list, with scores behind them.

The models are tiny and random: the way is real, what they say is not.
"""

from __future__ import annotations

import json
import signal

import pytest
import torch
import yaml
from cli_process import running
from safetensors.torch import save_file
from tiny_models import save_clip, save_llava

from opensora_dist.cli.main import main
from opensora_dist.config.load import load_config
from opensora_dist.config.prepare import PrepareConfig
from opensora_dist.core.index import read_rows
from opensora_dist.core.types import Thw
from opensora_dist.core.video import iter_frames
from opensora_dist.prepare.captions import Captioner
from opensora_dist.prepare.clean import append_scores, clean_caption
from opensora_dist.prepare.clips import cut_clips

CPU = torch.device("cpu")
CLIPS = 12  # more than the eight videos that are worked on as one lot
SHORT = "Describe this video in one short sentence ."


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("toy")
    assert main(["data", "toy", str(folder), "--clips", str(CLIPS), "--sizes", "32x32", "--lengths", "8"]) == 0
    return folder


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    pytest.importorskip("cv2")
    folder = tmp_path_factory.mktemp("models")
    save_llava(folder / "llava")
    save_clip(folder / "clip")
    save_file({"layers.0.weight": torch.ones(1, 8), "layers.0.bias": torch.full((1,), 5.0)}, folder / "head.safetensors")
    (folder / "words.txt").write_text("nothing like it\n")
    return folder


@pytest.fixture
def recipe(videos, models, tmp_path):
    """Writes a config; returns its path."""

    def write(**caption):
        config = {
            "input": {"path": str(videos)},
            "output": {"shard_samples": 2},
            "clip": {"buckets": [[8, 32, 32]]},
            "scores": {
                "also": ["motion", "camera", "aesthetic", "match"],
                "clip_model": str(models / "clip"),
                "aesthetic_head": str(models / "head.safetensors"),
                "frames": 4,
            },
            "caption": {
                "model": str(models / "llava"),
                "keep_existing": False,
                "prompts": {"short": SHORT, "descriptive": "Describe this video in detail : light , camera ."},
                "use": "short",
                "frames": 2,
                "max_new_tokens": 12,
                "append": ["aesthetic", "motion", "camera"],
                **caption,
            },
            "clean": {"enabled": True, "min_words": 1},
            "safety": {"words": str(models / "words.txt")},
            "device": "cpu",
        }
        path = tmp_path / f"{len(list(tmp_path.glob('*.yaml')))}.yaml"
        path.write_text(yaml.safe_dump(config))
        return path

    return write


def prepare(config, out, *overrides):
    """In this process; returns the report."""
    assert main(["data", "prepare", str(config), f"output.path={out}", *overrides]) == 0
    return json.loads((out / "report.json").read_text())


def calls(report):
    return {stage: int(said["calls"]) for stage, said in report["stages"].items() if said["calls"]}


def captions(out):
    return {row["source"]: row["caption"] for row in (vars(row) for row in read_rows(out))}


def bytes_of(out):
    return {
        path.name: path.read_bytes() for path in out.iterdir() if path.suffix in (".tar", ".json") and path.name != "report.json"
    }


def recorded(out, stage):
    """Whether a stage has put a record into the store."""
    return any(f'"{stage}"' in path.read_text(errors="replace") for path in out.glob(".prepare/stages/*.jsonl"))


def test_a_model_writes_the_captions_that_shards_hold_with_scores_behind_them(recipe, videos, tmp_path):
    path, out = recipe(), tmp_path / "shards"
    report = prepare(path, out)
    assert report["samples"] == CLIPS and calls(report)["caption"] == CLIPS
    config = load_config(PrepareConfig, path)
    frames = {
        source: next(
            cut_clips(iter_frames(videos / source), fps=config.clip.fps, buckets=[Thw(8, 32, 32)], every=False)
        ).frames_THW3
        for source in captions(out)
    }
    said = Captioner(config.caption, device=CPU).caption(list(frames.values()))
    scored = {row["path"]: row for row in _clips(out)}
    assert captions(out) == {
        source: append_scores(
            clean_caption(forms["short"], config.clean),
            {"aesthetic": row["aes"], "motion": row["flow"], "camera": row["cmotion"]},
            config.caption.append,
        )
        for (source, forms), row in ((pair, scored[pair[0]]) for pair in zip(frames, said))
    }
    for caption in captions(out).values():
        assert " aesthetic score: " in caption and ", motion score: " in caption and ", camera motion: " in caption
    assert len({caption.partition(" aesthetic")[0] for caption in captions(out).values()}) > 1
    assert all(-1 <= row["match"] <= 1 for row in scored.values())


def test_killed_before_and_in_the_middle_it_goes_on_to_the_same_shards(recipe, tmp_path):
    path = recipe()
    straight = tmp_path / "straight"
    prepare(path, straight)
    out = tmp_path / "killed"
    codes = []
    for stage in ("scores", "caption"):
        with running("data", "prepare", path, f"output.path={out}") as command:
            command.wait_for(lambda stage=stage: recorded(out, stage))
            command.process.kill()
            codes.append(command.end().code)
    assert codes[0] == -signal.SIGKILL
    again = calls(prepare(path, out))
    # What the first lot of eight was found to be, from frames and by CLIP, and what was said of it, was recorded before the kill.
    assert again.get("score", 0) <= 2 * (CLIPS - 8) and again.get("caption", 0) <= CLIPS - 8
    assert bytes_of(out) == bytes_of(straight) and bytes_of(out)
    assert captions(out) == captions(straight)


def test_another_prompt_reruns_captions_and_what_follows_from_them(recipe, tmp_path):
    out = tmp_path / "shards"
    before = calls(prepare(recipe(), out))
    first = captions(out)
    other = recipe(prompts={"short": "Describe this video , subjects , actions .", "descriptive": "x"})
    again = calls(prepare(other, out))
    assert captions(out) != first
    # Frames are read again; scores, aesthetic and latents are not made again.
    assert "score" not in again and again["caption"] == CLIPS and again["match"] == before["match"]
    assert "encode" not in again and again["text"] == CLIPS
    assert calls(prepare(other, out)) == {}


def test_another_form_and_other_scores_behind_it_ask_no_model(recipe, tmp_path):
    out = tmp_path / "shards"
    prepare(recipe(), out)
    first = captions(out)
    again = calls(prepare(recipe(use="descriptive", append=["motion"]), out))
    assert "caption" not in again and "score" not in again and "encode" not in again and again["text"] == CLIPS
    assert captions(out) != first and all("aesthetic" not in caption for caption in captions(out).values())


def test_what_is_said_about_a_clip_already_is_kept_unless_told_otherwise(recipe, videos, tmp_path):
    import pyarrow.parquet as pq

    written = {row["path"]: row["text"] for row in pq.read_table(videos / "metadata.parquet").to_pylist()}
    out = tmp_path / "shards"
    report = prepare(recipe(keep_existing=True, append=[]), out)
    assert "caption" not in calls(report) and captions(out) == written


def test_clips_without_captions_get_one_and_words_of_the_list_drop_them_by_count(recipe, videos, models, tmp_path):
    silent, out = tmp_path / "silent", tmp_path / "shards"
    silent.mkdir()
    for video in sorted((videos / "clips").iterdir()):
        (silent / video.name).write_bytes(video.read_bytes())
    path = recipe(keep_existing=True)
    assert prepare(path, out, f"input.path={silent}")["samples"] == CLIPS
    words = tmp_path / "words.txt"
    said = captions(out)
    common = next(word for word in next(iter(said.values())).split() if word.isalpha())
    words.write_text(f"# refused\n{common}\n")
    kept = {
        source: caption
        for source, caption in said.items()
        if common.lower() not in caption.partition(" aesthetic")[0].lower().split()
    }
    code = main(["data", "prepare", str(path), f"output.path={out}", f"input.path={silent}", f"safety.words={words}"])
    report = json.loads((out / "report.json").read_text())
    assert code == (0 if kept else 1)
    assert report["reasons"]["safety"] == {"safety.words": CLIPS - len(kept)}
    assert "caption" not in calls(report)
    assert all(drop["reason"] == "safety.words: its caption holds what line 2 lists" for drop in report["dropped"])


def _clips(out):
    import pyarrow.parquet as pq

    return pq.read_table(out / "clips.parquet").to_pylist()
