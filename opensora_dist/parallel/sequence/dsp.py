"""DSP: the residual stays sharded; tokens change rank for the one attention that crosses the sharded dim, and come back."""

# B batch, T frames, S places, D width, N heads, K head dim; t, s: those of this rank

from __future__ import annotations

import torch
from torch import Tensor

from opensora_dist.core.types import Axis, Thw
from opensora_dist.parallel.sequence.base import Projections, Scheme, Shard, Traffic, split_sizes
from opensora_dist.parallel.sequence.local import self_attention
from opensora_dist.parallel.sequence.transfer import Transfer


class Dsp(Scheme):
    """Dynamic sequence parallelism.

    Source: DSP, arXiv 2403.10266.
    """

    name = "dsp"

    def __init__(self, *, overlap: bool, chunks: int) -> None:
        self._overlap, self._chunks = overlap, chunks

    def problems(self, grid: Thw, *, size: int, heads: int, joint: bool) -> list[str]:
        if joint:
            return [
                "parallel.sp.scheme=dsp needs attention in two parts, over space and over time, and model.name=dit attends over both "
                "at once; use parallel.sp.scheme=ulysses or ring, or model.name=stdit"
            ]
        return []

    def bytes_sent(self, shard: Shard, axis: Axis, *, batch: int, width: int, element_bytes: int) -> Traffic:
        lengths, rank = shard.lengths(axis), shard.rank
        owned = split_sizes(shard.num_sequences(axis, batch=1), len(lengths))
        # To the owners of the sequences, and back the output of the sequences owned here.
        tokens = lengths[rank] * (sum(owned) - owned[rank]) + (sum(lengths) - lengths[rank]) * owned[rank]
        sent = batch * tokens * width * element_bytes
        return Traffic(forward=sent, backward=sent)

    def attend(self, attn: Projections, x_BtsD: Tensor, axis: Axis, shard: Shard) -> Tensor:
        assert shard.links is not None
        x = x_BtsD if axis is Axis.TIME else x_BtsD.transpose(1, 2)
        B, t, S, D = x.shape
        lengths = shard.lengths(axis)
        owned = split_sizes(S, len(lengths))
        rank = shard.links.sp.rank
        rows_out = [t * B * s for s in owned]
        rows_in = [n * B * owned[rank] for n in lengths]
        there = Transfer(shard.links.sp, send_rows=rows_out, recv_rows=rows_in, overlap=False, tape=shard.tape)
        sent = torch.cat([p.transpose(0, 1).reshape(-1, D) for p in torch.split(x, owned, dim=2)])
        got = there.wait(there.issue(sent)).view(sum(lengths), B * owned[rank], D)
        out = self_attention(attn, got.transpose(0, 1)).transpose(0, 1).reshape(-1, D)
        back = Transfer(shard.links.sp, send_rows=rows_in, recv_rows=rows_out, overlap=False, tape=shard.tape)
        out = back.wait(back.issue(out))
        parts = [p.view(t, B, s, D).transpose(0, 1) for p, s in zip(torch.split(out, rows_out), owned)]
        y = torch.cat(parts, dim=2)
        return y if axis is Axis.TIME else y.transpose(1, 2)
