"""The callbacks that watch over a training, as the config asks for them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import cast

from torch import nn
from torch.distributed.tensor import DTensor

from opensora_dist.config.train import TrainConfig
from opensora_dist.core.errors import TrainingError
from opensora_dist.core.logging import get_logger
from opensora_dist.data.loader import StepData
from opensora_dist.models.base import VideoTransformer
from opensora_dist.models.layers import Block
from opensora_dist.observe.events import append_event
from opensora_dist.ops.compiled import Compilations
from opensora_dist.parallel.mesh import Mesh
from opensora_dist.parallel.places import AxisName
from opensora_dist.parallel.zero.base import ZeroBackend
from opensora_dist.resilience.faults import Faults
from opensora_dist.resilience.nonfinite import NonFiniteGuard
from opensora_dist.resilience.replicas import Copies, ReplicaCheck
from opensora_dist.resilience.straggler import Probe, StragglerReport
from opensora_dist.resilience.watchdog import Watchdog
from opensora_dist.train.callbacks import Callback
from opensora_dist.train.ema import Ema
from opensora_dist.train.logbook import Logbook, LoggedStep, StepNote

_log = get_logger(__name__)


def guards(
    config: TrainConfig,
    *,
    mesh: Mesh,
    model: VideoTransformer,
    backend: ZeroBackend,
    ema: Ema,
    logbook: Logbook,
    faults: Faults,
    run_dir: Path,
) -> list[Callback]:
    """In the order in which the loop calls them.

    Args:
        model: The unwrapped model.
        faults: What goes wrong on purpose.
    """
    resilience, parts = config.resilience, list[Callback]()
    if config.run.compile != "off":
        parts.append(Compiling(Compilations(), logbook=logbook))
    if faults.asked:
        parts.append(Injected(faults, model=model, backend=backend, logbook=logbook))
    if resilience.watchdog_s:
        parts.append(
            Watched(
                Watchdog(
                    watchdog_s=resilience.watchdog_s,
                    run_dir=run_dir,
                    rank=mesh.rank,
                    world=mesh.world,
                    event=partial(append_event, run_dir),
                )
            )
        )
    parts.append(Finite(NonFiniteGuard(max_skipped=resilience.max_skipped_steps), logbook=logbook))
    if resilience.replica_check_every and mesh.world > 1:
        copies = copies_of(config, mesh=mesh, model=model, backend=backend, ema=ema)
        check = ReplicaCheck(copies, group=mesh.control, device=mesh.device)
        parts.append(Alike(check, every=resilience.replica_check_every, logbook=logbook))
    if mesh.world > 1:
        parts.append(
            OnTime(
                Probe(_probed(model), device=mesh.device),
                StragglerReport(ratio=resilience.straggler_ratio, group=mesh.control),
                logbook=logbook,
            )
        )
    return parts


class OnStart(Callback):
    """Calls something once the loop begins."""

    def __init__(self, call: Callable[[], None]) -> None:
        self._call = call

    def start(self, *, step: int) -> None:
        """The loop begins."""
        self._call()


class Compiling(Callback):
    """Says what compiling has cost, whenever something was compiled, or recorded as a CUDA graph."""

    def __init__(self, compilations: Compilations, *, logbook: Logbook) -> None:
        self._compilations, self._logbook, self._said = compilations, logbook, compilations.sofar

    def start(self, *, step: int) -> None:
        """Counts from here on."""
        self._compilations.start()

    def end(self) -> None:
        """Counts no more."""
        self._compilations.stop()

    def after_step(self, note: StepNote) -> None:
        """Counts are this rank's; only the main rank's are written."""
        sofar = self._compilations.sofar
        if sofar != self._said:
            self._said = sofar
            _log.info("%s", sofar)
            self._logbook.event("compiled", step=note.step, **asdict(sofar))


class Injected(Callback):
    """Faults on purpose; loud about it."""

    def __init__(self, faults: Faults, *, model: VideoTransformer, backend: ZeroBackend, logbook: Logbook) -> None:
        self._faults, self._backend, self._logbook = faults, backend, logbook
        faults.slow_down(_probed(model))

    def start(self, *, step: int) -> None:
        """Says what will happen."""
        for name, asked in self._faults.asked.items():
            _log.warning(
                "FAULT INJECTION IS ON: fault.%s=%s, once in this run directory; drop it where this is no drill", name, asked
            )
            self._logbook.event("fault_injected", fault=name, asked=asked)

    def before_step(self, data: StepData) -> None:
        """Steps of a config count from 1."""
        self._faults.arm(self._backend.model, step=data.step + 1)

    def after_step(self, note: StepNote) -> None:
        """Takes the fault out again."""
        self._faults.disarm(self._backend.weights, step=note.step)


class Watched(Callback):
    """Every turn of the loop is a sign of life."""

    def __init__(self, watchdog: Watchdog) -> None:
        self._watchdog = watchdog

    def start(self, *, step: int) -> None:
        """From here on; what came before has timeouts of its own."""
        self._watchdog.clock.step = step
        self._watchdog.start()

    def phase(self, name: str) -> None:
        """A sign of life."""
        self._watchdog.clock.turn(name)

    def before_step(self, data: StepData) -> None:
        """For the report of a hang."""
        self._watchdog.clock.step = data.step + 1

    def end(self) -> None:
        """The loop is over."""
        self._watchdog.stop()


class Finite(Callback):
    """Too many steps with non-finite gradients in a row end the run."""

    def __init__(self, guard: NonFiniteGuard, *, logbook: Logbook) -> None:
        self._guard, self._logbook = guard, logbook

    def after_flush(self, steps: Sequence[LoggedStep]) -> None:
        """All ranks are given the same steps."""
        with _noted(self._logbook, "not_finite"):
            self._guard.check(steps)


class Alike(Callback):
    """Compares copies before each save, and at the first log step after every so many steps: no sync between log steps."""

    def __init__(self, check: ReplicaCheck, *, every: int, logbook: Logbook) -> None:
        self._check, self._every, self._logbook = check, every, logbook
        self._checked = 0

    def start(self, *, step: int) -> None:
        """Of what all ranks have read or made, too."""
        self._compare(step)

    def after_flush(self, steps: Sequence[LoggedStep]) -> None:
        """Where one is due."""
        if steps and steps[-1].step - self._checked >= self._every:
            self._compare(steps[-1].step)

    def before_save(self, *, step: int) -> None:
        """What differs is not saved."""
        if step != self._checked:
            self._compare(step)

    def _compare(self, step: int) -> None:
        with _noted(self._logbook, "replicas_differ"):
            self._check.check(step=step)
        self._checked = step


class OnTime(Callback):
    """Names ranks that are slower than the others."""

    def __init__(self, probe: Probe, report: StragglerReport, *, logbook: Logbook) -> None:
        self._probe, self._report, self._logbook = probe, report, logbook

    def after_step(self, note: StepNote) -> None:
        """Without a wait for the device."""
        self._probe.end_step()

    def after_flush(self, steps: Sequence[LoggedStep]) -> None:
        """The device is past these steps."""
        if not steps:
            return
        own = zip(self._probe.read(), steps, strict=True)
        for s in self._report.check([(*probed, step.data_wait_s, step.step_s) for probed, step in own]):
            self._logbook.event("straggler", **asdict(s))
            said = "rank %d is a straggler: its own work (%s) took %.2f times the other ranks' over the last %d steps"
            _log.warning(said, s.rank, s.what, s.ratio, s.steps)


def copies_of(config: TrainConfig, *, mesh: Mesh, model: VideoTransformer, backend: ZeroBackend, ema: Ema) -> list[Copies]:
    """What several ranks hold alike: weights and their average over every axis that doesn't shard them, buffers on every rank."""
    data_axes = {AxisName.DP_SHARD, AxisName.RING, AxisName.ULYSSES} if config.parallel.zero.stage else set[AxisName]()
    split = {name for name, p in model.named_parameters() if _is_split(p)}
    copies = [Copies(tensors=dict(model.named_buffers()), holders=_holders(mesh, sharded=set()))]
    for names, axes in ((split, data_axes | {AxisName.TP}), (backend.weights.keys() - split, data_axes)):
        tensors = {name: w for name, w in backend.weights.items() if name in names}
        tensors |= {f"ema.{name}": w for name, w in ema.shadow.items() if name in names}
        copies.append(Copies(tensors=tensors, holders=_holders(mesh, sharded=axes)))
    return copies


def _is_split(param: nn.Parameter) -> bool:
    """Whether ranks of ``tp`` hold parts of a parameter."""
    if not isinstance(param, DTensor):
        return False
    names = param.device_mesh.mesh_dim_names or ()
    return AxisName.TP in names and param.placements[names.index(AxisName.TP)].is_shard()


def _holders(mesh: Mesh, *, sharded: set[AxisName]) -> list[list[int]]:
    """Ranks in the same place along the ``sharded`` axes, for each such place."""
    ranks, names = mesh.device_mesh.mesh, mesh.device_mesh.mesh_dim_names
    assert names is not None
    fixed = [i for i, name in enumerate(names) if name in sharded]
    free = [i for i, name in enumerate(names) if name not in sharded]
    places = ranks.permute(*fixed, *free).reshape(-1, *[ranks.shape[i] for i in free]).flatten(1)
    lines: list[list[int]] = places.tolist()
    return lines


def _probed(model: VideoTransformer) -> nn.Module:
    """A module of plain computation, the same on every rank. It is called as a module; ``fc1`` is not, whose GELU goes with it."""
    return cast(Block, model.blocks[0]).mlp.fc2


@contextmanager
def _noted(logbook: Logbook, event: str) -> Iterator[None]:
    """Notes in the event log what ends the run."""
    try:
        yield
    except TrainingError as error:
        logbook.event(event, error=str(error))
        raise
