"""Checkpoints of vision-language models with a few thousand random weights, saved by transformers as published ones are."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

WORDS = [
    *(
        "Describe",
        "this",
        "video",
        "in",
        "one",
        "short",
        "sentence",
        "detail",
        "subjects",
        "actions",
        "setting",
        "light",
        "camera",
    ),
    *(".", ":", ",", "a", "red", "blue", "green", "circle", "square", "triangle", "moves", "left", "right", "up", "down", "over"),
    *("under", "slowly", "quickly", "on", "white", "black", "grey", "floor", "wall"),
]
SPECIAL = [
    *("<pad>", "<s>", "</s>", "<unk>", "<image>", "<video>", "<|im_start|>", "<|im_end|>"),
    *("<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>"),
]
VOCABULARY = [*SPECIAL, "USER", "ASSISTANT", "system", "user", "assistant", *WORDS]
LLAVA_TEMPLATE = (
    "{% for message in messages %}{{ message['role'].upper() + ': ' }}{% for content in message['content'] %}"
    "{% if content['type'] == 'image' %}{{ '<image>\n' }}{% else %}{{ content['text'] }}{% endif %}{% endfor %} {% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
QWEN_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{% for content in message['content'] %}"
    "{% if content['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ content['text'] }}{% endif %}"
    "{% endfor %}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
_IMAGE = VOCABULARY.index("<image>")
_TILES = [[28, 56], [56, 28], [56, 56]]
_TEXT = {
    "vocab_size": len(VOCABULARY),
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 4096,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def tokenizer():
    """Whole words, one id each."""
    tokenizers, transformers = pytest.importorskip("tokenizers"), pytest.importorskip("transformers")
    core = tokenizers.Tokenizer(tokenizers.models.WordLevel({w: i for i, w in enumerate(VOCABULARY)}, unk_token="<unk>"))
    core.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        additional_special_tokens=SPECIAL[4:],
    )


def _tower():
    """CLIP's vision tower."""
    import transformers

    layers = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    return transformers.CLIPVisionConfig(**layers, image_size=28, patch_size=14)


def save_llava(folder: Path, *, template: str | None = LLAVA_TEMPLATE) -> Path:
    """LLaVA-1.5: CLIP's vision tower, 28 x 28 pixels as four patches, and a Llama."""
    transformers = pytest.importorskip("transformers")
    config = transformers.LlavaConfig(
        vision_config=_tower(), text_config=transformers.LlamaConfig(**_TEXT), image_token_index=_IMAGE
    )
    _save(transformers.LlavaForConditionalGeneration, config, folder)
    images = transformers.CLIPImageProcessor(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28})
    transformers.LlavaProcessor(
        image_processor=images,
        tokenizer=tokenizer(),
        patch_size=14,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=template,
    ).save_pretrained(folder)
    return folder


def save_llava_next(folder: Path) -> Path:
    """LLaVA-NeXT: an image as a whole and as tiles, with a token at the end of each row."""
    transformers = pytest.importorskip("transformers")
    config = transformers.LlavaNextConfig(
        vision_config=_tower(),
        text_config=transformers.LlamaConfig(**_TEXT),
        image_grid_pinpoints=_TILES,
        image_token_index=_IMAGE,
    )
    _save(transformers.LlavaNextForConditionalGeneration, config, folder)
    images = transformers.LlavaNextImageProcessor(
        size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28}, image_grid_pinpoints=_TILES
    )
    transformers.LlavaNextProcessor(
        image_processor=images,
        tokenizer=tokenizer(),
        patch_size=14,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=LLAVA_TEMPLATE,
    ).save_pretrained(folder)
    return folder


def save_llava_onevision(folder: Path) -> Path:
    """LLaVA-OneVision: tiles of a single image, several images as they are, SigLIP's tower and a Qwen2. Parts saved one by one."""
    transformers = pytest.importorskip("transformers")
    layers = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    tower = transformers.SiglipVisionConfig(**layers, image_size=28, patch_size=14, vision_use_head=False)
    config = transformers.LlavaOnevisionConfig(
        vision_config=tower,
        text_config=transformers.Qwen2Config(**_TEXT),
        image_grid_pinpoints=_TILES,
        image_token_index=_IMAGE,
        video_token_index=VOCABULARY.index("<video>"),
    )
    _save(transformers.LlavaOnevisionForConditionalGeneration, config, folder)
    images = transformers.LlavaOnevisionImageProcessor(size={"height": 28, "width": 28}, image_grid_pinpoints=_TILES)
    images.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    options = {"processor_class": "LlavaOnevisionProcessor", "num_image_tokens": 4, "vision_feature_select_strategy": "full"}
    (folder / "processor_config.json").write_text(json.dumps(options))
    return folder


def save_qwen2_vl(folder: Path, *, template: str | None = QWEN_TEMPLATE) -> Path:
    """Qwen2-VL: images of any size as patches of 14 x 14, merged by fours, and a Qwen2 with positions in three dimensions.

    Its parts are saved one by one, as on the hub: the whole processor can't be built without torchvision.
    """
    vision = {"embed_dim": 16, "hidden_size": 16, "mlp_ratio": 2}
    return _save_qwen(folder, "Qwen2VL", vision=vision, template=template)


def save_qwen2_5_vl(folder: Path) -> Path:
    """Qwen2.5-VL: the same with attention in windows."""
    vision = {"hidden_size": 16, "intermediate_size": 32, "out_hidden_size": 16, "window_size": 56, "fullatt_block_indexes": [1]}
    return _save_qwen(folder, "Qwen2_5_VL", vision=vision, template=None)


def _save_qwen(folder: Path, family: str, *, vision: dict[str, object], template: str | None) -> Path:
    transformers = pytest.importorskip("transformers")
    config = getattr(transformers, f"{family}Config")(
        text_config={**_TEXT, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}},
        vision_config={**vision, "depth": 2, "num_heads": 2, "patch_size": 14},
        image_token_id=VOCABULARY.index("<|image_pad|>"),
        video_token_id=VOCABULARY.index("<|video_pad|>"),
        vision_start_token_id=VOCABULARY.index("<|vision_start|>"),
        vision_end_token_id=VOCABULARY.index("<|vision_end|>"),
    )
    _save(getattr(transformers, f"{family}ForConditionalGeneration"), config, folder)
    transformers.Qwen2VLImageProcessor(min_pixels=28 * 28, max_pixels=56 * 56).save_pretrained(folder)
    words = tokenizer()
    words.chat_template = template
    words.save_pretrained(folder)
    return folder


def _save(cls, config, folder: Path) -> None:
    """It never ends before it must, and says words of captions."""
    model = _scattered(cls, config)
    with torch.no_grad():
        model.get_output_embeddings().weight[: VOCABULARY.index(WORDS[0])] *= 0.01
    model.save_pretrained(folder)


def _scattered(cls, config):
    """The same weights every time, larger than a fresh model's, so that what comes out depends on what goes in."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)  # vectors, such as CLIP's class embedding, are drawn where the model is made
        model = cls(config)
    draws = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=2 * parameter[0].numel() ** -0.5, generator=draws)
    return model


def save_clip(folder: Path) -> Path:
    """CLIP: 28 x 28 pixels, at most 16 tokens, embeddings of 8 values."""
    transformers = pytest.importorskip("transformers")
    layers = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = transformers.CLIPConfig(
        text_config={
            **layers,
            "vocab_size": len(VOCABULARY),
            "max_position_embeddings": 16,
            "bos_token_id": 1,
            "eos_token_id": 2,
        },
        vision_config={**layers, "image_size": 28, "patch_size": 14},
        projection_dim=8,
    )
    _scattered(transformers.CLIPModel, config).save_pretrained(folder)
    images = transformers.CLIPImageProcessor(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28})
    transformers.CLIPProcessor(images, _closed(tokenizer())).save_pretrained(folder)
    return folder


def save_siglip(folder: Path) -> Path:
    """SigLIP: 28 x 28 pixels, captions padded to 16 tokens, embeddings of 16 values."""
    transformers = pytest.importorskip("transformers")
    layers = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = transformers.SiglipConfig(
        text_config={**layers, "vocab_size": len(VOCABULARY), "max_position_embeddings": 16},
        vision_config={**layers, "image_size": 28, "patch_size": 14},
    )
    _scattered(transformers.SiglipModel, config).save_pretrained(folder)
    images = transformers.SiglipImageProcessor(size={"height": 28, "width": 28})
    transformers.SiglipProcessor(images, _closed(tokenizer())).save_pretrained(folder)
    return folder


def _closed(words):
    """Captions end in </s>, whose state is CLIP's of the whole; no mask, as SigLIP's tokenizer gives none."""
    import tokenizers

    words.backend_tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", VOCABULARY.index("</s>"))]
    )
    words.model_input_names = ["input_ids"]
    return words
