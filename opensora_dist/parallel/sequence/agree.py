"""Ranks that share a sample make sure that they are about to do the same thing, before a collective of theirs can hang."""

# P ranks, F fields

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from typing import get_args

import torch
import torch.distributed as dist
import xxhash

from opensora_dist.config.train import SpConfig
from opensora_dist.core.errors import CommunicationError
from opensora_dist.core.types import Thw
from opensora_dist.parallel.mesh import Mesh
from opensora_dist.parallel.sequence.base import Shard

_SCHEMES = ("local", *get_args(SpConfig.model_fields["scheme"].annotation))
_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


@dataclass(frozen=True, kw_only=True)
class Intent:
    """What a rank is about to do with one micro-batch, alone or as a part of a pack.

    Args:
        step: Which step it is of.
        digest: Identity of the global batch.
        samples: Ids of the samples of the micro-batch.
        latent: Latent shape of the whole samples.
        part: Frames, rows and columns of the latents at hand.
        text_tokens: Of the padded captions.
        dtype: Of the latents.
        shard: This rank's part of the tokens.
        patch: Latents of a token.
        num_bad: Samples that this rank could not read. Ranks may differ in it, as in the part.
    """

    step: int
    digest: str
    samples: Sequence[int]
    latent: Thw
    part: Thw
    text_tokens: int
    dtype: torch.dtype
    shard: Shard
    patch: Thw
    num_bad: int = 0

    def row(self) -> list[int]:
        """As numbers, in the order of ``_FIELDS``; read off the host's own values, so that no device is waited for."""
        scheme, grid = _SCHEMES.index(self.shard.scheme.name), self.shard.grid
        batch = [self.step, _hash(self.digest), _hash(repr(tuple(self.samples))), len(self.samples)]
        layout = [scheme, len(self.shard.sizes), int(self.shard.by_rows), *grid]
        return [*batch, *self.latent, self.text_tokens, _DTYPES.index(self.dtype), *layout, *self.part, self.num_bad]


def _hash(text: str) -> int:
    return xxhash.xxh3_64_intdigest(text.encode()) >> 1  # a positive int64


def _plain(value: int) -> str:
    return str(value)


def _digest(value: int) -> str:
    return f"{value:016x}"


_FIELDS = {
    "step": _plain,
    "global batch": _digest,
    "samples": _digest,
    "number of samples": _plain,
    "latent frames": _plain,
    "latent rows": _plain,
    "latent columns": _plain,
    "text tokens": _plain,
    "dtype": lambda value: str(_DTYPES[value]).removeprefix("torch."),
    "scheme": lambda value: _SCHEMES[value],
    "degree": _plain,
    "cut into": lambda value: "rows" if value else "frames",
    "token frames": _plain,
    "token rows": _plain,
    "token columns": _plain,
}
_PART = slice(len(_FIELDS), len(_FIELDS) + 3)


class Agreement:
    """The check, for the ranks that share samples with this one."""

    def __init__(self, mesh: Mesh) -> None:
        self._group, self._tp = mesh.sp_control, mesh.tp_size
        self._ranks: list[int] = dist.get_process_group_ranks(mesh.sp_control)

    def check(self, intents: Sequence[Intent]) -> list[bool]:
        """Compares what every rank of the group is about to do. Collective over them; nothing is sent where a sample has one rank.

        Args:
            intents: Of what is run at once: one micro-batch, or the parts of a pack.
        Returns:
            Of which any of them has samples that it could not read; for each of these all must call ``bad_anywhere``.
        Raises:
            CommunicationError: On every rank alike, with the values of each.
        """
        if len(self._ranks) == 1:
            return [intent.num_bad > 0 for intent in intents]
        rows = [intent.row() for intent in intents]
        # The first, with how many there are: as long on every rank, whatever each is about to do. The others only once that is alike.
        heads = self._gather([len(rows), *rows[0]])
        tables, counts = [[row for _, *row in heads]], [count for count, *_ in heads]
        problems = []
        if len(set(counts)) > 1:
            problems.append(self._side_by_side("shapes run at once", [str(count) for count in counts]))
        elif len(rows) > 1:
            others = torch.tensor(self._gather(list(chain(*rows[1:])))).view(len(heads), len(rows) - 1, -1)
            tables += others.transpose(0, 1).tolist()
        for part, (table, intent) in enumerate(zip(tables, intents, strict=False)):
            found = self._differences(table) or self._wrong_parts(table, intent)
            problems += [f"part {part} of a pack, {problem}" for problem in found] if max(counts) > 1 else found
        if problems:
            raise CommunicationError(
                f"ranks {self._ranks} share samples, and are about to do different things with them: {'; '.join(problems)}; "
                "every rank must run the same code with the same config on the same data: compare them across machines"
            )
        return [any(row[-1] for row in table) for table in tables]

    def _gather(self, numbers: Sequence[int]) -> list[list[int]]:
        """Those of every rank of the group, each of which must give as many."""
        mine = torch.tensor(numbers, dtype=torch.int64)
        table_PF = mine.new_empty((len(self._ranks), len(mine)))
        dist.all_gather(list(table_PF.unbind(0)), mine, group=self._group)
        table: list[list[int]] = table_PF.tolist()
        return table

    def sharing(self, shard: Shard) -> int:
        """Ranks that share the samples of a shard, those that hold the same part included."""
        return len(shard.sizes) * self._tp

    def bad_anywhere(self, bad: Sequence[bool], *, sharing: int) -> list[bool] | None:
        """Which samples any rank that shares them could not read. Collective over the group, the same number of samples on all.

        Args:
            bad: Which this rank could not read.
            sharing: Ranks that share these samples; the group may hold several such parties.
        Returns:
            None where the whole group has read everything.
        """
        mine = torch.tensor(list(bad), dtype=torch.uint8)
        table_PB = mine.new_empty((len(self._ranks), len(mine)))
        dist.all_gather(list(table_PB.unbind(0)), mine, group=self._group)
        if not table_PB.any():
            return None
        party = dist.get_rank(self._group) // sharing * sharing
        found: list[bool] = table_PB[party : party + sharing].bool().any(0).tolist()
        return found

    def answers(self, *, sharing: int) -> bool:
        """Whether this rank is the one that speaks for the samples it shares, where something is said of each once."""
        return dist.get_rank(self._group) % sharing == 0

    def _differences(self, table: list[list[int]]) -> list[str]:
        problems = []
        degree = max(row[list(_FIELDS).index("degree")] for row in table)
        for field, (name, show) in enumerate(_FIELDS.items()):
            values = [row[field] for row in table]
            # A shape may be spread over fewer ranks than the group has: then only these have the same samples.
            block = degree * self._tp if name == "samples" else len(values)
            if any(value != values[i // block * block] for i, value in enumerate(values)):
                problems.append(self._side_by_side(name, [show(value) for value in values]))
        return problems

    def _wrong_parts(self, table: list[list[int]], intent: Intent) -> list[str]:
        """Ranks whose latents don't have the shape of their part, once it is known that all mean to cut alike."""
        shard, parts = intent.shard, [Thw(*row[_PART]) for row in table]
        regions = [shard.region_of(i // self._tp % len(shard.sizes)) for i in range(len(parts))]
        wanted = [region.times(intent.patch).shape(intent.latent) for region in regions]
        if parts == wanted:
            return []
        said = [f"{part}" if part == fit else f"{part}, where {fit} is its part" for part, fit in zip(parts, wanted, strict=True)]
        return [self._side_by_side("latents at hand", said)]

    def _side_by_side(self, name: str, values: Sequence[str]) -> str:
        return f"{name}: " + ", ".join(f"rank {rank} -> {value}" for rank, value in zip(self._ranks, values, strict=True))
