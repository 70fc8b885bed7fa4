"""Captions by vision-language models, on tiny random checkpoints of two families."""

from __future__ import annotations

import json
import sys

import numpy as np
import pytest
import torch
from tiny_models import LLAVA_TEMPLATE, save_llava, save_llava_next, save_llava_onevision, save_qwen2_5_vl, save_qwen2_vl

from opensora_dist.config.prepare import CaptionConfig
from opensora_dist.core.errors import ConfigError, WeightsError
from opensora_dist.prepare.captions import FALLBACK_TEMPLATES, Captioner

CPU = torch.device("cpu")
FAMILIES = {"llava": save_llava, "qwen2_vl": save_qwen2_vl}
PROMPTS = {"short": "Describe this video .", "descriptive": "Describe this video in detail : light , camera ."}


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    return {name: save(tmp_path_factory.mktemp(name)) for name, save in FAMILIES.items()}


def captioner(path, **options):
    given = {"prompts": PROMPTS, "max_new_tokens": 8, "frames": 3, "batch": 3}
    return Captioner(CaptionConfig(model=str(path), **{**given, **options}), device=CPU)


def clip(seed, *, frames=5, height=40, width=56):
    return np.random.default_rng(seed).integers(0, 256, (frames, height, width, 3), dtype=np.uint8)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_batch_says_what_each_clip_alone_would_get(checkpoints, family):
    # Unequal counts and sizes of frames, so that all but one are padded.
    clips = [clip(1), clip(2, frames=2), clip(3, frames=1, height=28, width=28)]
    together = captioner(checkpoints[family]).caption(clips)
    alone = [captioner(checkpoints[family], batch=1).caption([one])[0] for one in clips]
    assert together == alone
    assert len({answer["short"] for answer in together}) == 3
    assert all(set(answer) == set(PROMPTS) and all(answer.values()) for answer in together)


@pytest.mark.parametrize("family", FAMILIES)
def test_captions_are_the_same_every_time(checkpoints, family):
    clips = [clip(seed) for seed in range(4)]  # more than one batch
    first = captioner(checkpoints[family])
    assert first.caption(clips) == first.caption(clips) == captioner(checkpoints[family]).caption(clips)


@pytest.mark.parametrize("family", FAMILIES)
def test_sampling_that_a_checkpoint_asks_for_is_not_done(checkpoints, family, tmp_path):
    for file in checkpoints[family].iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    settings = json.loads((tmp_path / "generation_config.json").read_text())
    (tmp_path / "generation_config.json").write_text(json.dumps({**settings, "do_sample": True, "temperature": 5.0, "top_k": 40}))
    assert captioner(tmp_path).caption([clip(0)]) == captioner(checkpoints[family]).caption([clip(0)])


@pytest.mark.parametrize("family", FAMILIES)
def test_forms_are_the_prompts_of_the_config(checkpoints, family):
    one = captioner(checkpoints[family]).caption([clip(0)])[0]
    assert set(one) == {"short", "descriptive"} and one["short"] != one["descriptive"]
    assert captioner(checkpoints[family], prompts={"tags": PROMPTS["short"]}).caption([clip(0)]) == [{"tags": one["short"]}]


@pytest.mark.parametrize("family", FAMILIES)
def test_the_answer_is_no_longer_than_allowed_and_holds_none_of_the_prompt(checkpoints, family):
    long, short = (captioner(checkpoints[family], max_new_tokens=n).caption([clip(0)])[0]["short"] for n in (8, 3))
    assert len(short.split()) <= 3 and long.startswith(short)
    assert "USER" not in long and "<" not in long


@pytest.mark.parametrize("family", FAMILIES)
def test_the_model_sees_the_frames_that_the_config_says(checkpoints, family):
    """What is shown is counted in the prompt's image tokens."""
    frames, shown = clip(0, frames=8, height=28, width=28), {}
    for count in (1, 2, 4, 9):
        made = captioner(checkpoints[family], frames=count)
        shown[count] = int((_asked(made, [frames]) == made._model.config.image_token_id).sum())
    assert [shown[n] / shown[1] for n in (1, 2, 4, 9)] == [1, 2, 4, 8]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_the_model_computes_in_the_precision_of_the_config(checkpoints, family, dtype):
    made = captioner(checkpoints[family], dtype=dtype)
    assert {p.dtype for p in made._model.parameters()} == {getattr(torch, dtype)}
    assert not made._model.training and not any(p.requires_grad for p in made._model.parameters())
    assert made.caption([clip(0, frames=1)])[0]["short"]


@pytest.mark.parametrize("family", FAMILIES)
def test_without_a_chat_template_the_familys_own_form_is_used(checkpoints, family, tmp_path):
    bare = captioner(FAMILIES[family](tmp_path, template=None))
    assert bare._template == FALLBACK_TEMPLATES[family]
    assert bare.caption([clip(0)])[0]["short"]
    chat = [{"role": "user", "content": [{"type": "image"}, {"type": "image"}, {"type": "text", "text": "What?"}]}]
    image = {"llava": "<image>\n", "qwen2_vl": "<|vision_start|><|image_pad|><|vision_end|>"}[family]
    assert f"{image}{image}What?" in bare._processor.apply_chat_template(chat, chat_template=bare._template)


@pytest.mark.parametrize("opening", ["", "<s>"])
def test_a_prompt_begins_once_whether_template_or_tokenizer_says_so(tmp_path, opening):
    import tokenizers

    made = captioner(save_llava(tmp_path, template=opening + LLAVA_TEMPLATE))
    made._processor.tokenizer.backend_tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    assert [(ids == 1).sum().item() for ids in _asked(made, [clip(0), clip(1, frames=1)])] == [1, 1]


def _asked(made, clips):
    """The token ids that the model is given first, one row per clip."""
    seen = []
    generate = made._model.generate
    made._model.generate = lambda **given: seen.append(given) or generate(**given)
    made.caption(clips)
    return seen[0]["input_ids"]


def test_half_a_surrogate_pair_that_a_tokenizer_gives_becomes_a_question_mark(checkpoints, monkeypatch):
    made = captioner(checkpoints["llava"])
    monkeypatch.setattr(type(made._processor), "batch_decode", lambda *_, **__: ["a \ud83d cat "])
    assert set(made.caption([clip(0)])[0].values()) == {"a ? cat"}


def test_no_clips_give_no_captions(checkpoints):
    assert captioner(checkpoints["llava"]).caption([]) == []


@pytest.mark.parametrize("save", [save_llava_next, save_llava_onevision, save_qwen2_5_vl], ids=lambda save: save.__name__)
def test_relatives_of_both_families_take_the_same_path(save, tmp_path):
    """Batches of unequal numbers of frames; two of the three without a chat template of their own."""
    path, clips = save(tmp_path), [clip(1), clip(2, frames=2), clip(3, frames=1, height=28, width=28)]
    together = captioner(path).caption(clips)
    assert together == [captioner(path, batch=1).caption([one])[0] for one in clips]
    assert all(answer["short"] for answer in together) and len({answer["short"] for answer in together}) > 1


# --- what can't be used


def test_a_missing_folder_is_named(tmp_path):
    pytest.importorskip("transformers")
    with pytest.raises(WeightsError, match=r"caption\.model='.*absent': no such folder"):
        captioner(tmp_path / "absent")


def test_a_language_model_is_refused(tmp_path):
    transformers = pytest.importorskip("transformers")
    transformers.LlamaConfig().save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=r"holds a llama, which doesn't answer to images; use a vision-language model"):
        captioner(tmp_path)


def test_pickled_weights_are_not_read(checkpoints, tmp_path):
    from safetensors.torch import load_file

    for file in checkpoints["llava"].iterdir():
        if file.suffix != ".safetensors":
            (tmp_path / file.name).write_bytes(file.read_bytes())
    torch.save(load_file(checkpoints["llava"] / "model.safetensors"), tmp_path / "pytorch_model.bin")
    with pytest.raises(WeightsError, match=r"must hold \*\.safetensors that fit"):
        captioner(tmp_path)


def test_a_lacking_tensor_is_named(checkpoints, tmp_path):
    from safetensors.torch import load_file, save_file

    for file in checkpoints["llava"].iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    weights = load_file(tmp_path / "model.safetensors")
    gone = next(name for name in weights if "multi_modal_projector" in name and name.endswith("weight"))
    save_file({k: v for k, v in weights.items() if k != gone}, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(WeightsError, match=r"lack 1 tensors of LlavaForConditionalGeneration: .*multi_modal_projector"):
        captioner(tmp_path)


def test_a_checkpoint_without_its_processor_is_refused(checkpoints, tmp_path):
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_bytes((checkpoints["llava"] / name).read_bytes())
    with pytest.raises(WeightsError, match=r"LlavaProcessor can't be loaded .* must hold tokenizer and image processor too"):
        captioner(tmp_path)


def test_no_chat_template_of_a_family_without_one_is_refused(checkpoints, tmp_path, monkeypatch):
    FAMILIES["llava"](tmp_path, template=None)
    monkeypatch.delitem(FALLBACK_TEMPLATES, "llava")
    with pytest.raises(ConfigError, match=r"has no chat template .*known: llava_onevision, qwen2_5_vl, qwen2_vl"):
        captioner(tmp_path)


def test_no_model_is_a_config_error():
    with pytest.raises(ConfigError, match=r"caption\.model is not set"):
        Captioner(CaptionConfig(), device=CPU)


def test_without_transformers_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ConfigError, match=r"pip install 'opensora-dist\[hf\]'"):
        captioner("anywhere")
