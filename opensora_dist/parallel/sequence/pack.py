"""A pack: samples of several shapes in one sequence, so that a rank's work has the same size whatever the shapes are.

Tokens of all samples follow each other in one residual stream [1, 1, L, D]. What works on each token by itself sees one long sequence;
an attention stays within a sample (within its frames, or its places across frames), and samples of one shape attend in one call.

Source: NaViT (Patch n' Pack), arXiv 2307.06304; segments of spatial and temporal attention are frames and places of each sample.
"""

# P part: samples of one shape; B samples of a part, t s their local frames and places, L tokens of all parts, G sequences of l tokens,
# D width, C heads x head dim

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import prod

import torch
from torch import Tensor

from opensora_dist.core.types import Axis
from opensora_dist.ops.attention import attention
from opensora_dist.parallel.recompute import Tape
from opensora_dist.parallel.sequence.base import Before, First, Projections, Shard, Then


@dataclass(frozen=True, kw_only=True)
class Part:
    """Samples of one shape in a pack.

    Args:
        shard: This rank's part of each.
        batch: How many.
    """

    shard: Shard
    batch: int

    @property
    def shape(self) -> tuple[int, int, int]:
        """[B, t, s] of their tokens that are here."""
        local = self.shard.region.shape(self.shard.grid)
        return self.batch, local.t, local.h * local.w

    def sequences(self, x_BtsD: Tensor, axis: Axis) -> Tensor:
        """[G, l, D], whole sequences along an axis that doesn't cross ranks; a view."""
        if axis is Axis.SPACE:
            return x_BtsD.flatten(0, 1)
        return x_BtsD.transpose(1, 2).flatten(0, 1) if axis is Axis.TIME else x_BtsD.flatten(1, 2)

    def residual(self, x_GlD: Tensor, axis: Axis) -> Tensor:
        """Back from ``sequences``, [B, t, s, D]."""
        B, t, s = self.shape
        return x_GlD.view(B, s, t, -1).transpose(1, 2) if axis is Axis.TIME else x_GlD.view(B, t, s, -1)


@dataclass(frozen=True, kw_only=True)
class Pack:
    """What ``Shard`` is for samples of one shape, for a residual stream [1, 1, L, D] of several.

    An attention that crosses ranks is done by its part's scheme, part by part, without overlap with the work around it.
    """

    parts: tuple[Part, ...]
    tape: Tape | None = None

    def taped(self, tape: Tape | None) -> Pack:
        """As ``Shard.taped``."""
        return replace(self, tape=tape, parts=tuple(replace(part, shard=part.shard.taped(tape)) for part in self.parts))

    def join(self, parts_BtsD: Sequence[Tensor]) -> Tensor:
        """The parts' tokens as one sequence."""
        return torch.cat([x.flatten(0, 2) for x in parts_BtsD])[None, None]

    def split(self, x_11LD: Tensor) -> list[Tensor]:
        """Back from ``join``: [B, t, s, D] of each part."""
        pieces = torch.split(x_11LD[0, 0], [prod(part.shape) for part in self.parts])
        return [x.view(*part.shape, -1) for x, part in zip(pieces, self.parts, strict=True)]

    def clips(self, x_11LD: Tensor) -> list[tuple[Tensor, slice]]:
        """[B, t s, D] of each part, and which samples of the pack it has."""
        found, first = [], 0
        for x_BtsD, part in zip(self.split(x_11LD), self.parts, strict=True):
            found.append((x_BtsD.flatten(1, 2), slice(first, first + part.batch)))
            first += part.batch
        return found

    def from_clips(self, clips_BlD: Sequence[Tensor], *, like: Tensor) -> Tensor:
        """Back from ``clips``."""
        return torch.cat([x.flatten(0, 1) for x in clips_BlD]).view(*like.shape[:3], -1)

    def spread(self, values_BMD: Tensor) -> Tensor:
        """M vectors of each sample for each of its tokens, [1, M, 1, L, D]."""
        spread, first = [], 0
        for part in self.parts:
            B, t, s = part.shape
            of_part = values_BMD[first : first + B].transpose(0, 1)[:, :, None]
            spread.append(of_part.expand(-1, -1, t * s, -1).flatten(1, 2))
            first += B
        return torch.cat(spread, dim=1)[None, :, None]

    def branch(
        self, attn: Projections, x_11LD: Tensor, axis: Axis, *, first: First | None = None, before: Before, then: Then
    ) -> Tensor:
        """As ``Shard.branch``."""
        x = x_11LD if first is None else first(x_11LD)
        inputs = self.split(before(x, slice(None)))
        here = [i for i, part in enumerate(self.parts) if not part.shard.crosses(axis)]
        done = dict(zip(here, self._attend_here(attn, [inputs[i] for i in here], axis, [self.parts[i] for i in here])))
        outputs = [
            done[i] if i in done else part.shard.scheme.attend(attn, inputs[i], axis, part.shard)
            for i, part in enumerate(self.parts)
        ]
        return then(x, self.join(outputs))

    def _attend_here(self, attn: Projections, inputs_BtsD: Sequence[Tensor], axis: Axis, parts: Sequence[Part]) -> list[Tensor]:
        """Parts whose sequences are whole on this rank: one projection for all, one attention per shape."""
        if not parts:
            return []
        sequences = [part.sequences(x, axis) for part, x in zip(parts, inputs_BtsD, strict=True)]
        qkv_RE = attn.qkv(torch.cat([x.flatten(0, 1) for x in sequences]))
        outputs = []
        for x_GlD, rows_RE in zip(sequences, torch.split(qkv_RE, [x.shape[0] * x.shape[1] for x in sequences]), strict=True):
            q, k, v = rows_RE.view(*x_GlD.shape[:2], 3, attn.heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
            outputs.append(attention(q, k, v).transpose(1, 2).flatten(0, 1).flatten(1))
        out_RD = attn.proj(torch.cat(outputs))
        rows = torch.split(out_RD, [len(x) for x in outputs])
        return [part.residual(x.view(*y.shape[:2], -1), axis) for part, x, y in zip(parts, rows, sequences, strict=True)]


Tokens = Shard | Pack
"""The tokens that a block works on."""
