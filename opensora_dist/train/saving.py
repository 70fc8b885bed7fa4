"""Saving and resuming a run: tensors as safetensors, everything else as JSON and YAML a person can read."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from opensora_dist.checkpoint.commit import Resumable, commit, find_resumable
from opensora_dist.checkpoint.staging import Staging
from opensora_dist.checkpoint.store import load_tensors, save_tensors
from opensora_dist.config.data_rules import mixture_name
from opensora_dist.config.dataset import DatasetSpec
from opensora_dist.config.load import dump_yaml, load_config
from opensora_dist.config.train import TrainConfig
from opensora_dist.core.errors import CheckpointError
from opensora_dist.core.io import hash_bytes, read_json, write_json, write_text
from opensora_dist.core.layout import CHECKPOINTS_DIR, CONFIG_NAME
from opensora_dist.parallel.failures import lost_contact_said
from opensora_dist.parallel.mesh import Mesh
from opensora_dist.parallel.zero.base import ZeroBackend
from opensora_dist.train.ema import Ema

TENSORS_DIR = "tensors"
DATASET_NAME = "dataset.json"
TRAINER_NAME = "trainer.json"

# A resumed run that changed one of these would not be the run that was started. model.init_from may change: it is past.
_FIXED = (
    "model",
    "objective",
    *(f"data.{name}" for name in ("global_batch", "batching", "unit_tokens", "image_share", "shuffle_shards", "loss_weight")),
    "data.mixture",
    "run.seed",
    "run.dtype",
)


@dataclass(frozen=True, kw_only=True)
class TrainerState:
    """What a run knows besides its tensors. The data order needs no more than the step: it is a pure function.

    Args:
        step: Optimizer steps done, skipped ones included.
        optimizer_steps: Steps that moved weights; AdamW's bias correction counts these.
        samples: Samples seen.
        tokens: Tokens seen.
        seed: The run's seed.
        dataset_hash: Identity of the data set.
    """

    step: int
    optimizer_steps: int
    samples: int
    tokens: int
    seed: int
    dataset_hash: str


@dataclass(frozen=True, kw_only=True)
class SaveOutcome:
    """How a save ended. All ranks learn the same, not at the same moment.

    Args:
        step: Of the checkpoint.
        path: The committed folder; None where it failed.
        error: Why it failed. A ``CheckpointError`` is raised on all ranks alike; any other ends the run.
        seconds: From the copy of the state to the commit.
        stall_s: Seconds of these that this rank's training waited.
    """

    step: int
    path: Path | None
    error: Exception | None
    seconds: float
    stall_s: float


class Saver:
    """Commits checkpoints of one run and finds the one to go on from.

    With ``checkpoint.asynchronous`` a save copies the state to CPU memory and goes on; a thread of each rank writes the copy, over a
    group of its own. The thread is no reason for a process not to end: whoever needs the checkpoint waits for it.

    Args:
        run_dir: The run directory.
        config: The resolved config.
        spec: What the data set is made of; saved so that a checkpoint can be sampled from without the data.
        on_phase: Called on every rank at the start of each phase of a save, ``checkpoint.commit.SAVE_PHASES``; all but ``copy`` in the
            thread, where there is one.
    """

    def __init__(
        self,
        run_dir: Path,
        *,
        config: TrainConfig,
        spec: DatasetSpec,
        mesh: Mesh,
        on_phase: Callable[[str], None] = lambda _: None,
    ) -> None:
        self.root = Path(run_dir) / CHECKPOINTS_DIR
        self._config = config
        self._spec = spec
        self._mesh = mesh
        self._on_phase = on_phase
        self._staging = Staging()
        self._rejected: set[str] = set()
        self._write: _Write | None = None

    def begin(self, backend: ZeroBackend, ema: Ema, state: TrainerState) -> None:
        """Starts a save; the last one's outcome must have been taken. Collective. Synchronous ones are over when this returns."""
        assert self._write is None, "a save is under way"
        began = time.perf_counter()
        self._on_phase("copy")
        if self._config.checkpoint.asynchronous or self._config.parallel.zero.backend != "native":
            tensors = self._staging.copy(backend.state_parts(ema=ema.shadow))
        else:  # a native state is live memory, which training leaves alone meanwhile
            tensors = backend.state_dict(ema=ema.shadow)
        timeout_s = self._config.parallel.timeout_s
        self._write = _Write(
            lambda: self._commit(tensors, state), step=state.step, began=began, mesh=self._mesh, timeout_s=timeout_s
        )
        if self._config.checkpoint.asynchronous:
            self._write.start()
        else:
            self._write.run()
        self._write.stall_s = time.perf_counter() - began

    @property
    def under_way(self) -> int | None:
        """The step of a save whose outcome has not been taken."""
        return None if self._write is None else self._write.step

    def poll(self) -> SaveOutcome | None:
        """The outcome of a save that is over, once; None otherwise. At its own moment on each rank: nothing collective may follow."""
        return self.wait(limit_s=0.0)

    def wait(self, *, limit_s: float | None = None) -> SaveOutcome | None:
        """Waits for the save that is under way; its outcome, or None where there is none, or it is not over in time."""
        write = self._write
        if write is None:
            return None
        began = time.perf_counter()
        over = write.over.wait(limit_s)
        write.stall_s += time.perf_counter() - began
        if not over:
            return None
        self._write = None
        return SaveOutcome(step=write.step, path=write.path, error=write.error, seconds=write.seconds, stall_s=write.stall_s)

    def _commit(self, tensors: dict[str, Tensor], state: TrainerState) -> Path:
        config_yaml = dump_yaml(self._config)

        def write(folder: Path) -> None:
            save_tensors(tensors, folder / TENSORS_DIR, group=self._mesh.saving)
            self._on_phase("describe")
            if self._mesh.is_main:
                write_text(folder / CONFIG_NAME, config_yaml)
                write_json(folder / DATASET_NAME, self._spec.model_dump(mode="json"))
                write_json(folder / TRAINER_NAME, asdict(state))

        zero = self._config.parallel.zero
        metadata: dict[str, Any] = {
            "config_hash": hash_bytes(config_yaml.encode()),
            "layout": {
                "world": self._mesh.world,
                "backend": zero.backend,
                "zero_stage": zero.stage,
                "dtype": self._config.run.dtype,
                "mesh": str(self._mesh),
            },
        }
        folder = commit(
            self.root,
            step=state.step,
            write=write,
            metadata=metadata,
            keep_last=self._config.checkpoint.keep_last,
            group=self._mesh.saving,
            on_phase=self._on_phase,
            rejected=self._rejected,
        )
        self._rejected.discard(folder.name)  # replaced by this one
        return folder

    def find(self) -> Resumable:
        """The newest checkpoint that verifies, and those passed over, which saves will not count as kept. Collective."""
        found = find_resumable(self.root, group=self._mesh.control)
        self._rejected = {r.path.name for r in found.rejected}
        return found

    def load(self, folder: Path, backend: ZeroBackend, ema: Ema, *, dataset_hash: str) -> TrainerState:
        """Fills weights, moments and average in place. Collective.

        Raises:
            CheckpointError: The run that wrote it was another: all differences are named.
        """
        state = TrainerState(**read_json(folder / TRAINER_NAME))
        problems = _differences(load_config(TrainConfig, folder / CONFIG_NAME), self._config)
        if state.dataset_hash != dataset_hash:
            problems.append(f"data.path={self._config.data.path!r} holds another data set than the run was started with")
        if problems:
            raise CheckpointError(
                f"{folder} can't be resumed with this config:\n"
                + "\n".join(f"  {p}" for p in problems)
                + "\nundo these changes, or start a new run with another run.dir"
            )
        tensors = backend.state_dict(ema=ema.shadow)
        load_tensors(tensors, folder / TENSORS_DIR, group=self._mesh.control)
        backend.load_state_dict(tensors, ema=ema.shadow, steps=state.optimizer_steps)
        return state


class _Write:
    """One save on its way to the disk, in a thread or in the caller's."""

    def __init__(self, commit: Callable[[], Path], *, step: int, began: float, mesh: Mesh, timeout_s: float) -> None:
        self.step, self.stall_s, self.seconds = step, 0.0, 0.0
        self.path: Path | None = None
        self.error: Exception | None = None
        self.over = threading.Event()
        self._commit, self._began, self._device, self._timeout_s = commit, began, mesh.device, timeout_s

    def start(self) -> None:
        """In a thread that ends with the process, whatever it waits for."""
        threading.Thread(target=self.run, name="checkpoint", daemon=True).start()

    def run(self) -> None:
        """Until the checkpoint is committed, or has failed."""
        try:
            if self._device.type == "cuda":
                torch.cuda.set_device(self._device)  # a thread starts on the first one
            with torch.no_grad(), lost_contact_said(timeout_s=self._timeout_s):
                self.path = self._commit()
        except Exception as error:  # noqa: BLE001 - whoever takes the outcome raises it or says it
            self.error = error
        finally:
            self.seconds = time.perf_counter() - self._began
            self.over.set()


def _differences(saved: TrainConfig, now: TrainConfig) -> list[str]:
    """The keys that may not change and did, one sentence each."""
    before, after = (_keys(c.model_dump(mode="json", exclude={"model": {"init_from"}}) | _weights(c)) for c in (saved, now))
    return [
        f"{key} was {before.get(key, 'not there')!r}, now {after.get(key, 'not there')!r}"
        for key in dict.fromkeys([*before, *after])
        if any(key == fixed or key.startswith(f"{fixed}.") for fixed in _FIXED) and before.get(key, ...) != after.get(key, ...)
    ]


def _weights(config: TrainConfig) -> dict[str, Any]:
    """Of a mixture, by name; where its data sets lie may change."""
    data = config.model_dump(mode="json")["data"]
    return {"data": data | {"mixture": {mixture_name(entry): entry.weight for entry in config.data.mixture}}}


def _keys(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one, with dotted keys."""
    flat: dict[str, Any] = {}
    for name, value in values.items():
        flat |= _keys(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return flat
