"""Restarts, counted by what they achieve: a run that fails twice at the same place will fail there again.

Each start of a run notes in ``restarts.jsonl`` the step that it goes on from. Where two starts of one launch in a row went on from the
same step and failed, a third would, too.
"""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any, Final

from opensora_dist.core.errors import TrainingError
from opensora_dist.core.io import fsync
from opensora_dist.core.logging import get_logger

RESTARTS_NAME: Final = "restarts.jsonl"
_log = get_logger(__name__)


def restart_count() -> int:
    """How often the launcher (torchrun, or our own spawner) has started the ranks again; 0 in a first start."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))


def note_start(run_dir: Path, *, step: int) -> None:
    """Notes a start that goes on from ``step``. One rank calls it."""
    path = Path(run_dir) / RESTARTS_NAME
    with open(path, "a", encoding="utf-8") as handle:
        handle.write(json.dumps({"restart": restart_count(), "step": step}) + "\n")
    fsync(path)


def starts_of_launch(run_dir: Path) -> list[int]:
    """The steps that the starts of the last launch went on from, oldest first."""
    path = Path(run_dir) / RESTARTS_NAME
    steps: list[int] = []
    for note in _notes(path) if path.exists() else []:
        steps = [note["step"]] if note["restart"] == 0 else [*steps, note["step"]]
    return steps


def no_progress(steps: list[int | None]) -> bool:
    """Whether the last two of these failed starts achieved nothing: they went on from the same step, or came to none."""
    return len(steps) > 1 and steps[-1] == steps[-2]


def refuse_without_progress(run_dir: Path) -> None:
    """Ends a restart that two failed ones before it show to be of no use. Every rank calls it, before ``note_start``.

    torchrun would start the ranks again whatever their exit code, so the first rank of each machine asks its agent to end, by SIGTERM.

    Raises:
        TrainingError: It is of no use.
    """
    steps: list[int | None] = [*starts_of_launch(run_dir)]
    if restart_count() < 2 or not no_progress(steps):
        return
    said = stuck(run_dir, step=steps[-1])
    if "TORCHELASTIC_RUN_ID" in os.environ and os.environ.get("LOCAL_RANK") == "0":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # the agent passes it on, before this process has said why
        _log.error("%s; asking torchrun to end", said)
        os.kill(os.getppid(), signal.SIGTERM)
    raise TrainingError(said)


def stuck(run_dir: Path, *, step: int | None) -> str:
    """What is said of a run that restarts don't help."""
    where = "before training began" if step is None else f"after going on from step {step}"
    return (
        f"two starts in a row failed {where}, so another is of no use; the first error in {run_dir}/logs, or of the launcher, says why. "
        "Mend that and start the same command again; where the failures have nothing to do with each other, save more often "
        "(checkpoint.every_steps)"
    )


def _notes(path: Path) -> list[Any]:
    """All but a last line that a kill cut off."""
    lines = path.read_text(encoding="utf-8").split("\n")
    return [json.loads(line) for line in lines[:-1]]
