"""Where a rank is, read off its main thread's stack, and which of several ranks holds up the others."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path
from types import FrameType
from typing import Final


class Waits(IntEnum):
    """Whether a rank waits for others; the less it does, the more it is the one that is waited for."""

    NO = 0
    PERHAPS = 1  # the stack doesn't tell: of a backward, gradients may be on their way, or computed
    YES = 2


@dataclass(frozen=True, kw_only=True)
class Place:
    """What a thread does: a collective by name, or a function of ours."""

    what: str
    waits: Waits


@dataclass(frozen=True, kw_only=True)
class Position:
    """Where a rank is.

    Args:
        step: The step it is in, from 1; 0 before the first.
        phase: Of the loop.
        what: As of ``Place``.
        seconds: For how long it has been there.
    """

    rank: int
    step: int
    phase: str
    what: str
    waits: Waits
    seconds: float


_COLLECTIVES: Final = (
    "distributed/distributed_c10d.py",
    "distributed/_functional_collectives.py",
    "distributed/fsdp/_fully_shard/",
)
_OURS: Final = {
    ("resilience/signals.py", "_read"): Place(what="the vote on stopping", waits=Waits.YES),
    ("zero/replicated.py", "finish"): Place(what="all_reduce of gradients", waits=Waits.YES),
    ("train/logbook.py", "flush"): Place(what="a wait for the device", waits=Waits.PERHAPS),
    ("train/saving.py", "wait"): Place(what="a wait for the checkpoint's thread", waits=Waits.PERHAPS),
}
_BACKWARD: Final = ("autograd/graph.py", "_engine_run_backward")


def place_of(innermost: FrameType) -> Place:
    """The place that a stack shows. C code has no frame: a wait in it shows as the Python function that called it."""
    frames = list(_outwards(innermost))
    for frame in frames:
        if _is(frame, "sequence/exchange.py", "guarded"):
            return Place(what=str(frame.f_locals.get("what", "a transfer")), waits=Waits.YES)
    for frame in frames:
        path = frame.f_code.co_filename
        name = _name(frame)
        if any(part in path for part in _COLLECTIVES) and not name.startswith("_"):
            return Place(what=name, waits=Waits.YES)
        if _is(frame, *_BACKWARD):
            return Place(what="backward", waits=Waits.PERHAPS)
        for (file, function), place in _OURS.items():
            if _is(frame, file, function):
                return place
        if "/torch/" not in path:
            break
    own = next((f for f in frames if "opensora_dist" in f.f_code.co_filename), frames[0])
    where = Path(own.f_code.co_filename)
    return Place(what=f"{_name(own)} ({where.parent.name}/{where.name}:{own.f_lineno})", waits=Waits.NO)


def _outwards(frame: FrameType | None) -> list[FrameType]:
    frames = []
    while frame is not None:
        frames.append(frame)
        frame = frame.f_back
    return frames


def _is(frame: FrameType, file: str, function: str) -> bool:
    return frame.f_code.co_filename.endswith(file) and _name(frame) == function


def _name(frame: FrameType) -> str:
    return frame.f_code.co_name


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """Who holds up the others; nobody where that can't be told."""

    ranks: tuple[int, ...]
    text: str


def judge(positions: Mapping[int, Position], *, world: int) -> Verdict:
    """Names the ranks that hold up the others.

    In this order: those that gave no answer; those that wait for nobody while others wait; those a step behind; those that perhaps
    wait while others surely do.

    Args:
        positions: Of the ranks that answered, at least one.
    """
    silent = tuple(rank for rank in range(world) if rank not in positions)
    waiting = [p for p in positions.values() if p.waits > Waits.NO]
    if silent:
        text = f"rank {_list(silent)} does not answer: stopped, or its machine is gone" + _while(
            waiting or list(positions.values())
        )
        return Verdict(ranks=silent, text=text)
    least = min(p.waits for p in positions.values())
    most = max(p.waits for p in positions.values())
    behind = min(p.step for p in positions.values())
    if least == Waits.NO and (most > Waits.NO or world == 1):
        held = [p for p in positions.values() if p.waits == Waits.NO]
    elif behind < max(p.step for p in positions.values()):
        held = [p for p in positions.values() if p.step == behind]
    elif least < most:
        held = [p for p in positions.values() if p.waits == least]
    else:
        where = "; ".join(_at(p) for p in positions.values())
        return Verdict(ranks=(), text=f"every rank is held up, and none more than the others: {where}")
    ranks = tuple(p.rank for p in held)
    text = "; ".join(_at(p) for p in held) + _while([p for p in positions.values() if p.rank not in ranks])
    return Verdict(ranks=ranks, text=text)


def _at(p: Position) -> str:
    return f"rank {p.rank} is held up in {p.what} (step {p.step}, phase {p.phase}) for {p.seconds:.0f} s"


def _while(others: list[Position]) -> str:
    """What the others wait in."""
    places: dict[str, list[Position]] = {}
    for p in others:
        places.setdefault(p.what, []).append(p)
    said = [
        f"{'ranks' if len(there) > 1 else 'rank'} {_list(tuple(p.rank for p in there))} {'wait' if len(there) > 1 else 'waits'} in {what} "
        f"for {max(p.seconds for p in there):.0f} s"
        for what, there in places.items()
    ]
    return f", while {' and '.join(said)}" if said else ""


def _list(ranks: tuple[int, ...]) -> str:
    return ", ".join(map(str, ranks))
