"""Faults on purpose, for drills and tests: what ``fault.*`` of a config asks for, each once in a run directory.

Nothing here runs in a step unless a fault is due in it. A fault leaves a file under ``run_dir/faults/`` before it happens, on the disk's
side of the process, so that the run that is started again doesn't meet it again.
"""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Final, TypeVar

from opensora_dist.config.faults import AtStep, Fault, InSave, parse_fault
from opensora_dist.config.train import FaultConfig
from opensora_dist.core.io import write_json
from opensora_dist.core.logging import get_logger

FAULTS_DIR: Final = "faults"
_log = get_logger(__name__)
_F = TypeVar("_F", bound=Fault)


class Faults:
    """What goes wrong on this rank, and when.

    Args:
        config: What to inject; checked with the rest of the config.
        run_dir: The run directory.
        rank: This rank.
    """

    def __init__(self, config: FaultConfig, *, run_dir: Path, rank: int) -> None:
        self._dir, self._rank = Path(run_dir) / FAULTS_DIR, rank
        self.asked: dict[str, str] = {name: text for name, text in config.model_dump().items() if text is not None}
        parsed = {name: parse_fault(name, text) for name, text in self.asked.items()}
        self._faults = {name: fault for name, fault in parsed.items() if fault is not None and fault.rank == rank}

    def save_phase(self, name: str) -> None:
        """A save comes to its phase ``name``: ``fault.kill_in_save``."""
        fault = self._get("kill_in_save", InSave)
        if fault is not None and fault.phase == name and self._first("kill_in_save"):
            os.kill(os.getpid(), signal.SIGKILL)

    def bad_sample(self, step: int) -> bool:
        """Whether the first sample of ``step`` (``StepData.step``, from 0) is to read as damaged: ``fault.bad_sample``."""
        return self._due("bad_sample", step=step + 1) and self._first("bad_sample")

    def _due(self, name: str, *, step: int) -> bool:
        fault = self._get(name, AtStep)
        return fault is not None and fault.step == step

    def _get(self, name: str, kind: type[_F]) -> _F | None:
        fault = self._faults.get(name)
        assert fault is None or isinstance(fault, kind), (name, fault)
        return fault

    def _first(self, name: str) -> bool:
        """Notes that a fault happens now, unless it has happened before."""
        marker = self._dir / f"{name}-rank-{self._rank}.json"
        if marker.exists():
            return False
        write_json(marker, {"fault": name, "asked": self.asked[name], "rank": self._rank})
        _log.warning("fault.%s=%s happens now, on rank %d", name, self.asked[name], self._rank)
        return True
