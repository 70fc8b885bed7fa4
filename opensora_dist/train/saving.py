"""Saving and resuming a run: tensors as safetensors, everything else as JSON and YAML a person can read."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from opensora_dist.checkpoint.commit import Resumable, commit, find_resumable
from opensora_dist.checkpoint.store import load_tensors, save_tensors
from opensora_dist.config.dataset import DatasetSpec
from opensora_dist.config.load import dump_yaml, load_config
from opensora_dist.config.train import TrainConfig
from opensora_dist.core.errors import CheckpointError
from opensora_dist.core.io import hash_bytes, read_json, write_json, write_text
from opensora_dist.core.layout import CHECKPOINTS_DIR, CONFIG_NAME
from opensora_dist.parallel.mesh import Mesh
from opensora_dist.parallel.zero.base import ZeroBackend
from opensora_dist.train.ema import Ema

TENSORS_DIR = "tensors"
DATASET_NAME = "dataset.json"
TRAINER_NAME = "trainer.json"

# A resumed run that changed one of these would not be the run that was started. model.init_from may change: it is past.
_FIXED = ("model", "objective", "data.global_batch", "data.loss_weight", "run.seed", "run.dtype")


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


class Saver:
    """Commits checkpoints of one run and finds the one to go on from.

    Args:
        run_dir: The run directory.
        config: The resolved config.
        spec: What the data set is made of; saved so that a checkpoint can be sampled from without the data.
    """

    def __init__(self, run_dir: Path, *, config: TrainConfig, spec: DatasetSpec, mesh: Mesh) -> None:
        self.root = Path(run_dir) / CHECKPOINTS_DIR
        self._config = config
        self._spec = spec
        self._mesh = mesh

    def save(self, backend: ZeroBackend, ema: Ema, state: TrainerState) -> Path:
        """Commits one checkpoint. Collective.

        Raises:
            CheckpointError: On every rank; older checkpoints are untouched.
        """
        config_yaml = dump_yaml(self._config)

        def write(folder: Path) -> None:
            save_tensors(backend.state_dict(ema=ema.shadow), folder / TENSORS_DIR, group=self._mesh.control)
            if self._mesh.is_main:
                write_text(folder / CONFIG_NAME, config_yaml)
                write_json(folder / DATASET_NAME, self._spec.model_dump(mode="json"))
                write_json(folder / TRAINER_NAME, asdict(state))

        metadata: dict[str, Any] = {
            "config_hash": hash_bytes(config_yaml.encode()),
            "layout": {"world": self._mesh.world, "zero_stage": self._config.parallel.zero.stage, "mesh": str(self._mesh)},
        }
        return commit(
            self.root,
            step=state.step,
            write=write,
            metadata=metadata,
            keep_last=self._config.checkpoint.keep_last,
            group=self._mesh.control,
        )

    def find(self) -> Resumable:
        """The newest checkpoint that verifies, and those passed over. Collective."""
        return find_resumable(self.root, group=self._mesh.control)

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


def _differences(saved: TrainConfig, now: TrainConfig) -> list[str]:
    """The keys that may not change and did, one sentence each."""
    before, after = (_keys(c.model_dump(mode="json", exclude={"model": {"init_from"}})) for c in (saved, now))
    return [
        f"{key} was {before.get(key, 'not there')!r}, now {after.get(key, 'not there')!r}"
        for key in dict.fromkeys([*before, *after])
        if any(key == fixed or key.startswith(f"{fixed}.") for fixed in _FIXED) and before.get(key, ...) != after.get(key, ...)
    ]


def _keys(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one, with dotted keys."""
    flat: dict[str, Any] = {}
    for name, value in values.items():
        flat |= _keys(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return flat
