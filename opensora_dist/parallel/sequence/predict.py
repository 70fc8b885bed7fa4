"""How long a step takes under a scheme: matrix products at the measured rate, and of the transfers what nothing hides.

Normalisation, optimizer and gradient sums are left out: they are the same whichever scheme is chosen.
"""

# B batch, T frames, S tokens per frame, D width, P ranks that share a sample

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from opensora_dist.config.train import SpConfig
from opensora_dist.core.types import Axis, Thw
from opensora_dist.parallel.sequence.base import Links, Shard, split_sizes
from opensora_dist.parallel.sequence.exchange import Exchange
from opensora_dist.parallel.sequence.layout import shards_rows
from opensora_dist.parallel.sequence.local import Local
from opensora_dist.parallel.sequence.network import Network
from opensora_dist.parallel.sequence.registry import SCHEMES


@dataclass(frozen=True, kw_only=True)
class SampleCost:
    """What a model does with one sample of a shape, in forward FLOPs; from the model itself.

    Args:
        width: Of the residual stream.
        heads: Attention heads.
        joint: Whether one attention is over all tokens.
        blocks: Transformer blocks.
        flops: The whole model's.
        replicated_flops: Of these, what every rank does whatever its part: text and timestep.
        then_flops: Of these, in one block, the work on each token by itself that follows its last attention.
    """

    width: int
    heads: int
    joint: bool
    blocks: int
    flops: int
    replicated_flops: int
    then_flops: int


@dataclass(frozen=True, kw_only=True)
class Workload:
    """What one group of ranks that share samples does in a micro-batch, and how often in a step.

    Args:
        grid: Tokens of a sample.
        batch: Samples of a micro-batch.
        cost: Of one sample.
        element_bytes: Of what travels.
        accum: Micro-batches of a step.
        recompute: Whether backward runs the blocks again.
    """

    grid: Thw
    batch: int
    cost: SampleCost
    element_bytes: int
    accum: int = 1
    recompute: bool = False


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """Seconds of an optimizer step on the rank that holds most.

    Args:
        compute_s: Matrix products, forward and backward.
        communication_s: Transfers between ranks that share a sample.
        exposed_s: Of these, what no work is there to hide.
        step_s: compute_s + exposed_s.
    """

    scheme: str
    degree: int
    compute_s: float
    communication_s: float
    exposed_s: float
    step_s: float


@dataclass(frozen=True, kw_only=True)
class _Pieces:
    """Forward FLOPs, on the rank that holds most, of the attention that crosses ranks and of the work around it in one block.

    Args:
        before: The block's attention that crosses nothing.
        then: Cross-attention and MLP.
        ulysses: Ranks of the inner axis.
        chunks: Pieces of a pipeline, where a scheme has one.
    """

    size: int
    qkv: float
    scores: float
    proj: float
    before: float
    then: float
    ulysses: int
    chunks: int


@dataclass(frozen=True, kw_only=True)
class _Trip:
    """A part of a crossing attention's traffic that is waited for at once.

    Args:
        share: Of the attention's bytes.
        rounds: Messages one after another.
        cover: FLOPs that the rank has to do meanwhile.
    """

    share: float
    rounds: int
    cover: float


def _dsp(p: _Pieces) -> list[_Trip]:
    # There, under QKV of own tokens (1/P of those here), and with more than one chunk under the attention before. Back, under the
    # projection, cross-attention and MLP of own tokens, and with more than one chunk under the attention of the others.
    others = (p.chunks - 1) / p.chunks
    return [
        _Trip(share=0.5, rounds=1, cover=p.qkv / p.size + p.before * others),
        _Trip(share=0.5, rounds=1, cover=(p.proj + p.then) / p.size + p.scores * others),
    ]


def _ulysses(p: _Pieces) -> list[_Trip]:
    # q under the projection of k, k under that of v; v and the output under what is done meanwhile with the other pieces, if any.
    others = (p.chunks - 1) / p.chunks
    return [
        _Trip(share=0.25, rounds=1, cover=p.qkv / 3),
        _Trip(share=0.25, rounds=1, cover=p.qkv / 3),
        _Trip(share=0.25, rounds=1, cover=(p.qkv + p.scores) * others),
        _Trip(share=0.25, rounds=1, cover=(p.scores + p.proj + p.then) * others),
    ]


def _fastseq(p: _Pieces) -> list[_Trip]:
    # The gather under the projection of all chunks but the last; the output under what is done with the other pieces, if any.
    gather = p.size / (p.size + 1)
    others = (p.chunks - 1) / p.chunks
    return [
        _Trip(share=gather, rounds=p.size - 1, cover=p.qkv * (p.size - 1) / p.size),
        _Trip(share=1 - gather, rounds=1, cover=(p.scores + p.proj + p.then) * others),
    ]


def _ring(p: _Pieces) -> list[_Trip]:
    # Each hop under the attention to the chunk that came before it; the first also under the projection of q.
    hops = p.size - 1
    first = _Trip(share=1 / hops, rounds=1, cover=p.qkv / 3 + p.scores / p.size)
    return [first, *[_Trip(share=1 / hops, rounds=1, cover=p.scores / p.size)] * (hops - 1)]


def _usp(p: _Pieces) -> list[_Trip]:
    # Keys and values reach the inner group under the projection of q; q and the output under nothing; each hop of the ring under the
    # attention to a chunk.
    hops = p.size // p.ulysses - 1
    inner, outer = 4 * (p.ulysses - 1) / p.ulysses, 2 * hops
    unit = inner / (4 * (inner + outer))
    within = [
        _Trip(share=2 * unit, rounds=1, cover=p.qkv / 3),
        _Trip(share=unit, rounds=1, cover=0.0),
        _Trip(share=unit, rounds=1, cover=0.0),
    ]
    around = [_Trip(share=2 / (inner + outer), rounds=1, cover=p.scores / (hops + 1))] * hops
    return (within if inner else []) + around


def _allgather(p: _Pieces) -> list[_Trip]:
    # Blocking by definition.
    return [_Trip(share=0.5, rounds=1, cover=0.0)] * 2


_TRIPS: dict[str, Callable[[_Pieces], list[_Trip]]] = {
    "dsp": _dsp,
    "ulysses": _ulysses,
    "fastseq": _fastseq,
    "ring": _ring,
    "usp": _usp,
}
"""Of a scheme that isn't here nothing is known to be hidden."""


class _Seat(Exchange):
    """A place in a group that nobody has made: enough to ask a formula for its bytes."""

    def __init__(self, *, rank: int, size: int) -> None:
        self.rank, self.size = rank, size


def predict(work: Workload, scheme: str, degree: int, network: Network, *, sp: SpConfig) -> Prediction:
    """Seconds of a step under a scheme over ``degree`` ranks.

    Args:
        sp: Overlap, chunks and the inner axis.
    """
    cost, grid = work.cost, work.grid
    runs = work.accum * work.batch
    passes = 4 if work.recompute else 3  # backward is twice the forward, and runs it once more where nothing was stored
    by_rows = shards_rows(grid, size=degree)
    sizes = split_sizes(grid.h if by_rows else grid.t, degree)
    share = sizes[0] / sum(sizes)
    per_rank = (cost.flops - cost.replicated_flops) * share + cost.replicated_flops
    compute = runs * passes * per_rank / network.flops_per_s
    there = back = exposed = 0.0
    if degree > 1:
        axis = Axis.JOINT if cost.joint else Axis.SPACE if by_rows else Axis.TIME
        pieces = _pieces(work, axis, degree=degree, share=share, sp=sp)
        if scheme == "dsp":
            # The crossing attention is computed by the owner of a sequence, and some ranks own more: all of an image's one frame is one's.
            sequences = grid.t if by_rows else grid.h * grid.w
            owned = split_sizes(sequences, degree)[0] / sequences
            more = max(0.0, owned / share - 1) * (pieces.qkv + pieces.scores + pieces.proj)
            compute += work.accum * cost.blocks * passes * more / network.flops_per_s
        trips = _TRIPS.get(scheme, _allgather)(pieces)
        forward, backward = _bytes(work, scheme, axis, by_rows=by_rows, sizes=sizes, sp=sp)
        rounds = sum(t.rounds for t in trips)
        there = forward / network.bytes_per_s + rounds * network.latency_s
        back = backward / network.bytes_per_s + rounds * network.latency_s
        hides = 1 if sp.overlap else 0
        exposed = sum(
            max(0.0, t.share * sent / network.bytes_per_s + t.rounds * network.latency_s - hides * cover / network.flops_per_s)
            for t in trips
            for sent, cover in ((forward, t.cover), (backward, 2 * t.cover))
        )
    layers = work.accum * cost.blocks
    return Prediction(
        scheme=scheme,
        degree=degree,
        compute_s=compute,
        communication_s=layers * (there + back),
        exposed_s=layers * exposed,
        step_s=compute + layers * exposed,
    )


def _pieces(work: Workload, axis: Axis, *, degree: int, share: float, sp: SpConfig) -> _Pieces:
    grid, width = work.grid, work.cost.width
    tokens = work.batch * grid.volume * share
    places = grid.h * grid.w
    length = {Axis.TIME: grid.t, Axis.SPACE: places, Axis.JOINT: grid.volume}[axis]
    other = {Axis.TIME: places, Axis.SPACE: grid.t, Axis.JOINT: 0}[axis]
    # By frames the attention over space comes before the one that crosses; by rows the one over time comes after, as ``then`` does.
    local = tokens * (8 * width**2 + 4 * other * width) if other else 0.0
    return _Pieces(
        size=degree,
        qkv=6 * width**2 * tokens,
        scores=4 * length * width * tokens,
        proj=2 * width**2 * tokens,
        before=local if axis is Axis.TIME else 0.0,
        then=work.batch * work.cost.then_flops * share if axis is not Axis.SPACE else 0.0,
        ulysses=_inner(sp, degree),
        chunks=1 if axis is Axis.JOINT else sp.chunks,  # one sequence a sample, which nothing cuts
    )


def _inner(sp: SpConfig, degree: int) -> int:
    """Size of the inner axis among ``degree`` ranks, as ``build_mesh`` makes it."""
    return sp.ulysses if sp.ulysses is not None and degree == sp.degree else degree


def _bytes(work: Workload, scheme: str, axis: Axis, *, by_rows: bool, sizes: Sequence[int], sp: SpConfig) -> tuple[int, int]:
    """Most that a rank sends in one crossing attention, forward and backward; by the scheme's own formula."""
    size, inner = len(sizes), _inner(sp, len(sizes))
    made = SCHEMES[scheme](sp)
    most = (0, 0)
    for rank in range(size):
        links = Links(
            sp=_Seat(rank=rank, size=size),
            ring=_Seat(rank=rank // inner, size=size // inner),
            ulysses=_Seat(rank=rank % inner, size=inner),
        )
        shard = Shard(grid=work.grid, by_rows=by_rows, sizes=tuple(sizes), scheme=made, local=Local(), links=links)
        sent = made.bytes_sent(shard, axis, batch=work.batch, width=work.cost.width, element_bytes=work.element_bytes)
        most = (max(most[0], sent.forward), max(most[1], sent.backward))
    return most
