"""Restarts, counted by what they achieve: a run that fails twice at the same place will fail there again.

Each start of a run notes in ``restarts.jsonl`` the step that it goes on from. Where two starts of one launch in a row went on from the
same step, saved no other and failed, a third would, too. ``attempts`` counts starts by a scheduler in the same way.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from threading import Event
from typing import Any, Final

from opensora_dist.core.errors import TrainingError
from opensora_dist.core.io import write_text
from opensora_dist.core.logging import get_logger

RESTARTS_NAME: Final = "restarts.jsonl"
_ASKING_S: Final = 30.0
_log = get_logger(__name__)


def restart_count() -> int:
    """How often the launcher (torchrun, or our own spawner) has started the ranks again; 0 in a first start."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))


def note_start(run_dir: Path, *, step: int) -> None:
    """Notes a start that goes on from ``step``. One rank calls it."""
    path = Path(run_dir) / RESTARTS_NAME
    notes = [*_notes(path), {"restart": restart_count(), "step": step}]
    write_text(path, "".join(json.dumps(note) + "\n" for note in notes))


def num_starts(run_dir: Path) -> int:
    """How often ranks have begun to train here, or gone on."""
    return len(_notes(Path(run_dir) / RESTARTS_NAME))


class Progress:
    """What the starts of a launch achieve, for the process that starts the ranks.

    Args:
        saved_step: The step of the checkpoint that was committed last; 0 where there is none.
    """

    def __init__(self, run_dir: Path, *, saved_step: Callable[[], int]) -> None:
        self._path, self._saved_step = Path(run_dir) / RESTARTS_NAME, saved_step
        self._seen = len(_notes(self._path))
        self._steps: list[int | None] = []

    def stuck(self) -> str | None:
        """After a failed start: why another is of no use, or None."""
        notes = _notes(self._path)
        self._steps.append(notes[-1]["step"] if len(notes) > self._seen else None)
        self._seen = len(notes)
        if len(self._steps) > 1 and _stuck(*self._steps[-2:], saved=self._saved_step()):
            return of_no_use(self._path.parent, step=self._steps[-1])
        return None


def _stuck(before: int | None, last: int | None, *, saved: int) -> bool:
    """Of the steps that two starts went on from, None where one failed before it could note it, and the one that is saved after both."""
    return before == last and last in (None, saved)


def refuse_without_progress(run_dir: Path, *, saved_step: Callable[[], int]) -> None:
    """Ends a restart by torchrun that two failed ones before it show to be of no use. Every rank calls it, before ``note_start``.

    torchrun would start the ranks again whatever their exit code, so the first rank asks its agent to end, by SIGTERM. Over several
    machines nothing is refused: each agent counts the failures of its own ranks alone, so that the counts don't tell starts apart.

    Args:
        saved_step: As of ``Progress``.
    Raises:
        TrainingError: It is of no use.
    """
    restart, steps = restart_count(), dict[int, int]()
    for note in _notes(Path(run_dir) / RESTARTS_NAME):
        steps = {note["restart"]: note["step"]} if note["restart"] == 0 else {**steps, note["restart"]: note["step"]}
    by_torchrun, machines = "TORCHELASTIC_RUN_ID" in os.environ, os.environ.get("GROUP_WORLD_SIZE", "1")
    before, last = steps.get(restart - 2), steps.get(restart - 1)
    if not by_torchrun or machines != "1" or restart < 2 or not _stuck(before, last, saved=saved_step()):
        return
    said = of_no_use(run_dir, step=last)
    if os.environ.get("LOCAL_RANK") == "0":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # the agent passes it on, before this process has said why
        _log.error("%s; asking torchrun to end", said)
        os.kill(os.getppid(), signal.SIGTERM)
    else:
        Event().wait(_ASKING_S)  # were this rank the first to fail, torchrun would end the one that asks before it has
    raise TrainingError(said)


def of_no_use(run_dir: Path, *, step: int | None) -> str:
    """What is said of a run that restarts don't help."""
    where = "before training began" if step is None else f"after going on from step {step}"
    return (
        f"two starts in a row failed {where}, so another is of no use; the first error in {run_dir}/logs, or of the launcher, says why. "
        "Mend that and start the same command again; where the failures have nothing to do with each other, save more often "
        "(checkpoint.every_steps)"
    )


def _notes(path: Path) -> list[Any]:
    """All but what a kill cut off."""
    notes = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        with contextlib.suppress(ValueError):
            notes.append(json.loads(line))
    return notes
