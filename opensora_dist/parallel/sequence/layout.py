"""Which part of which samples is whose, for every shape that a run meets."""

from __future__ import annotations

from collections.abc import Callable

from opensora_dist.config.train import SpConfig
from opensora_dist.core.types import Share, Thw
from opensora_dist.parallel.mesh import Mesh
from opensora_dist.parallel.sequence.base import Shard, split_sizes
from opensora_dist.parallel.sequence.local import Local, whole
from opensora_dist.parallel.sequence.registry import SCHEMES

Choose = Callable[[Thw], tuple[str, int]]
"""From a token grid to a scheme's name and the number of ranks that share a sample."""


class SequenceParallel:
    """The shards of one rank.

    Args:
        choose: Scheme and degree for a token grid; None takes the config's for every grid.
    """

    def __init__(self, mesh: Mesh, sp: SpConfig, *, choose: Choose | None = None) -> None:
        assert choose is not None or sp.scheme != "auto" or sp.degree == 1  # where there is nothing to choose
        self._mesh, self._sp = mesh, sp
        self._choose = choose or (lambda _grid: (sp.scheme, sp.degree))
        self._shards: dict[Thw, Shard] = {}

    def shard(self, grid: Thw) -> Shard:
        """This rank's part of samples of a token grid."""
        if grid not in self._shards:
            name, degree = self._choose(grid)
            self._shards[grid] = self._make(grid, name=name, degree=degree)
        return self._shards[grid]

    def share(self, grid: Thw, *, patch: Thw) -> Share:
        """Which samples of a batch, and which latents of each, are this rank's."""
        shard = self.shard(grid)
        degree = len(shard.sizes)
        return Share(self._mesh.token_rank // degree, self._mesh.token_ranks // degree, shard.region.times(patch))

    def _make(self, grid: Thw, *, name: str, degree: int) -> Shard:
        if degree == 1:
            return whole(grid)
        by_rows, sizes = cut(grid, size=degree)
        return Shard(
            grid=grid,
            by_rows=by_rows,
            sizes=sizes,
            scheme=SCHEMES[name](self._sp),
            local=Local(),
            links=self._mesh.links[degree],
        )


def describe_shard(shard: Shard) -> str:
    """How samples of a shape are spread, for logs: ``dsp over 4 ranks, 5 or 4 of 18 frames each``."""
    if len(shard.sizes) == 1:
        return "whole on each rank"
    each = " or ".join(str(size) for size in sorted(set(shard.sizes), reverse=True))
    what = f"{shard.grid.h} rows" if shard.by_rows else f"{shard.grid.t} frames"
    return f"{shard.scheme.name} over {len(shard.sizes)} ranks, {each} of {what} of tokens each"


def cut(grid: Thw, *, size: int) -> tuple[bool, tuple[int, ...]]:
    """Whether a sample is cut into rows, and the frames or rows of each of ``size`` ranks."""
    by_rows = grid.t < size  # frames are fewer than the ranks
    return by_rows, split_sizes(grid.h if by_rows else grid.t, size)


def scheme_problems(sp: SpConfig, grid: Thw, *, heads: int, joint: bool) -> list[str]:
    """What keeps a sample of this token grid from being shared by ``sp.degree`` ranks, each with a way out."""
    if sp.degree == 1:
        return []
    name, degree = "degree", sp.degree
    if sp.scheme == "auto" and sp.min_degree is not None:
        name, degree = "min_degree", sp.min_degree
    if max(grid.t, grid.h) < degree:
        return [
            f"parallel.sp.{name}={degree}: {grid} tokens have fewer frames and fewer rows than that; "
            f"use parallel.sp.{name}={max(grid.t, grid.h)} or less"
        ]
    if sp.scheme == "auto":
        return []
    return SCHEMES[sp.scheme](sp).problems(grid, size=sp.degree, heads=heads, joint=joint)
