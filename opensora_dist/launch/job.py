"""What is submitted: a command of this program, how much machine it gets, and where everything about it is kept."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from opensora_dist.config.site import SiteConfig

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,47}")
_TIME = re.compile(r"(?:(\d+)-)?(\d{1,3}):(\d{2}):(\d{2})")
Kind = Literal["train", "prepare", "bench"]


@dataclass(frozen=True, kw_only=True)
class Job:
    """One submission.

    Args:
        id: Unique among submissions, and what they are found by in a scheduler's queue: ``name`` and eight hex digits.
        name: For people.
        kind: What restarts mean to it: a training resumes; an array's task and a benchmark are simply run again.
        argv: Of ``opensora-dist``: ``train /abs/config.yaml key=value ...``.
        nodes: How many.
        gpus_per_node: On each; 0 is a run on CPUs.
        ranks_per_node: On each: the GPUs, or what was asked for on CPUs.
        time_limit_s: After which the scheduler ends it; None is the site's limit.
        max_requeues: How often it is started again at most, whatever ended it.
        array: Tasks of an array, of ``data prepare`` alone; None is no array.
        run_dir: Of the run, absolute, on a file system that all nodes share, as the nodes see it.
        folder: Of this submission, on the machine that submits: in the run directory, but for ``--records``.
        config: The resolved config, in ``folder``; None of a benchmark, which has its options alone.
        config_text: What ``config`` holds, for launchers whose nodes don't see ``folder``.
        site: The cluster.
        rounds: How often the array runs before the last job: twice where duplicates are known only once all parts are scored.
    """

    id: str
    name: str
    kind: Kind
    argv: tuple[str, ...]
    nodes: int
    gpus_per_node: int
    ranks_per_node: int
    time_limit_s: int | None
    max_requeues: int
    run_dir: Path
    folder: Path
    config: Path | None
    site: SiteConfig
    config_text: str = ""
    array: int | None = None
    rounds: int = 1

    @property
    def world(self) -> int:
        """Ranks of the whole job."""
        return self.nodes * self.ranks_per_node


def job_problems(
    *,
    name: str,
    run_dir: Path,
    nodes: int,
    gpus_per_node: int,
    ranks_per_node: int | None,
    time_limit: str | None,
    max_requeues: int,
    array: int | None,
) -> list[str]:
    """What is wrong with the options of a submission, whatever the scheduler."""
    problems = []
    if not _NAME.fullmatch(name):
        problems.append(
            f"--name {name!r} (default: run.name) must be letters, digits, '.', '_' and '-', at most 48: schedulers, file names and labels "
            "all have to hold it; pass --name"
        )
    if any(ord(c) < 32 or ord(c) == 127 for c in str(run_dir)):
        problems.append(
            f"the run directory {str(run_dir)!r} holds a line break or another control character, which no scheduler takes; rename it"
        )
    for flag, value, least in (("nodes", nodes, 1), ("gpus-per-node", gpus_per_node, 0), ("max-requeues", max_requeues, 0)):
        if value < least:
            problems.append(f"--{flag} must be {least} or more, and is {value}")
    if ranks_per_node is not None and ranks_per_node < 1:
        problems.append(f"--ranks-per-node must be 1 or more, and is {ranks_per_node}")
    if ranks_per_node is not None and gpus_per_node > 0 and ranks_per_node != gpus_per_node:
        problems.append(
            f"--ranks-per-node {ranks_per_node} with --gpus-per-node {gpus_per_node}: each rank needs a GPU of its own; leave --ranks-per-node out"
        )
    if array is not None and array < 1:
        problems.append(f"--array must be 1 or more, and is {array}")
    if time_limit is not None and time_limit_s(time_limit) is None:
        problems.append(f"--time {time_limit!r} is not HH:MM:SS or D-HH:MM:SS above zero; write e.g. 24:00:00 or 2-00:00:00")
    return problems


def time_limit_s(text: str) -> int | None:
    """Seconds of ``HH:MM:SS`` or ``D-HH:MM:SS``; None where it is neither, or zero."""
    match = _TIME.fullmatch(text)
    if match is None:
        return None
    days, hours, minutes, seconds = (int(part or 0) for part in match.groups())
    if minutes > 59 or seconds > 59:
        return None
    return ((days * 24 + hours) * 60 + minutes) * 60 + seconds or None


def time_limit_text(seconds: int) -> str:
    """``D-HH:MM:SS``, as Slurm reads it."""
    minutes, s = divmod(seconds, 60)
    hours, m = divmod(minutes, 60)
    days, h = divmod(hours, 24)
    return f"{days}-{h:02d}:{m:02d}:{s:02d}"
