"""Scores of a CLIP-like model of transformers: how well a caption fits a clip, and how pleasing its frames are."""

# T frames of a clip, E width of the embeddings

from __future__ import annotations

import re
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional as F

from opensora_dist.config.load import expand
from opensora_dist.core.errors import ConfigError, WeightsError
from opensora_dist.core.extras import require_extra
from opensora_dist.core.video import Frames

_FRAMES_AT_ONCE = 32


class ClipModel:
    """A frozen model with a picture tower and a text tower (CLIP, SigLIP), in float32; safetensors only, no remote code.

    Every frame that is given counts; who calls chooses them.

    Args:
        path: Folder or hub name, as save_pretrained wrote it, with the processor.
        head: safetensors of the linear layers that make a score of an embedding, as in LAION's improved-aesthetic-predictor: weights
            and biases applied in the order of the numbers in their names, with nothing between them. ``aesthetic`` needs it.
        device: Where it runs.
    Raises:
        ConfigError: transformers is not installed, or the model has no two towers.
        WeightsError: Files are missing, not safetensors, or don't fit each other.
    """

    def __init__(self, path: str, *, head: str | None, device: torch.device) -> None:
        require_extra("transformers", extra="hf", wanted_by="scores.clip_model")
        self._device = device
        self._model, self._processor = _load(str(expand(path)))
        self._model = self._model.to(device)
        self._max_tokens = int(self._model.config.text_config.max_position_embeddings)
        # SigLIP was trained on captions padded to its full length, and has no mask for them.
        self._padding = "max_length" if str(self._model.config.model_type).startswith("siglip") else "longest"
        self._head = None
        if head is not None:
            width = self._embed_images(np.zeros((1, 64, 64, 3), np.uint8)).shape[1]
            self._head = [(weight.to(device), bias.to(device)) for weight, bias in _read_head(head, width=width)]

    @torch.inference_mode()
    def aesthetic(self, frames_THW3: Frames) -> float:
        """Mean over frames of the head's score; LAION's is trained on votes from 1 to 10."""
        assert self._head is not None, "scores.aesthetic_head is required by the rules of the config"
        values = self._embed_images(frames_THW3)
        for weight, bias in self._head:
            values = F.linear(values, weight, bias)
        return float(values.mean())

    @torch.inference_mode()
    def match(self, frames_THW3: Frames, caption: str) -> float:
        """Mean over frames of the cosine of picture and caption, from -1 to 1. Captions are cut at the model's last position."""
        inputs = self._processor.tokenizer(
            [caption], padding=self._padding, truncation=True, max_length=self._max_tokens, return_tensors="pt"
        )
        text_1E = _unit(self._model.get_text_features(**inputs.to(self._device)))
        return float((self._embed_images(frames_THW3) @ text_1E.T).mean())

    @torch.inference_mode()
    def _embed_images(self, frames_THW3: Frames) -> Tensor:
        """Unit vectors [T, E]."""
        parts = []
        for start in range(0, len(frames_THW3), _FRAMES_AT_ONCE):
            images = [Image.fromarray(frame) for frame in frames_THW3[start : start + _FRAMES_AT_ONCE]]
            inputs = self._processor.image_processor(images=images, return_tensors="pt")
            parts.append(_unit(self._model.get_image_features(**inputs.to(self._device))))
        return torch.cat(parts)


def _unit(features: Any) -> Tensor:
    """Rows of length 1. Since transformers 5 the projected vectors come inside an output."""
    vectors: Tensor = features if isinstance(features, Tensor) else features.pooler_output
    return F.normalize(vectors.float(), dim=-1)


def _load(path: str) -> tuple[Any, Any]:
    """Model, frozen and in eval mode, and processor.

    Raises:
        ConfigError, WeightsError: As ``ClipModel``.
    """
    import transformers

    try:
        processor = transformers.AutoProcessor.from_pretrained(path, trust_remote_code=False)
        model, found = transformers.AutoModel.from_pretrained(
            path, dtype=torch.float32, use_safetensors=True, trust_remote_code=False, output_loading_info=True
        )
    except (OSError, ValueError, RuntimeError, ImportError) as error:
        raise WeightsError(
            f"scores.clip_model={path!r}: can't be loaded ({error}); give a folder that save_pretrained wrote, of the model "
            "(*.safetensors) and its processor, or a hub name this machine can reach"
        ) from error
    if not hasattr(model, "get_image_features") or not hasattr(model, "get_text_features"):
        raise ConfigError(
            f"scores.clip_model={path!r} holds a {type(model).__name__}, which doesn't embed both pictures and text; use a CLIP or "
            "SigLIP model"
        )
    if lacking := sorted(str(key) for key in (*found["missing_keys"], *found["mismatched_keys"])):
        raise WeightsError(
            f"scores.clip_model={path!r}: the weights lack {len(lacking)} tensors of {type(model).__name__}: {', '.join(lacking[:8])}"
            f"{', ...' if len(lacking) > 8 else ''}; fetch the checkpoint again"
        )
    return model.eval().requires_grad_(False), processor


def _read_head(path: str, *, width: int) -> list[tuple[Tensor, Tensor]]:
    """(weight, bias) of each linear layer, in order.

    Raises:
        WeightsError: Unreadable, or no chain of layers from ``width`` values to one.
    """
    try:
        tensors = {name: tensor.float() for name, tensor in load_file(expand(path)).items()}
    except (OSError, SafetensorError) as error:
        raise WeightsError(
            f"scores.aesthetic_head={path!r}: can't be read ({error}); give a safetensors file (docs/captions.md says how LAION's is "
            "turned into one)"
        ) from error
    names = sorted((name for name in tensors if name.endswith("weight")), key=_numbers)
    layers = [(tensors[name], tensors.get(name.removesuffix("weight") + "bias")) for name in names]
    sizes = [width, *(int(weight.shape[0]) for weight, _ in layers)]
    chained = bool(layers) and sizes[-1] == 1 and len(tensors) == 2 * len(layers)
    whole = [(weight, bias) for weight, bias in layers if bias is not None]
    fits = all(w.shape == (after, before) and b.shape == (after,) for (w, b), before, after in zip(whole, sizes, sizes[1:]))
    if not chained or len(whole) != len(layers) or not fits:
        found = ", ".join(f"{name} {list(tensors[name].shape)}" for name in sorted(tensors, key=_numbers))
        raise WeightsError(
            f"scores.aesthetic_head={path!r} must be linear layers from the {width} values of scores.clip_model's embedding to one; it "
            f"holds {found or 'nothing'}; use the head that was trained on this model"
        )
    return whole


def _numbers(name: str) -> list[int]:
    """``layers.10.weight`` comes after ``layers.2.weight``."""
    return [int(number) for number in re.findall(r"\d+", name)]
