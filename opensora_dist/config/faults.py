"""How a fault is written: ``RANK@stepN``, ``RANK@xF``, ``RANK@PHASE``."""

from __future__ import annotations

import re
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class AtStep:
    """A rank, in a step as metrics count it: the first is 1."""

    rank: int
    step: int


@dataclass(frozen=True, kw_only=True)
class Slower:
    """A rank that computes ``factor`` times as long."""

    rank: int
    factor: float


@dataclass(frozen=True, kw_only=True)
class InSave:
    """A rank, at a phase of a save."""

    rank: int
    phase: str


Fault = AtStep | Slower | InSave

_FORMS = {"slow_rank": "RANK@xF, as 1@x1.5", "kill_in_save": "RANK@PHASE, as 1@write"}


def fault_form(name: str) -> str:
    """What ``fault.<name>`` must look like."""
    return _FORMS.get(name, "RANK@stepN, as 1@step20, with steps from 1 on")


def parse_fault(name: str, text: str) -> Fault | None:
    """What ``fault.<name>=text`` means; None where it means nothing."""
    match = re.fullmatch(r"(\d+)@(\w[\w.-]*)", text)
    if match is None:
        return None
    rank, what = int(match[1]), match[2]
    if name == "kill_in_save":
        return InSave(rank=rank, phase=what)
    if name == "slow_rank":
        factor = re.fullmatch(r"x(\d+(?:\.\d+)?)", what)
        return Slower(rank=rank, factor=float(factor[1])) if factor and float(factor[1]) > 1 else None
    step = re.fullmatch(r"step(\d+)", what)
    return AtStep(rank=rank, step=int(step[1])) if step and int(step[1]) > 0 else None
