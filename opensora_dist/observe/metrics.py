"""``metrics.jsonl``: one object per optimizer step, the same whether or not the run was interrupted."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from opensora_dist.core.io import atomic_file
from opensora_dist.core.layout import METRICS_NAME
from opensora_dist.observe.jsonl import LineFile, read_records, to_line


@dataclass(frozen=True, kw_only=True)
class StepMetrics:
    """The metrics of one optimizer step, over all ranks.

    Args:
        step: Steps done, this one included: the first is 1.
        loss: The global weighted loss.
        grad_norm: Global gradient norm before clipping.
        lr: Learning rate of the step.
        samples: Samples of this step's global batch.
        tokens: Tokens of this step's global batch.
        step_s: Seconds the step took, data wait included.
        data_wait_s: Seconds of it spent waiting for data.
        mfu: Model FLOPs over the hardware's peak, 0 to 1; None where the peak is not known.
        memory_bytes: Peak device memory, or resident memory on a CPU.
        batch_digest: Identity of the global batch.
        extra: Further values, under their own names.
    """

    step: int
    loss: float
    grad_norm: float
    lr: float
    samples: int
    tokens: int
    step_s: float
    data_wait_s: float
    mfu: float | None
    memory_bytes: int | None
    batch_digest: str
    extra: Mapping[str, Any] = field(default_factory=dict)

    def record(self) -> dict[str, Any]:
        """All values as one flat dict."""
        values = asdict(self)
        extra = values.pop("extra")
        assert not extra.keys() & values.keys(), f"extra metrics {sorted(extra)} hide built-in ones"
        return {**values, **extra}


class MetricLog:
    """Writes ``metrics.jsonl``. One process of a run has one: rank 0.

    Args:
        run_dir: The run directory; made if absent.
        steps_done: Step that the run goes on from, 0 at its start. Lines of later steps, which the interrupted run wrote after
            its last checkpoint, are removed first, so that each step stands in the file once.
    """

    def __init__(self, run_dir: Path, *, steps_done: int) -> None:
        path = Path(run_dir) / METRICS_NAME
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists():
            kept = [r for r in read_records(path) if r["step"] <= steps_done]
            with atomic_file(path) as handle:
                handle.write("".join(to_line(r) for r in kept).encode())
        self._lines = LineFile(path)

    def log(self, metrics: StepMetrics) -> None:
        """Adds one step; ``flush`` puts it on the disk."""
        self._lines.write(to_line(metrics.record()))

    def flush(self) -> None:
        """Hands everything to the disk; called at log steps and before a checkpoint is committed."""
        self._lines.sync()

    def close(self) -> None:
        """Flushes and closes; a second call does nothing."""
        self._lines.close()
