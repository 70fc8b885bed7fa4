"""Which scheme, over how many ranks: the one whose step is predicted to be shortest, for each shape of samples."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from opensora_dist.config.train import SpConfig
from opensora_dist.core.errors import ConfigError
from opensora_dist.core.logging import get_logger
from opensora_dist.core.types import Thw
from opensora_dist.parallel.mesh import sp_degrees
from opensora_dist.parallel.recompute import Recompute
from opensora_dist.parallel.sequence.layout import scheme_problems
from opensora_dist.parallel.sequence.network import Network
from opensora_dist.parallel.sequence.predict import Prediction, SampleCost, Workload, predict
from opensora_dist.parallel.sequence.registry import SCHEMES

_log = get_logger(__name__)
_WATCHED_STEPS, _WARM_UP = 10, 2


@dataclass(kw_only=True)
class AutoChoice:
    """A ``layout.Choose``: for each token grid the scheme and the degree with the lowest predicted step.

    The same on all ranks, whose arguments must be equal (``network.agree``). Logs each choice once.

    Args:
        sp: Section ``parallel.sp``; its scheme is not read.
        world: Ranks.
        global_batch: Units of a step.
        unit_tokens: Tokens of a unit at most; None where units are single samples.
        accum: Micro-batches of a step.
        recompute: As in ``Workload``.
        element_bytes: As in ``Workload``.
        cost: Of one sample of a token grid.
        networks: What is measured, by number of ranks that share a sample; 1 among them where that may be.
    """

    sp: SpConfig
    world: int
    global_batch: int
    accum: int
    recompute: Recompute
    element_bytes: int
    cost: Callable[[Thw], SampleCost]
    networks: Mapping[int, Network]
    unit_tokens: int | None = None
    predictions: dict[Thw, Prediction] = field(default_factory=dict)
    """Of the choices made so far."""
    runners_up: dict[Thw, Prediction | None] = field(default_factory=dict)

    def __call__(self, grid: Thw) -> tuple[str, int]:
        """
        Raises:
            ConfigError: No scheme can share such a sample; the rules that are broken are named.
        """
        if grid not in self.predictions:
            best, *rest = self.candidates(grid)
            self.predictions[grid], self.runners_up[grid] = best, next(iter(rest), None)
            _log.info("parallel.sp.scheme=auto: samples of %s tokens: %s%s", grid, _said(best), self._instead_of(grid))
        best = self.predictions[grid]
        return best.scheme, best.degree

    def candidates(self, grid: Thw) -> list[Prediction]:
        """What fits, fastest first; of equals, the fewer ranks, then the order of the registry.

        Raises:
            ConfigError: Nothing fits.
        """
        cost, found, problems = self.cost(grid), [], []
        of_unit = max(1, (self.unit_tokens or 0) // grid.volume)
        for degree in self._degrees():
            work = Workload(
                grid=grid,
                batch=self.global_batch // (self.world // degree * self.accum) * of_unit,
                cost=cost,
                element_bytes=self.element_bytes,
                accum=self.accum,
                recompute=self.recompute,
            )
            for name in SCHEMES if degree > 1 else ("local",):
                inner = self.sp.ulysses if degree == self.sp.degree else None
                sp = self.sp.model_copy(update={"scheme": name, "degree": degree, "ulysses": inner})
                broken = scheme_problems(sp, grid, heads=cost.heads, joint=cost.joint) if degree > 1 else []
                problems += broken
                if not broken:
                    found.append(predict(work, name, degree, self.networks[degree], sp=self.sp))
        if not found:
            raise ConfigError(problems)
        return sorted(found, key=lambda p: (p.step_s, p.degree))  # stable: equals keep the registry's order

    def event(self, grid: Thw) -> dict[str, Any]:
        """Fields of the event ``sequence_prediction`` of a grid that was chosen for."""
        runner_up = self.runners_up[grid]
        fields = _fields(grid, self.predictions[grid])
        if runner_up is not None:
            fields["runner_up"] = f"{runner_up.scheme} x {runner_up.degree}, {1e3 * runner_up.step_s:.4g} ms"
        return fields

    def _degrees(self) -> list[int]:
        return [d for d in sp_degrees(self.sp) if self.global_batch % (self.world // d * self.accum) == 0]

    def _instead_of(self, grid: Thw) -> str:
        runner_up = self.runners_up[grid]
        return "" if runner_up is None else f"; next {_said(runner_up)}"


def _said(p: Prediction) -> str:
    return f"{p.scheme} over {p.degree} rank{'s' if p.degree > 1 else ''}, {1e3 * p.step_s:.4g} ms a step predicted"


def _fields(grid: Thw, p: Prediction) -> dict[str, Any]:
    return {"bucket": str(grid), "scheme": p.scheme, "degree": p.degree, "predicted_ms": 1e3 * p.step_s}


class StepWatch:
    """Holds measured steps against the predictions.

    Args:
        predictions: ``AutoChoice.predictions``, which may grow.
    """

    def __init__(self, predictions: Mapping[Thw, Prediction]) -> None:
        self._predictions = predictions
        self._steps: dict[Thw, list[float]] = {}

    def note(self, grid: Thw, step_s: float) -> dict[str, Any] | None:
        """Takes a step's time; with the tenth of a grid, logs the median and gives the fields of ``sequence_measured``.

        The first two are left out: memory is allocated and kernels are chosen in them.

        Args:
            step_s: Of this step itself, or the mean of a window of steps that are all of this grid.
        """
        steps = self._steps.setdefault(grid, [])
        if grid not in self._predictions or len(steps) == _WATCHED_STEPS:
            return None
        steps.append(step_s)
        if len(steps) < _WATCHED_STEPS:
            return None
        measured, best = 1e3 * statistics.median(steps[_WARM_UP:]), self._predictions[grid]
        _log.info("samples of %s tokens: %s, measured %.4g ms (median)", grid, _said(best), measured)
        return {**_fields(grid, best), "measured_ms": measured}
