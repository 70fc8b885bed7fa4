"""Samples that can't be read: what was replaced on any rank is told once, and too many of them end the run on all ranks."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from opensora_dist.core.errors import DataError
from opensora_dist.core.logging import get_logger
from opensora_dist.data.loader import BadSample
from opensora_dist.parallel.gather import gather_text
from opensora_dist.parallel.mesh import Mesh
from opensora_dist.train.callbacks import Callback
from opensora_dist.train.logbook import Logbook, LoggedStep

_log = get_logger(__name__)
_NAMED = 5


class Quarantine(Callback):
    """Collects what this rank's loader reports, and shares it at log steps and before saves, where there is any.

    So nothing of more than ``limit`` bad samples is ever saved, and every rank ends at the same step.

    Args:
        limit: ``resilience.max_bad_samples``: different samples, over all ranks and since this process started.
    """

    def __init__(self, *, mesh: Mesh, logbook: Logbook, limit: int) -> None:
        self._mesh, self._logbook, self._limit = mesh, logbook, limit
        self._mine: list[BadSample] = []
        self._bad: dict[str, str] = {}  # key -> what is wrong where
        self._replacements = 0

    @property
    def num_bad(self) -> int:
        """Different samples that some rank could not read."""
        return len(self._bad)

    def note(self, bad: BadSample) -> None:
        """Keeps it until the next flush."""
        self._mine.append(bad)

    def after_flush(self, steps: Sequence[LoggedStep]) -> None:
        """Collective where a step of these had bad samples, which all ranks know alike.

        Raises:
            DataError: On every rank: there are more than the limit.
        """
        if not any(step.bad_samples for step in steps):
            return
        mine, self._mine = json.dumps([asdict(bad) for bad in self._mine]), []
        told: dict[tuple[int, str], dict[str, Any]] = {}
        for rank, text in enumerate(gather_text(mine, group=self._mesh.control)):
            for bad in json.loads(text):
                told.setdefault((bad["step"], bad["key"]), bad | {"rank": rank})  # several ranks that share it may have seen it
        for bad in sorted(told.values(), key=lambda bad: bad["step"]):
            self._tell(bad)
        self._replacements += sum(step.bad_samples for step in steps)
        if len(self._bad) > self._limit:
            raise DataError(self._too_many())

    def _tell(self, bad: Mapping[str, Any]) -> None:
        """One sample in one step; the reader hears of each sample once."""
        step, key, substitute, rank = bad["step"] + 1, bad["key"], bad["substitute"], bad["rank"]
        shard, reason = bad["damage"]["shard"], bad["damage"]["reason"]
        if key not in self._bad and self._mesh.is_main:
            instead = f"{substitute!r} takes its place" if substitute else "nothing fits its place, which weighs nothing"
            _log.warning("%s: sample %r can't be read on rank %d: %s; in step %d %s", shard, key, rank, reason, step, instead)
        self._bad.setdefault(key, f"{shard}: sample {key!r}, {reason}")
        where = {"shard": shard, "reason": reason, "rank": rank}
        self._logbook.event("sample_quarantined", step=step, key=key, substitute=substitute, **where)

    def end(self) -> None:
        """Says how many there were."""
        if self._bad and self._mesh.is_main:
            said = "samples that could not be read: %d, replaced %d times; events.jsonl names each (sample_quarantined)"
            _log.warning(said, len(self._bad), self._replacements)

    def _too_many(self) -> str:
        first = list(self._bad.values())[:_NAMED]
        more = f"\n  and {len(self._bad) - len(first)} more" if len(self._bad) > len(first) else ""
        return (
            f"samples that can't be read: {len(self._bad)}, more than resilience.max_bad_samples={self._limit}; check the disk, copy these "
            "shards again from where the data set was made, run `opensora-dist data prepare` again, or raise the limit:\n"
            + "\n".join(f"  {line}" for line in first)
            + more
        )
