"""USP: all-to-all over heads within an inner group, ring attention across groups."""

# B batch, T frames, S tokens per frame, D width, N heads, n of one rank of the inner group, K head dim, G sequences; u ranks of the
# inner group, l (t): a sequence's positions on this rank, L: those on its inner group

from __future__ import annotations

from collections.abc import Sequence
from math import gcd

from torch import Tensor

from opensora_dist.core.types import Axis, Thw
from opensora_dist.parallel.sequence.base import Projections, Scheme, Shard, Traffic, from_sequences
from opensora_dist.parallel.sequence.messages import QkvMessages, project_home, rows_of
from opensora_dist.parallel.sequence.ring import Rotation, ring_traffic
from opensora_dist.parallel.sequence.transfer import Transfer


class Usp(Scheme):
    """Ulysses among the consecutive ranks of an inner group, a ring of the ranks that have the same place in theirs.

    Source: USP, arXiv 2405.07719.

    Args:
        ulysses: Ranks of an inner group where ``degree`` ranks share a sample; where fewer do, all of them are one group.
        degree: Most ranks that share a sample.
        overlap: False waits as soon as anything is sent.
    """

    name = "usp"

    def __init__(self, *, ulysses: int, degree: int, overlap: bool) -> None:
        self._ulysses, self._degree, self._overlap = ulysses, degree, overlap

    def problems(self, grid: Thw, *, size: int, heads: int, joint: bool) -> list[str]:
        u = self._ulysses if size == self._degree else size  # as parallel.mesh makes the groups
        if heads % u == size % u == 0:
            return []
        common = gcd(size, heads)
        fitting = [str(n) for n in range(1, common + 1) if common % n == 0]
        without = "parallel.sp.scheme=ring" if joint else "parallel.sp.scheme=dsp or ring"
        return [
            f"parallel.sp.ulysses={u} must divide model.heads={heads} and parallel.sp.degree={size}; "
            f"use one of {', '.join(fitting)}, or {without}, which has no such rule"
        ]

    def bytes_sent(self, shard: Shard, axis: Axis, *, batch: int, width: int, element_bytes: int) -> Traffic:
        assert shard.links is not None
        u, place = shard.links.ulysses.size, shard.links.ulysses.rank
        inner, outer = _inner_lengths(shard, axis), _outer_lengths(shard, axis)
        sequences = shard.num_sequences(axis, batch=batch)
        row = width // u * sequences * element_bytes  # one position, with the heads of one rank
        own, others = inner[place] * (u - 1) * row, (sum(inner) - inner[place]) * row
        around = ring_traffic(
            outer, rank=shard.links.ring.rank, row_elements=2 * width // u * sequences, element_bytes=element_bytes
        )
        # q, k and v of the own positions go to the others, the output of theirs goes back; in backward the other way round.
        return Traffic(forward=3 * own + others + around.forward, backward=own + 3 * others + around.backward)

    def attend(self, attn: Projections, x_BtsD: Tensor, axis: Axis, shard: Shard) -> Tensor:
        links = shard.links
        assert links is not None
        u, inner = links.ulysses.size, _inner_lengths(shard, axis)
        x = rows_of(x_BtsD, axis)  # [l, G.., D]
        L, n, K = sum(inner), attn.heads // u, attn.head_dim
        outgoing = [len(x)] * u

        def transfer(send_rows: Sequence[int], recv_rows: Sequence[int]) -> Transfer:
            return Transfer(links.ulysses, send_rows=send_rows, recv_rows=recv_rows, overlap=self._overlap, tape=shard.tape)

        rotation = Rotation(
            links.ring, lengths=_outer_lengths(shard, axis), position_dim=0, overlap=self._overlap, tape=shard.tape
        )
        source = QkvMessages(attn, ranks=u, tape=shard.tape).source(x.flatten(1, -2))
        # Keys and values leave while queries are projected, and set out on the ring while queries are on their way.
        kv_there, q_there, back = transfer(outgoing, inner), transfer(outgoing, inner), transfer(inner, outgoing)
        kv_arriving = kv_there.issue(source.write(parts=slice(1, 3)))
        q_arriving = q_there.issue(source.write(parts=slice(1)))
        kv_LG2nK = rotation.depart(kv_there.wait(kv_arriving).view(L, -1, 2, n, K))
        q_GnLK = q_there.wait(q_arriving).view(L, -1, n, K).permute(1, 2, 0, 3)
        out_GnLK = rotation.attend(q_GnLK, kv_LG2nK)
        out_RGC = back.wait(back.issue(out_GnLK.permute(2, 0, 1, 3).reshape(L, -1, n * K)))
        y_lGD = project_home(attn.proj, [out_RGC], ranks=u)
        return from_sequences(y_lGD.view(x.shape), axis, like=x_BtsD)


def _inner_lengths(shard: Shard, axis: Axis) -> tuple[int, ...]:
    """Positions on each rank of this rank's inner group."""
    assert shard.links is not None
    u = shard.links.ulysses.size
    start = shard.links.ring.rank * u
    return shard.lengths(axis)[start : start + u]


def _outer_lengths(shard: Shard, axis: Axis) -> tuple[int, ...]:
    """Positions of each inner group."""
    assert shard.links is not None
    u, lengths = shard.links.ulysses.size, shard.lengths(axis)
    return tuple(sum(lengths[start : start + u]) for start in range(0, len(lengths), u))
