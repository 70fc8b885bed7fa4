"""Pieces of flattened parameters, as some backends cut them, to rows of whole tensors and back."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor._dtensor_spec import DTensorSpec, TensorMeta

from opensora_dist.parallel.gather import gather_text


@dataclass(frozen=True, kw_only=True)
class Span:
    """Elements ``start`` to ``stop`` of a flattened parameter; none where they are equal."""

    start: int
    stop: int

    @property
    def size(self) -> int:
        """How many."""
        return self.stop - self.start

    def __and__(self, other: Span) -> Span:
        start = max(self.start, other.start)
        return Span(start=start, stop=max(start, min(self.stop, other.stop)))


class Fragments:
    """Moves what each rank holds of each parameter into DTensors sharded by rows, and back, in one all-to-all.

    Args:
        spans: What this rank holds, by canonical name, the same names on every rank.
        shapes: Of the whole parameters.
        mesh: The ranks among which the fragments are spread. Its group must take CPU tensors.
    """

    def __init__(self, spans: Mapping[str, Span], *, shapes: Mapping[str, torch.Size], mesh: DeviceMesh) -> None:
        self._group, self._mesh, self._shapes = mesh.get_group(), mesh, dict(shapes)
        self._rank, self._size = dist.get_rank(self._group), dist.get_world_size(self._group)
        texts = gather_text(json.dumps({name: (span.start, span.stop) for name, span in spans.items()}), group=self._group)
        self._held = [{name: Span(start=start, stop=stop) for name, (start, stop) in json.loads(t).items()} for t in texts]
        for name, shape in shapes.items():
            held = sum(spans[name].size for spans in self._held)
            assert held == math.prod(shape), f"{name}: {held} elements are held, of {tuple(shape)}"
        self._rows = [{name: _rows(shape, rank, self._size) for name, shape in shapes.items()} for rank in range(self._size)]

    def to_rows(self, fragments: Mapping[str, Tensor]) -> dict[str, DTensor]:
        """Whole tensors, sharded on dim 0 as DTensor does it; copies, no larger than the fragments. Collective."""
        flat = self._move(fragments, self._held, self._rows)
        rows = {}
        for name, part in flat.items():
            shape = self._shapes[name]
            local = part.view(-1, *shape[1:]) if part.numel() else part.new_empty((0, *shape[1:]))
            meta = TensorMeta(shape=shape, stride=torch.empty(shape, device="meta").stride(), dtype=local.dtype)
            # Not by from_local, which would move what lies in CPU memory to the mesh's device.
            spec = DTensorSpec(self._mesh, (Shard(0),), tensor_meta=meta)
            rows[name] = DTensor(local, spec, requires_grad=False)  # type: ignore[no-untyped-call]
        return rows

    def from_rows(self, rows: Mapping[str, Tensor], fragments: Mapping[str, Tensor]) -> None:
        """Fills ``fragments`` from DTensors laid out as ``to_rows`` gives them. Collective."""
        flat = {name: t.to_local().flatten() for name, t in rows.items() if isinstance(t, DTensor)}
        for name, part in self._move(flat, self._rows, self._held).items():
            fragments[name].copy_(part)

    def _move(self, parts: Mapping[str, Tensor], held: list[dict[str, Span]], wanted: list[dict[str, Span]]) -> dict[str, Tensor]:
        """From what ranks hold to what they want of each parameter, all in one exchange."""
        mine = wanted[self._rank]
        send = [self._cut(parts, held[self._rank], wanted[to]) for to in range(self._size)]
        came = [(name, held[source][name] & mine[name]) for source in range(self._size) for name in self._shapes]
        each = len(self._shapes)
        sizes = [sum(span.size for _, span in came[i : i + each]) for i in range(0, len(came), each)]
        buffer = torch.cat([piece for pieces in send for piece in pieces])
        received = buffer.new_empty(sum(sizes))
        dist.all_to_all_single(
            received,
            buffer,
            output_split_sizes=sizes,
            input_split_sizes=[sum(piece.numel() for piece in pieces) for pieces in send],
            group=self._group,
        )
        whole = {name: received.new_empty(span.size) for name, span in mine.items()}
        at = 0
        for name, span in came:
            whole[name][span.start - mine[name].start : span.stop - mine[name].start] = received[at : at + span.size]
            at += span.size
        return whole

    def _cut(self, parts: Mapping[str, Tensor], held: Mapping[str, Span], wanted: Mapping[str, Span]) -> list[Tensor]:
        """The pieces of this rank's parts that another wants, one of each parameter, perhaps empty."""
        cut = []
        for name in self._shapes:
            span = held[name] & wanted[name]
            cut.append(parts[name].flatten()[span.start - held[name].start : span.stop - held[name].start])
        return cut


def _rows(shape: torch.Size, rank: int, size: int) -> Span:
    """The elements of the rows that a rank has of a DTensor sharded on dim 0: those of ``torch.chunk``."""
    row, each = math.prod(shape[1:]), -(-shape[0] // size)
    return Span(start=min(rank * each, shape[0]) * row, stop=min((rank + 1) * each, shape[0]) * row)
