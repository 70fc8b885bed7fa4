"""A rank that is slower than the others, named.

In training every step takes as long as its slowest rank's, on all ranks, so step times tell nothing. What is measured instead waits for
nobody: the forward of one linear layer of the first block, by CUDA events on a GPU, and the wait for data.

What it can't see: a rank whose slowness is not in such work (its network card, a part of the GPU that a matrix product doesn't use); one
that is slow for fewer than ten of twenty steps; ranks that are all alike slow; and, where a block is one compiled graph, what is inside
of it. On CPUs that other programs share it sees those.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import torch
import torch.distributed as dist
from torch import Tensor, nn

WINDOW: Final = 20


class Probe:
    """Times every forward of ``module``, without a wait for the device; but for those within a compiled graph, which calls nobody.

    Args:
        module: Does the same work on every rank, and no communication.
        device: What it computes on.
    """

    def __init__(self, module: nn.Module, *, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._began: Any = None
        self._now: list[Any] = []
        self._steps: list[list[Any]] = []
        module.register_forward_pre_hook(self._before, prepend=True)
        module.register_forward_hook(self._after)

    def end_step(self) -> None:
        """What was timed since the last call is a step's."""
        self._steps.append(self._now)
        self._now = []

    def read(self) -> list[tuple[float, float]]:
        """Seconds of each step since the last call, and seconds per token; on a GPU the device must be past them."""
        steps, self._steps = self._steps, []
        read = []
        for step in steps:
            seconds = sum(began.elapsed_time(ended) / 1000 if self._cuda else ended - began for began, ended, _ in step)
            read.append((seconds, seconds / max(1, sum(tokens for _, _, tokens in step))))
        return read

    def _stamp(self) -> Any:
        if not self._cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record()
        return event

    def _before(self, _module: nn.Module, _args: Any) -> None:
        if _is_watched():
            self._began = self._stamp()

    def _after(self, _module: nn.Module, _args: Any, output: Tensor) -> None:
        if _is_watched():
            self._now.append((self._began, self._stamp(), output.numel() // output.shape[-1]))


def _is_watched() -> bool:
    """Not where validation draws videos, which some ranks do alone; nor while a compiler looks at the module, and its hooks."""
    return torch.is_grad_enabled() and not torch.compiler.is_compiling()


@dataclass(frozen=True, kw_only=True)
class Straggler:
    """A slow rank.

    Args:
        ratio: How many times the other ranks' median its own work took.
        what: ``compute`` or ``data``.
        steps: Over how many.
    """

    rank: int
    ratio: float
    what: str
    steps: int


class StragglerReport:
    """Compares the ranks' own work over the last 20 steps.

    Args:
        ratio: A rank whose work takes this many times the median of the others is named.
        group: gloo group of all ranks.
    """

    def __init__(self, *, ratio: float, group: dist.ProcessGroup) -> None:
        self._ratio, self._group = ratio, group
        self._own: deque[tuple[float, float, float, float]] = deque(maxlen=WINDOW)
        self._named: set[tuple[int, str]] = set()

    def check(self, steps: Sequence[tuple[float, float, float, float]]) -> list[Straggler]:
        """Ranks that have become slow since the last call, the same on every rank. Collective over ``group``.

        Args:
            steps: Of each step since the last call, seconds in the probe, there per token, waiting for data, in all.
        """
        self._own.extend(steps)
        if len(self._own) < WINDOW:
            return []
        mine = torch.tensor(self._own, dtype=torch.float64).median(dim=0).values
        ranks = [torch.empty_like(mine) for _ in range(dist.get_world_size(self._group))]
        dist.all_gather(ranks, mine, group=self._group)
        found = stragglers(torch.stack(ranks), ratio=self._ratio)
        known, self._named = self._named, {(s.rank, s.what) for s in found}
        return [s for s in found if (s.rank, s.what) not in known]  # said once, until it has been as fast as the others again


def stragglers(table: Tensor, *, ratio: float) -> list[Straggler]:
    """Ranks that are slow.

    Where ranks that share samples hold unequal parts, more time is no slowness unless it is more per token, too. A wait for data counts
    against the step without it: it is what the others wait for.

    Args:
        table: [ranks, 4] seconds per step: in the probe, there per token, waiting for data, in all.
    """
    found = []
    for rank in range(len(table)) if len(table) > 1 else ():
        others = torch.cat([table[:rank], table[rank + 1 :]])
        usual = others.median(dim=0).values
        late, step = max(float(table[rank, 2] - usual[2]), 0.0), float(usual[3])
        times = {
            "compute": float((table[rank, :2] / usual[:2]).min()) if float(usual[:2].min()) > 0 else 1.0,
            "data": 1 + late / (step - late) if step > late else 1.0,
        }
        found += [Straggler(rank=rank, ratio=round(t, 3), what=what, steps=WINDOW) for what, t in times.items() if t >= ratio]
    return found
