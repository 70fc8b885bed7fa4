"""What records of a preparation follow from: files of networks, and nothing that is compared only when they are read."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from opensora_dist.config.prepare import PrepareConfig
from opensora_dist.core.types import Thw
from opensora_dist.prepare.blobs import Blobs
from opensora_dist.prepare.book import Book
from opensora_dist.prepare.fingerprint import fingerprint
from opensora_dist.prepare.sources import Source
from opensora_dist.prepare.stages import Clip, StageKeys
from opensora_dist.prepare.store import StageStore

CLIP = Clip(ordinal=0, key="a", content="c", start_s=0.0, end_s=2.0, shape=Thw(16, 64, 64), height=64, width=64)


def source(caption: str | None, *, problem: str | None = None) -> Source:
    return Source(path=Path("a.mp4"), name="a.mp4", caption=caption, num_bytes=1, mtime_ns=1, problem=problem)


def keys(**config: Any) -> dict[str, str]:
    of = StageKeys(PrepareConfig.model_validate(config))
    per_clip = {name: getattr(of, name)(CLIP) for name in ("scores", "aesthetic", "images", "caption", "latents")}
    return per_clip | {"match": of.match(CLIP, "x"), "text": of.text(CLIP, "x"), "cut": of.cut(source("x"))}


def changed(before: dict[str, str], after: dict[str, str]) -> set[str]:
    return {name for name in before if before[name] != after[name]}


def book(tmp_path: Path, **config: Any) -> Book:
    store = StageStore(tmp_path / "stages")
    return Book(PrepareConfig.model_validate(config), store=store, blobs=Blobs(tmp_path / "encoded", in_shards={}))


@pytest.mark.parametrize(
    ("section", "field", "depend"),
    [
        ("scores", "clip_model", {"aesthetic", "match"}),
        ("scores", "aesthetic_head", {"aesthetic"}),
        ("caption", "model", {"caption"}),
        ("codec", "path", {"latents"}),
        ("text", "path", {"text"}),
    ],
)
def test_weights_that_were_replaced_under_the_same_path_are_others(
    tmp_path: Path, section: str, field: str, depend: set[str]
) -> None:
    weights = tmp_path / "model" / "sub" / "a.safetensors"
    weights.parent.mkdir(parents=True)
    weights.write_bytes(b"one")
    path = weights if field == "aesthetic_head" else tmp_path / "model"
    more = {"codec": {"name": "diffusers"}, "text": {"name": "hf"}}.get(section, {})
    config = {section: more | {field: str(path)}}
    before = keys(**config)
    assert keys(**config) == before
    os.utime(weights, ns=(1, 1))
    assert changed(before, keys(**config)) == depend


def test_a_networks_files_count_and_not_where_they_lie(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "model.safetensors").write_bytes(b"one")
    known = fingerprint(str(tmp_path / "a"))
    (tmp_path / "a" / ".lock").touch()
    (tmp_path / "a").rename(tmp_path / "b")
    assert fingerprint(str(tmp_path / "b")) == known
    (tmp_path / "b" / "more.safetensors").touch()
    assert fingerprint(str(tmp_path / "b")) != known
    assert fingerprint("someone/a-model") == "someone/a-model" and fingerprint(None) is None


def test_a_seed_matters_to_codecs_that_draw_alone() -> None:
    assert not changed(keys(seed=0), keys(seed=1))
    codec = {"name": "diffusers", "path": "someone/a-vae"}
    assert changed(keys(codec=codec, seed=0), keys(codec=codec, seed=1)) == {"latents"}


def test_another_threshold_or_class_of_the_image_filter_asks_no_detector(tmp_path: Path) -> None:
    def verdict(**safety: Any) -> str | None:
        one = book(tmp_path, safety={"images": "nudenet", **safety})
        if one.store.get("images", one.keys.images(CLIP)) is None:
            assert one.verdict(source("x"), CLIP).waits_for == "images"
            one.store.put("images", one.keys.images(CLIP), {"ANUS_EXPOSED": 0.6, "FACE_MALE": 0.9})
            return None
        said = one.verdict(source("x"), CLIP)
        return said.reason if said.stage == "safety" else ""

    assert verdict() is None
    assert verdict() == "safety.images=nudenet, ANUS_EXPOSED: confidence 0.60"
    assert verdict(image_threshold=0.7) == ""
    assert verdict(image_threshold=0.7, image_classes=("FACE_MALE",)) == "safety.images=nudenet, FACE_MALE: confidence 0.90"
    assert verdict(image_frames=3) is None


@pytest.mark.parametrize(
    ("caption", "refused"),
    [
        ("A couple on a sofa. #nsfw", True),  # which cleaning takes off
        ("A couple on a sofa. A naked man stands behind", True),  # a last sentence that ends nowhere
        ("A na<b>ked man", False),
        ("A na\u200bked man.", True),
        ("A couple on a sofa.", False),
    ],
)
@pytest.mark.parametrize("enabled", [True, False])
def test_captions_are_refused_for_what_was_written_whatever_cleaning_leaves(
    tmp_path: Path, caption: str, refused: bool, enabled: bool
) -> None:
    (tmp_path / "words.txt").write_text("nsfw\nnaked\n")
    one = book(tmp_path, safety={"words": str(tmp_path / "words.txt")}, clean={"enabled": enabled})
    assert (one.verdict(source(caption), CLIP).stage == "safety") == refused


def test_words_that_only_cleaning_brings_together_are_refused_too(tmp_path: Path) -> None:
    (tmp_path / "words.txt").write_text("blood bath\n")
    for enabled in (True, False):
        one = book(tmp_path, safety={"words": str(tmp_path / "words.txt")}, clean={"enabled": enabled})
        assert (one.verdict(source("A blood https://example.org/x bath."), CLIP).stage == "safety") == enabled


def test_an_empty_caption_is_none_where_a_model_writes_them(tmp_path: Path) -> None:
    assert book(tmp_path, caption={"model": "a-model"}).verdict(source(""), CLIP).waits_for == "caption"
    assert book(tmp_path, caption={"model": "a-model"}).written(source("said"), CLIP) == "said"
    assert book(tmp_path).written(source(""), CLIP) == ""


def test_a_source_with_a_problem_is_not_looked_at(tmp_path: Path) -> None:
    one = book(tmp_path, caption={"model": "a-model"})
    assert one.source_problem(source(None, problem="damaged")) == "damaged"
    assert one.source_problem(source(None)) is None
