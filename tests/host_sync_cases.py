"""The training loop on a pretended GPU, in a process of its own: where its host would wait for the device."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from itertools import count
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from opensora_dist.config.train import IddpmConfig, ModelConfig, OptimConfig, ParallelConfig, RunConfig, TrainConfig
from opensora_dist.core.types import Thw
from opensora_dist.data.loader import StepData
from opensora_dist.diffusion.iddpm import Iddpm
from opensora_dist.ops.choice import Choice, using
from opensora_dist.parallel.sequence.agree import Agreement
from opensora_dist.plan.memory import MemoryCase
from opensora_dist.recipes.bench.scale import simulated
from opensora_dist.recipes.bench.training import Training
from opensora_dist.recipes.guards import guards
from opensora_dist.resilience.faults import Faults
from opensora_dist.train.callbacks import Callback, Callbacks
from opensora_dist.train.logbook import Logbook
from opensora_dist.train.loop import BatchCost, Trainer
from opensora_dist.train.saving import TrainerState

ALLOWED = {
    "opensora_dist.train.logbook:Logbook.flush": "log steps, and before a save: losses of all steps since, in one copy",
    "opensora_dist.parallel.zero.native:NativeBackend.optimizer_steps": "a save notes how many steps AdamW has taken",
}
"""Where a training on one GPU or many may wait for the device, and why. A save itself copies in ``train.saving``, which is left out here,
and so are the replica check (every ``resilience.replica_check_every`` steps), validation videos, and samples that can't be read."""


@dataclass(frozen=True)
class Layout:
    """A rank of a simulated world.

    Args:
        packed: Samples of two shapes are run at once, as one sequence.
    """

    world: int = 1
    parallel: dict[str, Any] = field(default_factory=dict)
    dtype: str = "float32"
    model: str = "stdit"
    kernels: str = "torch"
    packed: bool = False


@dataclass(frozen=True)
class Seen:
    """What the second step and what follows it did.

    Args:
        waited: Functions of ``ALLOWED`` in which the host waited.
        sent: Shapes of what was copied to the device.
    """

    waited: list[str]
    sent: list[tuple[int, ...]]


def watch(layout: Layout) -> Seen:
    """Two steps of ``train.loop``, a log and a save; raises at the first wait that isn't allowed. Not in a process with other tests."""
    from pretended_gpu import GPU, PretendedGpu

    gpu = PretendedGpu(allowed=list(ALLOWED))
    with simulated(layout.world), using(Choice(kernels=layout.kernels)), gpu, tempfile.TemporaryDirectory() as folder:  # type: ignore[arg-type]
        trainer = _trainer(layout, GPU, run_dir=Path(folder), watching=_Watching(gpu))
        trainer.run()
    return Seen(waited=gpu.waited, sent=gpu.sent)


def watch_iddpm() -> None:
    """Its loss and gradient, once its schedule is on the device; raises where the host would wait."""
    from pretended_gpu import GPU, PretendedGpu

    with PretendedGpu() as gpu:
        objective = Iddpm(IddpmConfig())
        x0, noise = (torch.ones(2, 4, 2, 4, 4, device=GPU) for _ in range(2))
        output, levels = torch.ones(2, 8, 2, 4, 4, device=GPU, requires_grad=True), torch.ones(2, dtype=torch.float64, device=GPU)
        for gpu.strict in (False, True):
            objective.timestep(levels)
            noised = objective.corrupt(x0, noise, levels)
            (objective.loss(output, x0=x0, noise=noise, level_B=levels) * noised.mean(dim=1)).sum().backward()


def found(wait: Callable[[Tensor], object]) -> str | None:
    """What is said of a wait by the host, which is handed a number of the device; None where none is noticed."""
    from pretended_gpu import GPU, HostSync, PretendedGpu

    with PretendedGpu() as gpu:
        number = torch.ones((), device=GPU)
        gpu.strict = True
        try:
            wait(number)
        except (HostSync, NotImplementedError) as error:  # torch itself makes no tensor of numbers from Python on such a device
            return str(error)
    return None


class _Watching(Callback):
    """From the second step on; in the first, tables are made that are kept."""

    def __init__(self, gpu: Any) -> None:
        self._gpu, self._steps = gpu, count()

    def before_step(self, data: StepData) -> None:
        self._gpu.strict = next(self._steps) > 0


class _Alike(Agreement):
    """Ranks that don't exist are about to do what this one is."""

    def _gather(self, numbers: Any) -> list[list[int]]:
        return [list(numbers) for _ in self._ranks]


def _trainer(layout: Layout, device: Any, *, run_dir: Path, watching: Callback) -> Trainer:
    parallel = ParallelConfig(**layout.parallel)
    case = MemoryCase(
        model=ModelConfig(name=layout.model, depth=1, width=32, heads=4),  # type: ignore[arg-type]
        parallel=parallel,
        world=layout.world,
        latent=Thw(4, 8, 4),
        dtype=layout.dtype,
        micro_batch=2,
        text_tokens=5,
        max_tokens=5,
        text_width=16,
    )
    training = Training(case, device)
    training.shards._agreement = _Alike(training.mesh)
    micros, packs = training.micros, ()
    if layout.packed:
        training.case = replace(case, latent=Thw(2, 4, 4))
        micros, packs = [*micros, *training._micros()], (2,)
    steps = [
        StepData(
            step=step,
            epoch=0,
            digest="",
            micros=list(micros),
            substitute=lambda micro, _bad, _attempt: micro,
            shapes={case.latent: 2},
            packs=packs,
        )
        for step in (0, 1)
    ]
    config = TrainConfig(
        run=RunConfig(steps=2, log_every=2, dir=str(run_dir)),
        parallel=parallel,
        optim=OptimConfig(),
        resilience={"watchdog_s": 0},
    )
    logbook = Logbook(mesh=training.mesh, metrics=None, events=None, progress=None, trackers=None, peak_flops=None, watch=None)
    faults = Faults(config.fault, run_dir=run_dir, rank=training.mesh.rank)
    watched = guards(
        config.model_copy(update={"resilience": config.resilience.model_copy(update={"replica_check_every": 0})}),
        mesh=training.mesh,
        model=training.model,
        backend=training.backend,
        ema=training.ema,
        logbook=logbook,
        faults=faults,
        run_dir=run_dir,
    )
    saver: Any = SimpleNamespace(poll=lambda: None, wait=lambda **_: None, begin=lambda *_: None, under_way=None)
    return Trainer(
        config,
        run_dir=run_dir,
        mesh=training.mesh,
        keys=training.keys,
        backend=training.backend,
        ema=training.ema,
        objective=training.objective,
        state=TrainerState(step=0, optimizer_steps=0, samples=0, tokens=0, seed=0, dataset_hash=""),
        make_loader=lambda _step: _Steps(steps),  # type: ignore[arg-type,return-value]
        shards=training.shards.shard,
        agree=training.shards.agree,
        cost=lambda _latent, _tokens: BatchCost(tokens=1, flops=1),
        budget_tokens=None,
        saver=saver,
        validator=None,
        logbook=logbook,
        callback=Callbacks([watching, *watched]),
    )


class _Steps(nullcontext):  # type: ignore[type-arg]
    """In place of a loader."""

    last_wait_s = 0.0

    def __init__(self, steps: list[StepData]) -> None:
        super().__init__(self)
        self._steps = steps

    def __iter__(self) -> Any:
        return iter(self._steps)


def read_by_item(loss: Tensor) -> object:
    return loss.item()


def branch(loss: Tensor) -> object:
    return bool(loss > 0)


def copy_to_the_host(loss: Tensor) -> object:
    return loss.cpu()


def positions_of_what_is_true(loss: Tensor) -> object:
    return loss[None].nonzero()


def index_by_booleans(loss: Tensor) -> object:
    return loss[None][loss[None] > 0]


def compare(loss: Tensor) -> object:
    return loss.equal(loss)


def numbers_from_python(loss: Tensor) -> object:
    return loss.new_tensor([1.0, 2.0])


def pageable_copy(loss: Tensor) -> object:
    return torch.ones(3).to(loss.device, non_blocking=True)


def copy_that_is_waited_for(loss: Tensor) -> object:
    return torch.ones(3).pin_memory().to(loss.device)


def wait_for_the_device(loss: Tensor) -> object:
    return torch.get_device_module(loss.device).synchronize()


PLANTED = [
    read_by_item,
    branch,
    copy_to_the_host,
    positions_of_what_is_true,
    index_by_booleans,
    compare,
    numbers_from_python,
    pageable_copy,
    copy_that_is_waited_for,
    wait_for_the_device,
]
"""Each makes the host wait; each must be found."""
