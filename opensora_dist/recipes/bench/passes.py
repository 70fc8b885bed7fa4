"""One timed forward and backward of a block, and what a benchmark makes of many."""

# B batch, S tokens per frame, D width; t: frames of this rank

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from opensora_dist.parallel.sequence.base import Shard, Traffic
from opensora_dist.parallel.sequence.network import synchronise
from opensora_dist.recipes.bench.case import Subject
from opensora_dist.recipes.bench.rounds import timed


@dataclass(frozen=True, kw_only=True)
class Pass:
    """One forward and backward: seconds of the slowest rank, and the mean over ranks of what the host waited for transfers."""

    forward_s: float
    backward_s: float
    forward_wait_s: float
    backward_wait_s: float

    @property
    def both_s(self) -> float:
        """Forward and backward."""
        return self.forward_s + self.backward_s


@dataclass(frozen=True, kw_only=True)
class SequenceResult:
    """One form of one scheme.

    Args:
        scheme: Its name; or a package's, or "local" for one rank.
        overlap: None where there is but one form.
        problem: Why it was not timed.
        difference: From one process, of output and input gradient together, over the largest value.
        sent: Bytes that rank 0 sent, as counted on the collectives.
        formula: The same by the scheme's formula.
        memory_bytes: Peak beyond weights and inputs, of the rank that held most.
        passes: One per round.
        silent: The same without communication, in the same rounds.
    """

    scheme: str
    overlap: bool | None = None
    problem: str | None = None
    difference: float | None = None
    sent: Traffic | None = None
    formula: Traffic | None = None
    memory_bytes: int | None = None
    passes: tuple[Pass, ...] = ()
    silent: tuple[Pass, ...] = ()

    @property
    def name(self) -> str:
        """As in the table."""
        return self.scheme if self.overlap is None else f"{self.scheme} {'overlapped' if self.overlap else 'blocking'}"

    @property
    def bytes_match(self) -> bool:
        """Whether what was sent is what the formula says."""
        return self.sent == self.formula


@dataclass(frozen=True, kw_only=True)
class Form:
    """One thing to time, on its shard; ``silent`` is the same without communication, where that is known."""

    result: SequenceResult
    shard: Shard
    silent: Shard | None = None


def timed_pass(
    subject: Subject, shard: Shard, x: Tensor, dy: Tensor, *, span: Callable[[str], AbstractContextManager[object]] | None = None
) -> list[float]:
    """Seconds of forward and backward on this rank, and what it waited for transfers in each.

    Args:
        span: ``span(name)`` is a context around each pass, for a trace.
    """
    span = span or (lambda _name: nullcontext())
    seconds: list[float] = []
    waits: list[float] = []
    out: Tensor | None = None

    def forward() -> None:
        nonlocal out
        with span("forward"):
            out = subject.forward(x, shard)
            synchronise(subject.device)

    def backward() -> None:
        assert out is not None
        with span("backward"):
            torch.autograd.backward(out, dy)
            synchronise(subject.device)

    for direction in (forward, backward):
        waited = _waited(shard)
        seconds.append(timed(direction, device=subject.device))
        waits.append(_waited(shard) - waited)
    subject.forget(x)
    return [*seconds, *waits]


def _waited(shard: Shard) -> float:
    links = shard.links
    return 0.0 if links is None else sum(e.wait_s for e in (links.sp, links.ring, links.ulysses))
