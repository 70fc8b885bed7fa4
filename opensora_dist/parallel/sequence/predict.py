"""How long a step takes under a scheme: matrix products at the measured rate, and of the transfers what nothing hides.

Normalisation, optimizer and gradient sums are left out: they are the same whichever scheme is chosen.
"""

# B batch, T frames, S tokens per frame, D width, P ranks that share a sample

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from opensora_dist.config.train import SpConfig
from opensora_dist.core.types import Axis, Thw
from opensora_dist.parallel.recompute import Recompute
from opensora_dist.parallel.sequence.base import Links, Shard, split_sizes
from opensora_dist.parallel.sequence.exchange import Exchange
from opensora_dist.parallel.sequence.layout import cut
from opensora_dist.parallel.sequence.local import Local
from opensora_dist.parallel.sequence.network import Network
from opensora_dist.parallel.sequence.registry import SCHEMES
from opensora_dist.parallel.sequence.ring import GRAD_BYTES


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
        scores_flops: Of these, in all blocks, the scores and sums of attentions.
    """

    width: int
    heads: int
    joint: bool
    blocks: int
    flops: int
    replicated_flops: int
    then_flops: int
    scores_flops: int


@dataclass(frozen=True, kw_only=True)
class Workload:
    """What one group of ranks that share samples does in a micro-batch, and how often in a step.

    Args:
        grid: Tokens of a sample.
        batch: Samples of a micro-batch.
        cost: Of one sample.
        element_bytes: Of what travels.
        accum: Micro-batches of a step.
        recompute: What backward runs again.
        tp: Ranks that share the linears, each with its heads; ``cost`` is that of one of them.
        scores_cost: What a FLOP of an attention's scores and sums takes, over one of a product; ``cost`` counts it so already.
    """

    grid: Thw
    batch: int
    cost: SampleCost
    element_bytes: int
    accum: int = 1
    recompute: Recompute = "none"
    tp: int = 1
    scores_cost: float = 1.0


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
        there: Pieces of a pipeline on the way to the attention; 1 where a scheme has none.
        back: Likewise on the way back.
        heads: Pieces are heads of all tokens.
        regathers: Backward gathers once more.
        grad_width: Bytes of a gradient that is summed on its way, over those of what travels otherwise.
    """

    size: int
    qkv: float
    scores: float
    proj: float
    before: float
    then: float
    ulysses: int
    there: int
    back: int
    heads: bool
    regathers: bool
    grad_width: float


@dataclass(frozen=True, kw_only=True)
class _Trip:
    """A part of a crossing attention's traffic, in one direction, that is waited for at once.

    Args:
        units: Bytes, over those of one rank's tokens; how a direction's bytes part over its trips. How many they are is the scheme's
            own formula, which these add up to where parts are equal (a test holds them to it).
        rounds: Messages one after another.
        cover: Work that the rank has to do meanwhile, in FLOPs of a forward: in backward each is done twice.
    """

    units: float
    rounds: int
    cover: float


_Trips = tuple[list[_Trip], list[_Trip]]
"""Of forward and of backward."""


def _others(pieces: int) -> float:
    return (pieces - 1) / pieces


def _dsp(p: _Pieces) -> _Trips:
    # There, under QKV of own tokens (1/P of those here), and with more than one piece under the attention before. Back, under the
    # projection, cross-attention and MLP of own tokens, and with more than one piece under the attention of the others.
    trips = [
        _Trip(units=_others(p.size), rounds=p.there, cover=p.qkv / p.size + p.before * _others(p.there)),
        _Trip(units=_others(p.size), rounds=p.back, cover=(p.proj + p.then) / p.size + p.scores * _others(p.back)),
    ]
    return trips, trips


def _ulysses(p: _Pieces) -> _Trips:
    # q under the projection of k, k under that of v; v and the output under what is done meanwhile with the other pieces, if any. Where
    # those are heads, the output projection waits for all of them.
    after = p.scores if p.heads else p.scores + p.proj + p.then
    trips = [
        _Trip(units=_others(p.size), rounds=p.there, cover=p.qkv / 3),
        _Trip(units=_others(p.size), rounds=p.there, cover=p.qkv / 3),
        _Trip(units=_others(p.size), rounds=p.there, cover=(p.qkv + p.scores) * _others(p.there)),
        _Trip(units=_others(p.size), rounds=p.back, cover=after * _others(p.back)),
    ]
    return trips, trips


def _fastseq(p: _Pieces) -> _Trips:
    # The gather under the projection of all ranks' tokens but the last; the output under what is done with the other pieces, if any.
    hops = p.size - 1
    output = _Trip(units=_others(p.size), rounds=p.back, cover=(p.scores + p.proj + p.then) * _others(p.back))
    around = _Trip(units=hops, rounds=hops * p.there, cover=p.qkv * _others(p.size))
    if not p.regathers:
        return [around, output], [around, output]
    # Backward sends the first hop of x again before all else, and the rest of them beside the sums of dx, one message after another.
    first = _Trip(units=1, rounds=p.there, cover=p.scores + p.proj + p.then)
    return [around, output], [first, output, _Trip(units=2 * hops - 1, rounds=hops * p.there, cover=p.qkv * _others(p.size))]


def _ring(p: _Pieces) -> _Trips:
    # Each hop under the attention to the chunk that came before it; the first also under the projection of q. In backward the gradient
    # of keys and values follows them.
    hops = p.size - 1

    def around(units: float) -> list[_Trip]:
        first = _Trip(units=units, rounds=1, cover=p.qkv / 3 + p.scores / p.size)
        return [first, *[_Trip(units=units, rounds=1, cover=p.scores / p.size)] * (hops - 1)]

    return around(2), around(2 + 2 * p.grad_width)


def _usp(p: _Pieces) -> _Trips:
    # Keys and values reach the inner group under the projection of q; q and the output under nothing; each hop of the ring under the
    # attention to a chunk.
    hops, each = p.size // p.ulysses - 1, _others(p.ulysses)
    bare = _Trip(units=each, rounds=1, cover=0.0)
    within = [_Trip(units=2 * each, rounds=1, cover=p.qkv / 3), bare, bare] if each else []

    def around(units: float) -> list[_Trip]:
        return [*within, *[_Trip(units=units, rounds=1, cover=p.scores / (hops + 1))] * hops]

    return around(2), around(2 + 2 * p.grad_width)


def _allgather(p: _Pieces) -> _Trips:
    # Blocking by definition; backward gathers once more.
    trip = _Trip(units=p.size - 1, rounds=1, cover=0.0)
    return [trip] * 2, [trip] * 3


_TRIPS: dict[str, Callable[[_Pieces], _Trips]] = {
    "dsp": _dsp,
    "ulysses": _ulysses,
    "fastseq": _fastseq,
    "ring": _ring,
    "usp": _usp,
    "allgather": _allgather,
}


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
    # Backward is twice the forward, and runs once more what was not stored.
    again = {"none": 0.0, "selective": 1 - cost.scores_flops / cost.flops, "full": 1.0}[work.recompute]
    passes = 3 + again
    by_rows, sizes = cut(grid, size=degree)
    share = sizes[0] / sum(sizes)
    per_rank = (cost.flops - cost.replicated_flops) * share + cost.replicated_flops
    compute = runs * passes * per_rank / network.flops_per_s
    communication = exposed = 0.0
    if degree > 1:
        axis = Axis.JOINT if cost.joint else Axis.SPACE if by_rows else Axis.TIME
        shards = _shards(work, scheme, by_rows=by_rows, sizes=sizes, sp=sp)
        pieces = _pieces(work, axis, shards[0], share=share, sp=sp)
        if scheme == "dsp":
            # The crossing attention is computed by the owner of a sequence, and some ranks own more: all of an image's one frame is one's.
            sequences = shards[0].num_sequences(axis, batch=1)
            owned = split_sizes(sequences, degree)[0] / sequences
            more = max(0.0, owned / share - 1) * (pieces.qkv + pieces.scores + pieces.proj)
            compute += work.accum * cost.blocks * passes * more / network.flops_per_s
        forward, backward = _TRIPS[scheme](pieces)
        sent_forward, sent_backward = _bytes(work, axis, shards)
        for trips, sent, times in ((forward, sent_forward, 1), (backward, sent_backward, 2)):
            units = sum(trip.units for trip in trips)
            for trip in trips:
                takes = sent * trip.units / units / network.bytes_per_s + trip.rounds * network.latency_s
                communication += takes
                exposed += max(0.0, takes - (times * trip.cover / network.flops_per_s if sp.overlap else 0.0))
    layers = work.accum * cost.blocks
    return Prediction(
        scheme=scheme,
        degree=degree,
        compute_s=compute,
        communication_s=layers * communication,
        exposed_s=layers * exposed,
        step_s=compute + layers * exposed,
    )


def _pieces(work: Workload, axis: Axis, shard: Shard, *, share: float, sp: SpConfig) -> _Pieces:
    grid, width, degree = work.grid, work.cost.width, len(shard.sizes)
    tokens = work.batch * grid.volume * share
    places = grid.h * grid.w
    length = {Axis.TIME: grid.t, Axis.SPACE: places, Axis.JOINT: grid.volume}[axis]
    other = {Axis.TIME: places, Axis.SPACE: grid.t, Axis.JOINT: 0}[axis]
    # By frames the attention over space comes before the one that crosses; by rows the one over time comes after, as ``then`` does.
    local = tokens * (8 * width**2 + 4 * other * width) / work.tp if other else 0.0
    there, back = _chunks(work, axis, shard, sp=sp)
    return _Pieces(
        size=degree,
        qkv=6 * width**2 * tokens / work.tp,
        scores=4 * length * width * tokens / work.tp * work.scores_cost,
        proj=2 * width**2 * tokens / work.tp,
        before=local if axis is Axis.TIME else 0.0,
        then=work.batch * work.cost.then_flops * share if axis is not Axis.SPACE else 0.0,
        ulysses=_inner(sp, degree),
        there=there,
        back=back,
        heads=axis is Axis.JOINT,
        regathers=sp.fastseq_dw == "gather",
        grad_width=max(GRAD_BYTES, work.element_bytes) / work.element_bytes,
    )


def _chunks(work: Workload, axis: Axis, shard: Shard, *, sp: SpConfig) -> tuple[int, int]:
    """Pieces of a pipeline on the way there and back: no more than there are things to part, as the schemes have it."""
    if not sp.overlap:
        return 1, 1
    if shard.scheme.name == "dsp":
        owned = split_sizes(shard.num_sequences(axis, batch=1), len(shard.sizes))
        return min(sp.chunks, *shard.lengths(axis)), max(1, min(sp.chunks, *owned))
    if axis is not Axis.JOINT:
        pieces = min(sp.chunks, shard.num_sequences(axis, batch=1))
    elif shard.scheme.name == "ulysses":
        pieces = min(sp.chunks, work.cost.heads // work.tp // len(shard.sizes))
    else:  # one sequence a sample, which fastseq doesn't cut
        pieces = 1
    return pieces, pieces


def _inner(sp: SpConfig, degree: int) -> int:
    """Size of the inner axis among ``degree`` ranks, as ``build_mesh`` makes it."""
    return sp.ulysses if sp.ulysses is not None and degree == sp.degree else degree


def _shards(work: Workload, scheme: str, *, by_rows: bool, sizes: tuple[int, ...], sp: SpConfig) -> list[Shard]:
    """Of every rank."""
    size, inner = len(sizes), _inner(sp, len(sizes))
    made = SCHEMES[scheme](sp)
    return [
        Shard(
            grid=work.grid,
            by_rows=by_rows,
            sizes=sizes,
            scheme=made,
            local=Local(),
            links=Links(
                sp=_Seat(rank=rank, size=size),
                ring=_Seat(rank=rank // inner, size=size // inner),
                ulysses=_Seat(rank=rank % inner, size=inner),
            ),
        )
        for rank in range(size)
    ]


def _bytes(work: Workload, axis: Axis, shards: Sequence[Shard]) -> tuple[int, int]:
    """Most that a rank sends in one crossing attention, forward and backward; by the scheme's own formula.

    Each rank of ``tp`` sends its heads alone, but under schemes that send tokens (fastseq's outputs are heads, which is left out).
    """
    width = work.cost.width // work.tp if shards[0].scheme.name in ("ulysses", "ring", "usp") else work.cost.width
    sent = [
        shard.scheme.bytes_sent(shard, axis, batch=work.batch, width=width, element_bytes=work.element_bytes) for shard in shards
    ]
    return max(s.forward for s in sent), max(s.backward for s in sent)
