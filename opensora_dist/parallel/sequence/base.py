"""What a sequence scheme is, and the shard of a sample that it works on."""

# B batch, T frames, S tokens per frame, D width, N heads, K head dim; t, s: the local part; G sequences, L their whole length,
# l its local part: an attention along time has G = B * S sequences of L = T tokens

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise
from typing import ClassVar, Protocol, TypeVar

from torch import Tensor

from opensora_dist.core.types import Axis, Region, Thw
from opensora_dist.ops.precision import compute_dtype
from opensora_dist.parallel.recompute import Tape
from opensora_dist.parallel.sequence.exchange import Exchange

First = Callable[[Tensor], Tensor]
Before = Callable[[Tensor, slice], Tensor]
Then = Callable[[Tensor, Tensor], Tensor]
TensorOrTensors = TypeVar("TensorOrTensors", Tensor, tuple[Tensor, Tensor])


class Linear(Protocol):
    """What one rank computes of a linear; all of it, where ranks don't share it."""

    @property
    def weight(self) -> Tensor:
        """[out, in]."""
        ...

    @property
    def bias(self) -> Tensor | None:
        """[out]; None where it is added later, after a sum over ranks."""
        ...

    def __call__(self, x: Tensor, /) -> Tensor:
        """[..., in] to [..., out]."""
        ...


class BiasedLinear(Linear, Protocol):
    """One that adds its bias itself."""

    @property
    def bias(self) -> Tensor:
        """[out]."""
        ...


class Projections(Protocol):
    """What a scheme needs of a self-attention: its linears, with weights whole on every rank while a block runs.

    ``qkv`` gives [3, heads, head dim] in its last dim, in that order, and ``proj`` takes [heads, head dim]; where other ranks have
    other heads, these are fewer than the width, and ``proj`` has no bias.
    """

    @property
    def heads(self) -> int:
        """Those that this rank computes."""
        ...

    @property
    def head_dim(self) -> int:
        """Of each."""
        ...

    @property
    def qkv(self) -> BiasedLinear:
        """To the heads."""
        ...

    @property
    def proj(self) -> Linear:
        """Back to the width."""
        ...


def cast(tensor: Tensor) -> Tensor:
    """An operand as a linear computes with it; slices of a weight are cast once here, not once per slice."""
    return tensor.to(compute_dtype(tensor))


def split_sizes(total: int, parts: int) -> tuple[int, ...]:
    """``total`` in ``parts`` as equal as can be, the larger ones first; some are 0 where there are more parts than things."""
    return tuple(total // parts + (i < total % parts) for i in range(parts))


def ranges(sizes: Sequence[int]) -> list[range]:
    """Consecutive ranges of these sizes, from 0."""
    return [range(a, b) for a, b in pairwise(accumulate(sizes, initial=0))]


@dataclass(frozen=True, kw_only=True)
class Traffic:
    """Bytes one rank sends to others in one attention; headers of the transport are not counted."""

    forward: int
    backward: int


@dataclass(frozen=True, kw_only=True)
class Links:
    """The groups that share one sample.

    Args:
        sp: All ranks of the sample, in the order of the parts they hold.
        ring: The ranks with this rank's place in every ``ulysses`` group.
        ulysses: Consecutive ranks of ``sp``, this one among them.
    """

    sp: Exchange
    ring: Exchange
    ulysses: Exchange


@dataclass(frozen=True, kw_only=True)
class Shard:
    """One rank's part of samples of one shape, and how the parts meet. The residual stream is [B, t, s, D] in and out of everything.

    Args:
        grid: Tokens of a whole sample.
        by_rows: Parts are runs of rows of every frame (where frames are fewer than ranks); else runs of frames.
        sizes: Frames or rows of each rank.
        scheme: How tokens meet that are on different ranks.
        local: How those meet that are all here.
        links: The groups; None for a sample that is whole on this rank.
        tape: Of the region under recomputation, if one is.
    """

    grid: Thw
    by_rows: bool
    sizes: tuple[int, ...]
    scheme: Scheme
    local: Scheme
    links: Links | None
    tape: Tape | None = None

    @property
    def rank(self) -> int:
        """Of this part."""
        return 0 if self.links is None else self.links.sp.rank

    @property
    def region(self) -> Region:
        """The tokens held here."""
        return self.region_of(self.rank)

    def region_of(self, rank: int) -> Region:
        """The tokens that a rank holds, of those that share the sample."""
        part = ranges(self.sizes)[rank]
        if self.by_rows:
            return Region(0, self.grid.t, part.start, part.stop)
        return Region(part.start, part.stop, 0, self.grid.h)

    def crosses(self, axis: Axis) -> bool:
        """Whether an attention along ``axis`` needs tokens of other ranks."""
        return len(self.sizes) > 1 and axis in (Axis.JOINT, Axis.SPACE if self.by_rows else Axis.TIME)

    def lengths(self, axis: Axis) -> tuple[int, ...]:
        """Of every sequence along a crossing ``axis``: how many of its tokens each rank holds."""
        assert self.crosses(axis)
        rest = {Axis.TIME: 1, Axis.SPACE: self.grid.w, Axis.JOINT: (self.grid.t if self.by_rows else self.grid.h) * self.grid.w}
        return tuple(size * rest[axis] for size in self.sizes)

    def num_sequences(self, axis: Axis, *, batch: int) -> int:
        """Sequences of a crossing ``axis``, all of which every rank has a part of."""
        return batch * {Axis.TIME: self.grid.h * self.grid.w, Axis.SPACE: self.grid.t, Axis.JOINT: 1}[axis]

    def taped(self, tape: Tape | None) -> Shard:
        """This shard within a region that is computed again in backward; without a tape, one that is not."""
        return replace(self, tape=tape)

    def runs(self, x_BtsD: Tensor) -> list[tuple[int, int]]:
        """Samples whose tokens follow each other in ``x_BtsD``, all or some of each's: how many, and tokens of each."""
        B, t, s, _ = x_BtsD.shape
        return [(B, t * s)]

    def each(self, op: Callable[..., TensorOrTensors], *tokens_BtsD: Tensor, of: Sequence[Tensor]) -> TensorOrTensors:
        """``op(*tokens, *of)`` where what a token meets is its own sample's: work on each token by itself.

        Args:
            of: By sample, [B, ...].
        """
        return op(*tokens_BtsD, *of)

    def branch(
        self, attn: Projections, x_BtsD: Tensor, axis: Axis, *, first: First | None = None, before: Before, then: Then
    ) -> Tensor:
        """``then(x, attend(attn, before(x), axis))`` with ``x = first(x)``: an attention and the local work around it.

        A scheme calls the parts on pieces of the tokens, in the order that hides its communication.

        Args:
            attn: The projections.
            x_BtsD: Residual stream.
            axis: Who sees whom.
            first: Local work before, where frames don't see each other (rows, for a shard by rows); None where there is none.
            before: ``before(x, frames)`` gives the attention's input of the local frames ``frames``; each token by itself.
            then: ``then(x, attended)`` gives the residual stream after; each token by itself. What it is given has the rank and
                order of dims of the residual stream, of some frames or places only.
        """
        scheme = self.scheme if self.crosses(axis) else self.local
        return scheme.branch(attn, x_BtsD, axis, self, first=first, before=before, then=then)


class Scheme(ABC):
    """One way for the tokens of a sample to meet across ranks. Holds no state of a sample: two shapes may be in flight."""

    name: ClassVar[str]

    @abstractmethod
    def problems(self, grid: Thw, *, size: int, heads: int, joint: bool) -> list[str]:
        """The rules of this scheme that a case breaks, each with a way out; found before anything is communicated.

        Args:
            grid: Tokens of a sample.
            size: Ranks that share one.
            heads: Attention heads.
            joint: Whether the model's attention is over all tokens (``dit``).
        """

    @abstractmethod
    def bytes_sent(self, shard: Shard, axis: Axis, *, batch: int, width: int, element_bytes: int) -> Traffic:
        """What this rank sends in one crossing attention; the formula that planner, benchmark and test share."""

    @abstractmethod
    def attend(self, attn: Projections, x_BtsD: Tensor, axis: Axis, shard: Shard) -> Tensor:
        """Self-attention along a crossing ``axis``, from the residual layout to the residual layout."""

    def attend_parts(
        self,
        attn: Projections,
        xs_BtsD: Sequence[Tensor],
        axis: Axis,
        shards: Sequence[Shard],
        *,
        meanwhile: Callable[[], None],
    ) -> list[Tensor]:
        """``attend`` of the parts of a pack, which don't see each other; here one after the other.

        Args:
            meanwhile: Work of this rank alone, for while tokens travel; called once.
        """
        meanwhile()
        return [self.attend(attn, x, axis, shard) for x, shard in zip(xs_BtsD, shards, strict=True)]

    def branch(
        self, attn: Projections, x_BtsD: Tensor, axis: Axis, shard: Shard, *, first: First | None, before: Before, then: Then
    ) -> Tensor:
        """``Shard.branch``; here without any overlap across its parts."""
        x = x_BtsD if first is None else first(x_BtsD)
        return then(x, self.attend(attn, before(x, slice(None)), axis, shard))


def to_sequences(x_BtsD: Tensor, axis: Axis) -> Tensor:
    """The residual layout as sequences, position first: [l, ..., D], a view. What ranks send each other is rows of this."""
    if axis is Axis.TIME:
        return x_BtsD.transpose(0, 1)  # [t, B, S, D]
    if axis is Axis.SPACE:
        return x_BtsD.permute(2, 0, 1, 3)  # [s, B, T, D]
    return x_BtsD.flatten(1, 2).transpose(0, 1)  # [l, B, D]


def from_sequences(x_lGD: Tensor, axis: Axis, *, like: Tensor) -> Tensor:
    """Back from ``to_sequences``; a view.

    Args:
        like: A tensor of the residual layout to come back to.
    """
    if axis is Axis.TIME:
        return x_lGD.transpose(0, 1)
    if axis is Axis.SPACE:
        return x_lGD.permute(1, 2, 0, 3)
    return x_lGD.transpose(0, 1).reshape(like.shape)
