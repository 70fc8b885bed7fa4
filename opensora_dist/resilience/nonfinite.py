"""Steps with non-finite gradients, counted: one may be bad luck, many in a row are a run that has gone wrong."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol

from opensora_dist.core.errors import TrainingError


class Outcome(Protocol):
    """What all ranks know of a step."""

    @property
    def step(self) -> int: ...
    @property
    def skipped(self) -> bool: ...
    @property
    def digest(self) -> str: ...
    @property
    def bad_ranks(self) -> tuple[int, ...]: ...


class NonFiniteGuard:
    """Ends the run after too many skipped steps in a row.

    It counts the skips that all ranks agreed on, not values, so no number that is none can blind it.

    Args:
        max_skipped: How many in a row end the run.
    """

    def __init__(self, *, max_skipped: int) -> None:
        self._max = max_skipped
        self._row: list[Outcome] = []

    def check(self, steps: Iterable[Outcome]) -> None:
        """Takes the steps since the last call, in order.

        Raises:
            TrainingError: On every rank, as all are given the same.
        """
        for step in steps:
            self._row = [*self._row, step] if step.skipped else []
            if len(self._row) >= self._max:
                raise TrainingError(self._said())

    def _said(self) -> str:
        lines = []
        for s in self._row:
            where = f"loss not finite on rank {', '.join(map(str, s.bad_ranks))}" if s.bad_ranks else "finite loss on every rank"
            lines.append(f"  step {s.step}, batch {s.digest}: {where}")
        ranks = {s.bad_ranks for s in self._row}
        one = len(ranks) == 1 and len(next(iter(ranks))) == 1
        hint = (
            f"it is always rank {next(iter(ranks))[0]}: suspect its machine"
            if one
            else "lower optim.lr, or look at these batches"
        )
        return (
            f"{len(self._row)} steps in a row had gradients that are not finite (resilience.max_skipped_steps={self._max}):\n"
            + "\n".join(lines)
            + f"\nno weight moved in them; {hint}, then start the same command again, which goes on from the last checkpoint"
        )
