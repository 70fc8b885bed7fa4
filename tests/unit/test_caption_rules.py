"""What a preparation's captions, CLIP scores and safety can't be, all said at once."""

from __future__ import annotations

import sys

import pytest

from opensora_dist.config.load import load_config
from opensora_dist.config.prepare import PrepareConfig
from opensora_dist.config.rules import prepare_problems
from opensora_dist.core.errors import ConfigError


@pytest.fixture
def problems(tmp_path):
    """The problems of a config that has its folders."""

    def said(*overrides):
        try:
            given = [f"input.path={tmp_path}", f"output.path={tmp_path}/out", *overrides]
            load_config(PrepareConfig, None, overrides=given, rules=prepare_problems)
        except ConfigError as error:
            return error.problems
        return []

    return said


def test_a_form_that_no_prompt_asks_for_is_refused_with_the_nearest(problems, tmp_path):
    model = f"caption.model={tmp_path}"
    (said,) = problems("caption.use=descriptve", model)
    assert "caption.use='descriptve' must be one of the forms in caption.prompts (descriptive, short)" in said
    assert "did you mean 'descriptive'?" in said
    (said,) = problems("caption.prompts={short: ' '}", "caption.use=short", model)
    assert "caption.prompts.short is empty" in said
    assert not problems("caption.prompts={tags: List tags.}", "caption.use=tags", model)


@pytest.mark.parametrize(
    ("override", "lacks"),
    [
        ("caption.frames=8", "caption.model is not set"),
        ("caption.prompts={descriptive: say}", "caption.model is not set"),
        ("safety.image_threshold=0.9", "safety.images=none"),
        ("shots.min_s=2", "no shots are looked for"),
        ("filter.camera=[]", "keeps nothing"),
    ],
)
def test_what_has_no_effect_or_keeps_nothing_is_refused(problems, override, lacks):
    (said,) = problems(override)
    assert said.startswith(override.split("=")[0]) and lacks in said


def test_clips_are_not_saved_among_the_sources(problems, tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "in", target_is_directory=True)
    for folder in (tmp_path / "in" / "deep" / "saved", tmp_path / "link" / "saved"):
        (said,) = problems(f"input.path={tmp_path}/in", f"clip.save={folder}")
        assert "lies in input.path" in said
    assert not problems(f"input.path={tmp_path}/in", f"clip.save={tmp_path}/saved")


def test_captions_that_nobody_writes_are_refused(problems, tmp_path):
    (said,) = problems("caption.keep_existing=false")
    assert "caption.keep_existing=false without caption.model leaves no caption" in said
    assert not problems("caption.keep_existing=false", f"caption.model={tmp_path}")


@pytest.mark.parametrize(
    "override, wants",
    [
        ("scores.also=[match]", "scores.also want match"),
        ("filter.match=0.2", "filter.match want match"),
        ("scores.also=[aesthetic, match]", "scores.also want aesthetic and match"),
    ],
)
def test_scores_of_a_clip_model_need_one(problems, override, wants):
    said = problems(override)
    assert f"scores.clip_model is not set, and {wants}; give the folder of a CLIP or SigLIP model" in said[0]


@pytest.mark.parametrize("override", ["scores.also=[aesthetic]", "filter.aesthetic=4.5", "caption.append=[motion, aesthetic]"])
def test_aesthetic_needs_a_model_and_a_head(problems, tmp_path, override):
    model, head = problems(override)
    assert model.startswith("scores.clip_model is not set") and head.startswith("scores.aesthetic_head is not set")
    (head,) = problems(override, f"scores.clip_model={tmp_path}")
    assert f"{override.split('=')[0]} want aesthetic; give the safetensors file of a head" in head
    (tmp_path / "head.safetensors").touch()
    assert not problems(override, f"scores.clip_model={tmp_path}", f"scores.aesthetic_head={tmp_path}/head.safetensors")


def test_appended_scores_that_frames_give_need_no_model(problems):
    assert not problems("caption.append=[motion, camera]")


def test_a_model_that_nothing_asks_is_refused(problems, tmp_path):
    (said,) = problems(f"scores.clip_model={tmp_path}")
    assert "scores.clip_model is set, and nothing wants a score of it" in said


def test_paths_that_lead_nowhere_are_named_before_any_video_is_read(problems, tmp_path):
    said = problems(
        f"caption.model={tmp_path}/llava",
        f"scores.clip_model={tmp_path}/clip",
        f"scores.aesthetic_head={tmp_path}/head.safetensors",
        "scores.also=[aesthetic]",
        f"safety.words={tmp_path}/words.txt",
    )
    assert sorted(problem.split("=")[0] for problem in said) == [
        "caption.model",
        "safety.words",
        "scores.aesthetic_head",
        "scores.clip_model",
    ]
    assert not problems("caption.model=llava-hf/llava-1.5-7b-hf")  # a hub name


def test_packages_that_are_not_installed_are_named_before_any_video_is_read(problems, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "nudenet", None)
    monkeypatch.setitem(sys.modules, "transformers", None)
    said = "\n".join(problems("safety.images=nudenet", f"caption.model={tmp_path}"))
    assert "opensora-dist[safety]" in said and "opensora-dist[hf]" in said
