"""Who holds what: the axes of the mesh, and each rank's place on them. Arithmetic only; no process group is needed."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

import torch
from torch import Tensor


class AxisName(StrEnum):
    """Axes of the device mesh, outermost first."""

    DP_REPLICATE = "dp_replicate"  # ranks that hold copies
    DP_SHARD = "dp_shard"  # ranks that hold shards of one copy, and see different samples
    RING = "ring"  # groups of ulysses ranks that share a sample
    ULYSSES = "ulysses"  # ranks that share a sample, next to each other
    TP = "tp"  # ranks that share the linears of every block, and hold the same tokens; innermost, as they talk most


_HOLDS = {
    AxisName.DP_REPLICATE: "copies of all parameters; other samples",
    AxisName.DP_SHARD: "shards of one copy; other samples",
    AxisName.RING: "shards of one copy; parts of the same samples",
    AxisName.ULYSSES: "shards of one copy; parts of the same samples",
    AxisName.TP: "other heads and hidden units; the same tokens",
}
_MOST_ROWS = 16


@dataclass(frozen=True, kw_only=True)
class Places:
    """The sizes of the axes."""

    dp_replicate: int
    dp_shard: int
    ring: int
    ulysses: int
    tp: int

    @property
    def sizes(self) -> dict[AxisName, int]:
        """Outermost first."""
        return {name: getattr(self, name) for name in AxisName}

    @property
    def world(self) -> int:
        """All ranks."""
        return self.dp_replicate * self.dp_shard * self.ring * self.ulysses * self.tp

    @property
    def shards(self) -> int:
        """Ranks over which a copy of the parameters (with ``tp``: of this rank's part of them) is spread."""
        return self.dp_shard * self.ring * self.ulysses

    @property
    def ranks(self) -> Tensor:
        """[dp_replicate, dp_shard, ring, ulysses, tp]."""
        return torch.arange(self.world).view(*self.sizes.values())

    def table(self) -> str:
        """The axes and, for up to 16 ranks, what each rank holds; for more, the first and last ones."""
        stride = self.world
        axes: list[tuple[str, ...]] = [("axis", "size", "next rank", "ranks along it hold")]
        for name, size in self.sizes.items():
            stride //= size
            axes.append((name, str(size), f"+{stride}" if size > 1 else "-", _HOLDS[name] if size > 1 else "-"))
        shown = range(self.world) if self.world <= _MOST_ROWS else [*range(_MOST_ROWS - 4), *range(self.world - 4, self.world)]
        rows: list[tuple[str, ...]] = [("rank", "samples", "part of a sample", "linears", "shard of parameters", "copy")]
        rows += [self._row(rank) for rank in shown]
        text = _columns(rows)
        if self.world > _MOST_ROWS:
            text.insert(_MOST_ROWS - 3, f"... {self.world - _MOST_ROWS} more ranks")
        return "\n".join([*_columns(axes), "", *text])

    def _row(self, rank: int) -> tuple[str, ...]:
        replicate, shard, ring, ulysses, tp = (
            int(i) for i in torch.unravel_index(torch.tensor(rank), tuple(self.sizes.values()))
        )
        sp = self.ring * self.ulysses
        part = ring * self.ulysses + ulysses
        where = f" (ring {ring}, ulysses {ulysses})" if self.ring > 1 and self.ulysses > 1 else ""
        return (
            str(rank),
            _of(replicate * self.dp_shard + shard, self.dp_replicate * self.dp_shard),
            _of(part, sp) + where,
            _of(tp, self.tp),
            _of(shard * sp + part, self.shards),
            _of(replicate, self.dp_replicate),
        )

    def __str__(self) -> str:
        axes = [f"{name} {size}" for name, size in self.sizes.items() if size > 1 or name == AxisName.DP_SHARD]
        return " x ".join(axes)


def _of(index: int, count: int) -> str:
    return f"{index} of {count}" if count > 1 else "all"


def _columns(rows: list[tuple[str, ...]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
