"""What a vision-language model of transformers says about clips: LLaVA and Qwen-VL families, by path."""

# B clips, T frames; a clip is uint8 RGB [T, H, W, 3], and clips of a batch may differ in all of these

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from opensora_dist.config.load import expand
from opensora_dist.config.prepare import CaptionConfig
from opensora_dist.core.errors import ConfigError, WeightsError
from opensora_dist.core.extras import require_extra
from opensora_dist.core.video import Frames, evenly_spaced
from opensora_dist.prepare.clean import storable

# What a family was trained on, for checkpoints that were saved without their chat template. Of LLaVA, that of Vicuna.
_CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% for part in m.content %}"
    "{% if part.type == 'image' %}IMAGE{% else %}{{ part.text }}{% endif %}"
    "{% endfor %}<|im_end|>\n{% endfor %}<|im_start|>assistant\n"
)
_QWEN_VL = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n" + _CHATML.replace(
    "IMAGE", "<|vision_start|><|image_pad|><|vision_end|>"
)
FALLBACK_TEMPLATES = {
    "llava": "{% for part in messages[0].content %}{% if loop.first %}USER: {% endif %}"
    "{% if part.type == 'image' %}<image>\n{% else %}{{ part.text }}{% endif %}{% endfor %} ASSISTANT:",
    "llava_onevision": _CHATML.replace("IMAGE", "<image>\n"),
    "qwen2_vl": _QWEN_VL,
    "qwen2_5_vl": _QWEN_VL,
}


class Captioner:
    """A frozen vision-language model that answers the prompts of a config about clips.

    Frames are shown as images, in order, before the prompt: every family takes them so, and a clip of one frame is no special
    case. Decoding is greedy and clips are padded on the left, so a caption doesn't depend on what shares its batch, up to rounding.
    Neither remote code nor pickled weights are loaded.

    Args:
        config: ``caption`` of a preparation; ``model`` must be set.
        device: Where it runs.
    Raises:
        ConfigError: transformers is not installed, the checkpoint is of no vision-language model, or it has no chat template.
        WeightsError: Files are missing, not safetensors, or lack weights of the model.
    """

    def __init__(self, config: CaptionConfig, *, device: torch.device) -> None:
        if config.model is None:
            raise ConfigError("caption.model is not set; give the folder of a vision-language model of transformers")
        require_extra("transformers", extra="hf", wanted_by="caption.model")
        self._config, self._device = config, device
        self._dtype: torch.dtype = getattr(torch, config.dtype)
        path = str(expand(config.model))
        model_config = _model_config(path)
        self._processor = _processor(path, model_config)
        self._template = _template(path, model_config, self._processor)
        self._model = _model(path, dtype=self._dtype).to(device)

    def caption(self, clips: Sequence[Frames]) -> list[dict[str, str]]:
        """Per clip, the answer to each of the config's prompts, by form. Spaces at the ends are taken off; nothing else is.

        Args:
            clips: uint8 RGB [T, H, W, 3] each, any number of them; ``caption.batch`` are captioned at once.
        """
        answers: list[dict[str, str]] = [{} for _ in clips]
        for start in range(0, len(clips), self._config.batch):
            images = [_images(clip, count=self._config.frames) for clip in clips[start : start + self._config.batch]]
            for form, prompt in self._config.prompts.items():
                for i, text in enumerate(self._answer(images, prompt), start=start):
                    answers[i][form] = text
        return answers

    @torch.inference_mode()
    def _answer(self, images: list[list[Image.Image]], prompt: str) -> list[str]:
        """One text per list of images."""
        texts = []
        for shown in images:
            content = [*({"type": "image"} for _ in shown), {"type": "text", "text": prompt}]
            chat = [{"role": "user", "content": content}]
            texts.append(self._processor.apply_chat_template(chat, chat_template=self._template, add_generation_prompt=True))
        begin = self._processor.tokenizer.bos_token
        marked = begin is not None and texts[0].startswith(begin)  # by the template; the tokenizer would do it again
        inputs = self._processor(text=texts, images=images, padding=True, return_tensors="pt", add_special_tokens=not marked)
        inputs = inputs.to(self._device, dtype=self._dtype)
        # A checkpoint's own sampling settings would be warned about, since greedy decoding has no use for them.
        answers = self._model.generate(
            **inputs,
            max_new_tokens=self._config.max_new_tokens,
            do_sample=False,
            num_beams=1,
            temperature=None,
            top_p=None,
            top_k=None,
        )
        new_BY = answers[:, inputs["input_ids"].shape[1] :]
        return [storable(text).strip() for text in self._processor.batch_decode(new_BY, skip_special_tokens=True)]


def _images(clip: Frames, *, count: int) -> list[Image.Image]:
    """As Pillow's, whose channels no processor has to guess from the sizes."""
    return [Image.fromarray(frame) for frame in evenly_spaced(clip, count)]


def _model_config(path: str) -> Any:
    """The checkpoint's config, of a model that answers to images and text.

    Raises:
        WeightsError, ConfigError: As ``Captioner``.
    """
    import transformers

    try:
        config = transformers.AutoConfig.from_pretrained(path, trust_remote_code=False)
    except (OSError, ValueError) as error:
        missing = "no such folder, and no hub name that this machine can reach" if not Path(path).is_dir() else "no config.json"
        raise WeightsError(
            f"caption.model={path!r}: {missing} ({_first_line(error)}); give a folder that save_pretrained wrote, of the model and "
            "its processor"
        ) from error
    if type(config) not in transformers.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING:
        raise ConfigError(
            f"caption.model={path!r} holds a {config.model_type}, which doesn't answer to images; use a vision-language model, such "
            "as LLaVA, LLaVA-OneVision, Qwen2-VL or Qwen2.5-VL"
        )
    return config


def _processor(path: str, model_config: Any) -> Any:
    """The checkpoint's processor, for images and text alone, padding on the left.

    AutoProcessor would also build a processor of videos, which needs torchvision and isn't asked for anything here.

    Raises:
        WeightsError: It can't be loaded.
    """
    from transformers.models.auto.processing_auto import PROCESSOR_MAPPING

    whole: Any = PROCESSOR_MAPPING[type(model_config)]
    parts = [part for part in whole.get_attributes() if part != "video_processor"]
    cls: Any = type(whole.__name__, (whole,), {"get_attributes": classmethod(lambda _: parts)})
    try:
        processor = cls.from_pretrained(path, trust_remote_code=False)
    except (OSError, ValueError, TypeError, ImportError) as error:
        raise WeightsError(
            f"caption.model={path!r}: its {whole.__name__} can't be loaded ({_first_line(error)}); the folder must hold tokenizer and "
            "image processor too, as save_pretrained of the processor writes them"
        ) from error
    tokenizer = processor.tokenizer
    tokenizer.padding_side = "left"  # answers begin where prompts end
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    return processor


def _template(path: str, model_config: Any, processor: Any) -> str:
    """The chat template of the checkpoint, or of its family.

    Raises:
        ConfigError: There is neither.
    """
    template = processor.chat_template or processor.tokenizer.chat_template or FALLBACK_TEMPLATES.get(model_config.model_type)
    if isinstance(template, str):
        return template
    raise ConfigError(
        f"caption.model={path!r} has no chat template (chat_template.jinja), and none is known for {model_config.model_type} (known: "
        f"{', '.join(sorted(FALLBACK_TEMPLATES))}); put the one that its publisher gives into the folder"
    )


def _model(path: str, *, dtype: torch.dtype) -> Any:
    """The frozen model in eval mode.

    Raises:
        WeightsError: No safetensors, or some that lack weights.
    """
    import transformers

    try:
        model, found = transformers.AutoModelForImageTextToText.from_pretrained(
            path, dtype=dtype, use_safetensors=True, trust_remote_code=False, output_loading_info=True
        )
    except (OSError, ValueError, RuntimeError) as error:
        raise WeightsError(
            f"caption.model={path!r}: no weights can be loaded ({_first_line(error)}); the folder must hold *.safetensors that fit its "
            "config.json (pickled weights are not read)"
        ) from error
    if lacking := sorted(str(key) for key in (*found["missing_keys"], *found["mismatched_keys"])):
        raise WeightsError(
            f"caption.model={path!r}: the weights lack {len(lacking)} tensors of {type(model).__name__}: {', '.join(lacking[:8])}"
            f"{', ...' if len(lacking) > 8 else ''}; fetch the checkpoint again"
        )
    return model.eval().requires_grad_(False)


def _first_line(error: Exception) -> str:
    """Messages of transformers go on for paragraphs."""
    return next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
