"""Where the samples of a batch go, as they are stored: each array straight to its place, text with room for the longest."""

# B batch, t C H w latent frames, channels, rows, columns; Y text tokens, E text width

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from opensora_dist.core.types import Region, Thw
from opensora_dist.data.buffers import Slot
from opensora_dist.data.index import Index
from opensora_dist.data.reader import Damage, Target


@dataclass(frozen=True, kw_only=True)
class StoredBatch:
    """What a ``MicroBatch`` is made of, collated, as it is stored: views into a slot, or copies of that on the GPU.

    Args:
        latents_BtCHw: As stored, of the frames of ``region``; of all rows, since a frame is checked as a whole.
        text_BYE: As stored, zero where there is no token.
        ready: What a GPU has to wait for before the tensors hold anything.
    The others are those of the ``MicroBatch``.
    """

    latents_BtCHw: Tensor
    latent: Thw
    region: Region
    text_BYE: Tensor
    text_mask_BY: Tensor
    samples: tuple[int, ...]
    keys: Sequence[str]
    places: tuple[int, ...]
    bad: tuple[Damage | None, ...]
    weight_B: Tensor
    ready: torch.cuda.Event | None = None


def collate(
    index: Index,
    parts: Mapping[Thw, Mapping[int, int]],
    *,
    regions: Mapping[Thw, Region],
    text_tokens: int,
    weights: Sequence[float],
    slot: Slot,
    read: Callable[[Sequence[Target]], Mapping[int, Damage]],
) -> list[StoredBatch]:
    """Reads samples into a slot, those of each latent shape as one batch; whatever can't be read is zero there, and marked.

    Args:
        parts: For each latent shape, rows by their places in the global batch.
        regions: The part of the latents that this rank holds.
        text_tokens: To which text is padded.
        weights: Of each place of the global batch.
        read: Reads samples, and says what can't be read, by row.
    """
    spec = index.spec
    arrays = [
        _Arrays(
            index,
            rows=list(rows.values()),
            frames=regions[latent].frames,
            latents_shape=(len(rows), len(regions[latent].frames), spec.channels, latent.h, latent.w),
            text_shape=(len(rows), text_tokens, spec.text_width),
        )
        for latent, rows in parts.items()
    ]
    memory = iter(slot.arrays([size for a in arrays for size in a.sizes]))
    for a in arrays:
        a.lie_in(next(memory), next(memory))
    known = read([target for a in arrays for target in a.targets])
    stored = []
    for a, (latent, rows) in zip(arrays, parts.items(), strict=True):
        bad = tuple(known.get(row) for row in a.rows)
        stored.append(
            StoredBatch(
                latents_BtCHw=torch.from_numpy(a.latents),
                latent=latent,
                region=regions[latent],
                text_BYE=torch.from_numpy(a.text),
                text_mask_BY=a.finish([why is not None for why in bad]),
                samples=tuple(index.sample_id(row) for row in a.rows),
                keys=index.key.pick(a.rows),
                places=tuple(rows),
                bad=bad,
                weight_B=torch.tensor([weights[place] for place in rows], dtype=torch.float64),
            )
        )
    return stored


class _Arrays:
    """The arrays of samples of one shape. Of several precisions they have the widest.

    Args:
        index: The data set.
        rows: The samples.
        frames: Their latent frames that are read.
        latents_shape: [B, t, C, H, w].
        text_shape: [B, Y, E].
    """

    def __init__(
        self,
        index: Index,
        *,
        rows: Sequence[int],
        frames: range,
        latents_shape: tuple[int, ...],
        text_shape: tuple[int, ...],
    ) -> None:
        self.rows = rows
        self._frames = frames
        self._shapes = (latents_shape, text_shape)
        self._stored = [index.dtype(row) for row in rows]
        self._tokens = [int(index.text_tokens[row]) for row in rows]
        self._dtype = max(self._stored, key=lambda dtype: dtype.itemsize)

    @property
    def sizes(self) -> tuple[int, int]:
        """Bytes of latents and of text."""
        latents, text = (math.prod(shape) * self._dtype.itemsize for shape in self._shapes)
        return latents, text

    def lie_in(self, latents: Tensor, text: Tensor) -> None:
        """Takes memory, of ``sizes``; it may hold anything."""
        self._bytes = (latents.numpy(), text.numpy())
        self.latents, self.text = (m.view(self._dtype).reshape(s) for m, s in zip(self._bytes, self._shapes, strict=True))

    @property
    def targets(self) -> list[Target]:
        """Where to read each sample to: to its place, or, where it is stored narrower, to the end of it."""
        (latents, text), num_latents = (m.data for m in self._bytes), math.prod(self._shapes[0][1:])
        return [
            Target(
                row=row,
                frames=self._frames,
                latents=self._place(latents, b, room=num_latents, used=num_latents),
                text=self._place(text, b, room=math.prod(self._shapes[1][1:]), used=self._tokens[b] * self._shapes[1][2]),
            )
            for b, row in enumerate(self.rows)
        ]

    def _place(self, memory: memoryview, b: int, *, room: int, used: int) -> memoryview:
        """Of ``used`` numbers of a sample in ``room``."""
        end = (b * room + used) * self._dtype.itemsize
        return memory[end - used * self._stored[b].itemsize : end]

    def finish(self, bad: Sequence[bool]) -> Tensor:
        """Once all is read: precisions are made one, and what holds nothing is zero.

        Args:
            bad: Which samples could not be read; they become zero, with one token, since attention to none is not a number.
        Returns:
            Where there are tokens, bool [B, Y].
        """
        for b, damaged in enumerate(bad):
            tokens = 0 if damaged else self._tokens[b]
            self.text[b, tokens:] = 0
            if damaged:
                self.latents[b] = 0
            elif self._stored[b] != self._dtype:
                for array in (self.latents[b], self.text[b, :tokens]):
                    _widen(array, self._stored[b])
        lengths = [1 if damaged else tokens for tokens, damaged in zip(self._tokens, bad, strict=True)]
        return torch.arange(self._shapes[1][1]) < torch.tensor(lengths)[:, None]


def _widen(array: NDArray[np.generic], stored: np.dtype[np.generic]) -> None:
    """In place, from what lies at the end of its memory; exact. The copy is as rare as samples of two precisions in a batch."""
    flat = array.reshape(-1)
    flat[:] = flat.view(stored)[-flat.size :].copy()
