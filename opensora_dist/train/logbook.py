"""One metrics line per step, without a host sync per step: results stay on the device and are read at log steps together."""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from opensora_dist.core.logging import get_logger
from opensora_dist.core.types import Thw
from opensora_dist.observe.events import EventLog
from opensora_dist.observe.metrics import MetricLog, StepMetrics
from opensora_dist.observe.progress import TrainProgress
from opensora_dist.observe.trackers import Trackers
from opensora_dist.parallel.mesh import Mesh
from opensora_dist.train.step import StepResult

_log = get_logger(__name__)


@dataclass(frozen=True, kw_only=True)
class StepNote:
    """What the host knows of a step.

    Args:
        step: Optimizer steps done, this one included.
        shapes: Latent shapes of its samples.
        samples: Samples of this step, over all ranks.
        tokens: Tokens of this step, over all ranks.
        budget_tokens: How many it had room for; None where it has as many as its samples have.
        flops: Model FLOPs of this step, forward and backward, over all ranks.
        step_s: Seconds from the last step's edge to this one's, without validation and saving.
        data_wait_s: Seconds of these that this rank waited for data.
        epoch: How often the data set was gone through before.
        digest: Identity of the global batch, as it was planned.
        bad_samples: Samples of it that were replaced, of those that this rank answers for.
        left_out: Samples that no pack of it had room for, over all ranks; None where there are no packs.
        result: What the step left on the device.
    """

    step: int
    lr: float
    shapes: tuple[Thw, ...]
    samples: int
    tokens: int
    budget_tokens: int | None
    flops: int
    step_s: float
    data_wait_s: float
    epoch: int
    digest: str
    bad_samples: int
    left_out: int | None = None
    result: StepResult


@dataclass(frozen=True, kw_only=True)
class LoggedStep:
    """What all ranks know of a step once it has been logged.

    Args:
        loss: Of the global batch.
        grad_norm: Before clipping.
        skipped: No weight moved, since the norm was not finite.
        digest: Identity of the global batch, as it was planned.
        bad_samples: Samples of it that could not be read and were replaced, over all ranks.
        bad_ranks: Ranks whose share of the loss is not finite.
        step_s: Seconds, on this rank; on a GPU the mean of the steps logged together, whose sum alone is known.
        data_wait_s: Seconds of these that this rank waited for data.
    """

    step: int
    loss: float
    grad_norm: float
    skipped: bool
    digest: str
    bad_samples: int
    bad_ranks: tuple[int, ...]
    step_s: float
    data_wait_s: float


class Logbook:
    """Collects steps on every rank, and writes them on the main one.

    Args:
        metrics: metrics.jsonl; None on ranks that don't write.
        events: events.jsonl; None likewise.
        progress: The display; None likewise.
        trackers: wandb, TensorBoard; None on ranks that don't write.
        peak_flops: Peak of one rank's device, for MFU; None where it isn't known.
        watch: Called with each step whose own time is known; what it returns is noted as the event ``sequence_measured``.
    """

    def __init__(
        self,
        *,
        mesh: Mesh,
        metrics: MetricLog | None,
        events: EventLog | None,
        progress: TrainProgress | None,
        trackers: Trackers | None,
        peak_flops: float | None,
        watch: Callable[[StepNote], dict[str, Any] | None] | None,
    ) -> None:
        self._mesh, self._metrics, self._events, self._progress = mesh, metrics, events, progress
        self._trackers, self._peak_flops, self._watch = trackers, peak_flops, watch
        self._notes: list[StepNote] = []
        self._seen: set[tuple[Thw, ...]] = set()

    def event(self, name: str, **fields: object) -> None:
        """Notes something that happened once; the main rank writes it."""
        if self._events is not None:
            self._events.log(name, fields)

    def add(self, note: StepNote) -> None:
        """Keeps a step until the next flush; no sync."""
        self._notes.append(note)

    def flush(self) -> list[LoggedStep]:
        """Sums losses over ranks, writes one line per step. Collective: every rank calls it after the same steps."""
        notes, self._notes = self._notes, []
        if not notes:
            return []
        device = torch.stack([torch.stack([n.result.loss, n.result.grad_norm, n.result.skipped]).double() for n in notes])
        host = torch.tensor([[n.data_wait_s, n.bad_samples] for n in notes], dtype=torch.float64)
        asked = time.perf_counter()
        local = torch.cat([device.cpu(), host], dim=1)
        if self._mesh.device.type == "cuda":
            # The host ran ahead and waited for the device only now: the window's time is known, how it parts over steps is not.
            step_s = (sum(n.step_s for n in notes) + time.perf_counter() - asked) / len(notes)
            notes = [replace(n, step_s=step_s) for n in notes]
        ranks = [torch.empty_like(local) for _ in range(self._mesh.world)]
        # Gathered and summed by rank here: an all-reduce's order of summation depends on how many steps share it.
        dist.all_gather(ranks, local, group=self._mesh.control)
        table = torch.stack(ranks)
        losses = table[:, :, 0]
        finite = torch.isfinite(losses)
        logged = [
            LoggedStep(
                step=note.step,
                loss=loss,
                grad_norm=grad_norm,
                skipped=bool(skipped),
                digest=note.digest,
                bad_samples=int(bad),
                bad_ranks=tuple((~fine).nonzero().flatten().tolist()),
                step_s=note.step_s,
                data_wait_s=note.data_wait_s,
            )
            for note, loss, (grad_norm, skipped), bad, fine in zip(
                notes,
                losses[:: self._mesh.tp_size].sum(0).tolist(),  # ranks of tp have the same tokens
                local[:, 1:3].tolist(),
                table[:, :, 4].sum(0).tolist(),
                finite.unbind(1),
                strict=True,
            )
        ]
        self._write(notes, logged, waits_s=table[:, :, 3].amax(0).tolist())
        return logged

    def _write(self, notes: Sequence[StepNote], logged: Sequence[LoggedStep], *, waits_s: Sequence[float]) -> None:
        if self._metrics is None:
            return
        window = [
            self._metrics_of(note, step, data_wait_s=wait_s) for note, step, wait_s in zip(notes, logged, waits_s, strict=True)
        ]
        for metrics, step in zip(window, logged, strict=True):
            self._metrics.log(metrics)
            if self._trackers is not None:
                self._trackers.log(metrics.step, _numbers(metrics))
            if step.skipped:
                norm, ranks = str(step.grad_norm), list(step.bad_ranks)
                self.event("step_skipped", step=step.step, batch_digest=step.digest, grad_norm=norm, ranks=ranks)
                where = f"loss not finite on ranks {ranks}" if ranks else "every rank's loss is finite"
                _log.warning("step %d skipped: its gradient norm is %s (batch %s; %s)", step.step, norm, step.digest, where)
        self._metrics.flush()
        for note in self._timed(notes):
            if self._watch is not None and (measured := self._watch(note)) is not None:
                self.event("sequence_measured", **measured)
        if self._progress is not None:
            self._progress.update(window)

    def _timed(self, notes: Sequence[StepNote]) -> Sequence[StepNote]:
        """Those whose ``step_s`` is that of their shapes: on a GPU of a window of steps alike, which is not the first of its kind."""
        if self._mesh.device.type != "cuda":
            return notes
        shapes = {note.shapes for note in notes}
        known = shapes <= self._seen
        self._seen |= shapes
        return notes if known and len(shapes) == 1 else ()

    def show_videos(self, rounds: Sequence[tuple[int, list[Path]]]) -> None:
        """Hands finished validation videos, by step, to the trackers."""
        if self._trackers is not None:
            for step, paths in rounds:
                for path in paths:
                    self._trackers.log_video(step, f"validation/{path.stem}", path)

    def _metrics_of(self, note: StepNote, logged: LoggedStep, *, data_wait_s: float) -> StepMetrics:
        peak = self._peak_flops
        return StepMetrics(
            step=note.step,
            loss=logged.loss,
            grad_norm=logged.grad_norm,
            lr=note.lr,
            samples=note.samples,
            tokens=note.tokens,
            step_s=note.step_s,
            data_wait_s=data_wait_s,
            mfu=note.flops / note.step_s / (peak * self._mesh.world) if peak else None,
            memory_bytes=memory_bytes(self._mesh.device),
            batch_digest=note.digest,
            extra={"epoch": note.epoch, "skipped": logged.skipped, "bad_samples": logged.bad_samples} | _packing(note),
        )


def _packing(note: StepNote) -> dict[str, float]:
    """How much of the room for tokens was used, where there is a budget; and how many samples had no room, where there are packs."""
    found = {} if note.budget_tokens is None else {"packing_efficiency": note.tokens / note.budget_tokens}
    return found if note.left_out is None else found | {"left_out": note.left_out}


def _numbers(metrics: StepMetrics) -> dict[str, float]:
    return {name: float(v) for name, v in metrics.record().items() if isinstance(v, int | float)}


def memory_bytes(device: torch.device) -> int:
    """Peak memory of this process: of the CUDA allocator on a GPU, resident on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
