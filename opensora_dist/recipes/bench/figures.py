"""What follows from the raw times of a sequence benchmark."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from opensora_dist.recipes.bench.passes import Pass, SequenceResult

BASELINES = ("deepspeed", "none")
"""What ratios are to, the first that was timed; on one rank there is only the block without a scheme."""


@dataclass(frozen=True, kw_only=True)
class Spread:
    """Median and quartiles."""

    low: float
    median: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """Of at least one value."""
        if len(values) == 1:
            return cls(low=values[0], median=values[0], high=values[0])
        low, median, high = statistics.quantiles(values, n=4, method="inclusive")
        return cls(low=low, median=median, high=high)


@dataclass(frozen=True, kw_only=True)
class Hidden:
    """What overlapping hid of one direction's, or both directions', exposed time and of the host's waiting; 1 is all of it."""

    wall: float | None
    wait: float | None


@dataclass(frozen=True, kw_only=True)
class Figures:
    """Of one form; milliseconds. None where there is nothing to compare with.

    Args:
        ratio: To the baseline's forward and backward, round by round.
        exposed_forward_ms: Time beyond that of the same form without communication, round by round.
        exposed_ms: The same of both directions.
        hidden: Of what the scheme's own blocking form exposes, per "forward", "backward" and "both".
    """

    forward_ms: Spread
    backward_ms: Spread
    both_ms: Spread
    wait_ms: float
    ratio: Spread | None
    exposed_forward_ms: Spread | None
    exposed_backward_ms: Spread | None
    exposed_ms: Spread | None
    hidden: dict[str, Hidden] | None


def baseline_of(results: Sequence[SequenceResult]) -> SequenceResult | None:
    """What ratios of a run are to."""
    return next((r for name in BASELINES for r in results if r.scheme == name and r.passes), None)


def figures(result: SequenceResult, others: Sequence[SequenceResult]) -> Figures | None:
    """Of a form among those of the same run; None for what was not timed."""
    if not result.passes:
        return None
    baseline = baseline_of(others)
    blocking = next((o for o in others if o.scheme == result.scheme and o.overlap is False and o.passes), None)
    return Figures(
        forward_ms=_ms([p.forward_s for p in result.passes]),
        backward_ms=_ms([p.backward_s for p in result.passes]),
        both_ms=_ms([p.both_s for p in result.passes]),
        wait_ms=1e3 * statistics.median(p.forward_wait_s + p.backward_wait_s for p in result.passes),
        ratio=Spread.of([p.both_s / b.both_s for p, b in zip(result.passes, baseline.passes)]) if baseline else None,
        exposed_forward_ms=_exposed(result, lambda p: p.forward_s),
        exposed_backward_ms=_exposed(result, lambda p: p.backward_s),
        exposed_ms=_exposed(result, lambda p: p.both_s),
        hidden=_hidden(result, blocking) if result.overlap and blocking is not None else None,
    )


def _ms(seconds: Sequence[float]) -> Spread:
    return Spread.of([1e3 * s for s in seconds])


def _exposed(result: SequenceResult, of: Callable[[Pass], float]) -> Spread | None:
    if not result.silent:
        return None
    return _ms([of(p) - of(s) for p, s in zip(result.passes, result.silent)])


def _hidden(overlapped: SequenceResult, blocking: SequenceResult) -> dict[str, Hidden]:
    """Between medians. The floor is the faster of the two forms without communication, so that what pieces cost counts against them."""
    kinds: dict[str, tuple[Callable[[Pass], float], Callable[[Pass], float]]] = {
        "forward": (lambda p: p.forward_s, lambda p: p.forward_wait_s),
        "backward": (lambda p: p.backward_s, lambda p: p.backward_wait_s),
        "both": (lambda p: p.both_s, lambda p: p.forward_wait_s + p.backward_wait_s),
    }

    def median(passes: Sequence[Pass], of: Callable[[Pass], float]) -> float:
        return statistics.median(map(of, passes))

    found = {}
    for kind, (wall, wait) in kinds.items():
        floor = min(median(overlapped.silent, wall), median(blocking.silent, wall))
        exposed, waited = median(blocking.passes, wall) - floor, median(blocking.passes, wait)
        found[kind] = Hidden(
            wall=1 - (median(overlapped.passes, wall) - floor) / exposed if exposed > 0 else None,
            wait=1 - median(overlapped.passes, wait) / waited if waited > 0 else None,
        )
    return found
