"""A text encoder without weights: one fixed random vector per word, plus where the word stands."""

# Y tokens, E width

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

from opensora_dist.parallel.keys import Keys, sample_id

_TOKEN = re.compile(r"\w+|[^\w\s]")
_EMPTY = "<empty>"  # a token that no caption can hold, since "<" is a token of its own
_REFERENCE_WIDTH = 4096  # of T5-XXL, for which the caption MLP's published initialisation was chosen
_KEYS = Keys(0)  # not run.seed: a word's vector is part of the data set, the same in every run


def tokenize(caption: str) -> list[str]:
    """Lower-cased words, and punctuation marks one by one; an empty caption is one dedicated token."""
    return _TOKEN.findall(caption.lower()) or [_EMPTY]


@lru_cache(maxsize=65536)
def _word_vector(word: str, width: int) -> Tensor:
    """Standard normal [E], keyed by the word: two words are orthogonal up to 1/sqrt(E)."""
    return torch.empty(width).normal_(generator=_KEYS.generator("word", sample_id(word)))


def _positions(length: int, width: int) -> Tensor:
    """Sine and cosine position vectors [Y, E], so that word order reaches a cross-attention, which has none of its own."""
    half = torch.arange((width + 1) // 2, dtype=torch.float64)
    angle = torch.arange(length, dtype=torch.float64)[:, None] * torch.exp(-math.log(10000.0) * 2 * half / width)
    return torch.cat([angle.sin(), angle.cos()], dim=1)[:, :width].float()


class HashTextEncoder:
    """Word vectors plus sin-cos positions, both of unit variance at a width of 4096 and larger where they are narrower.

    The model's caption MLP starts at N(0, 0.02), whatever its input's width. Scaled by sqrt(4096 / width), narrow vectors have the
    norm of wide ones and reach it as loud; unscaled, words that only matter together with something else (a direction matters with
    a place and a time) stay unheard for thousands of steps.

    Args:
        width: Size of a token vector.
        max_tokens: Longest caption; longer ones are cut and counted.
        device: Where vectors are returned.
    """

    def __init__(self, *, width: int, max_tokens: int, device: torch.device) -> None:
        self.width = width
        self.max_tokens = max_tokens
        self.device = device
        self._cut = 0

    def encode(self, captions: Sequence[str]) -> list[Tensor]:
        """One float32 [tokens, width] per caption, 1 <= tokens <= max_tokens."""
        return [self._encode(caption) for caption in captions]

    def num_cut(self) -> int:
        """How many captions were longer than ``max_tokens`` so far."""
        return self._cut

    def _encode(self, caption: str) -> Tensor:
        words = tokenize(caption)
        self._cut += len(words) > self.max_tokens
        words = words[: self.max_tokens]
        vectors_YE = torch.stack([_word_vector(word, self.width) for word in words])
        scale = math.sqrt(_REFERENCE_WIDTH / self.width)
        return (scale * (vectors_YE + _positions(len(words), self.width))).to(self.device)
