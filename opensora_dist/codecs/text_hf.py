"""Text encoders of transformers: T5 and UMT5 (encoder half), CLIP's text tower, or any other encoder."""

# B captions, Y tokens, E width

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from opensora_dist.core.errors import ConfigError, WeightsError
from opensora_dist.core.extras import require_extra

# AutoModel would load these with a decoder or a vision tower that nobody asked for; everything else goes through it.
_ENCODER_ONLY = {
    "t5": "T5EncoderModel",
    "mt5": "MT5EncoderModel",
    "umt5": "UMT5EncoderModel",
    "clip": "CLIPTextModel",
    "clip_text_model": "CLIPTextModel",
}


def require_transformers() -> None:
    """Refuses to go on without transformers.

    Raises:
        ConfigError: Saying what to install.
    """
    require_extra("transformers", extra="hf", wanted_by="text.name=hf")


class HfTextEncoder:
    """A frozen encoder of transformers, safetensors only, no remote code.

    Args:
        path: Folder or hub name with tokenizer and weights.
        max_tokens: Longest caption; longer ones are cut and counted.
        dtype: Precision the encoder computes in.
        device: Where it runs.
    Raises:
        ConfigError: transformers is not installed, or ``max_tokens`` exceeds the encoder's positions.
        WeightsError: Files are missing, not safetensors, or lack weights of the model.
    """

    def __init__(self, *, path: str, max_tokens: int, dtype: torch.dtype, device: torch.device) -> None:
        require_transformers()
        import transformers

        try:
            config = transformers.AutoConfig.from_pretrained(path, trust_remote_code=False)
            tokenizer = transformers.AutoTokenizer.from_pretrained(path, trust_remote_code=False)
            cls = getattr(transformers, _ENCODER_ONLY.get(config.model_type, "AutoModel"))
            model, found = cls.from_pretrained(
                path, dtype=dtype, use_safetensors=True, trust_remote_code=False, output_loading_info=True
            )
        except (OSError, ValueError, RuntimeError) as error:
            raise WeightsError(
                f"text.path={path!r}: can't be loaded ({error}); give a folder saved by save_pretrained of both model and "
                "tokenizer (*.safetensors), or a hub name this machine can reach"
            ) from error
        # Encoders saved from a language-model head have no pooler, which the hidden states don't pass through.
        lacking = [str(k) for k in (*found["missing_keys"], *found["mismatched_keys"]) if not str(k).startswith("pooler.")]
        if lacking:
            raise WeightsError(
                f"text.path={path!r}: the weights lack {len(lacking)} tensors of {type(model).__name__}: "
                f"{', '.join(sorted(lacking)[:8])}{', ...' if len(lacking) > 8 else ''}; fetch the checkpoint again"
            )
        if getattr(model.config, "is_encoder_decoder", False) and hasattr(model, "decoder"):
            model = model.get_encoder()
        tokenizer.padding_side = "right"
        tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
        self._tokenizer: Any = tokenizer
        self._model: Any = model.to(device).eval().requires_grad_(False)
        text_config = getattr(config, "text_config", None) or config
        self.width = int(text_config.hidden_size)
        positions = getattr(text_config, "max_position_embeddings", None)
        if positions is not None and max_tokens > positions:
            raise ConfigError(f"text.max_tokens={max_tokens} exceeds the {positions} positions of text.path={path!r}; lower it")
        self.max_tokens = max_tokens
        self._device = device
        self._cut = 0

    @torch.no_grad()
    def encode(self, captions: Sequence[str]) -> list[Tensor]:
        """One float32 [tokens, width] per caption: the last hidden states of its own tokens, padding left out."""
        lengths = [len(ids) for ids in self._tokenizer(list(captions), verbose=False)["input_ids"]]
        self._cut += sum(length > self.max_tokens for length in lengths)
        # Without special tokens an empty caption would be no token at all.
        texts = [caption if length else self._tokenizer.pad_token for caption, length in zip(captions, lengths, strict=True)]
        inputs = self._tokenizer(texts, padding=True, truncation=True, max_length=self.max_tokens, return_tensors="pt")
        ids_BY, mask_BY = inputs["input_ids"].to(self._device), inputs["attention_mask"].to(self._device)
        states_BYE = self._model(input_ids=ids_BY, attention_mask=mask_BY).last_hidden_state.float()
        return [states_YE[mask_Y.bool()] for states_YE, mask_Y in zip(states_BYE, mask_BY, strict=True)]

    def num_cut(self) -> int:
        """How many captions were longer than ``max_tokens`` so far."""
        return self._cut
