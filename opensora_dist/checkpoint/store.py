"""Tensors to safetensors and back, sharded and resharded by torch's distributed checkpoint (DCP).

Each rank writes one ``shard-<rank+1>-model-00001-of-00001.safetensors`` with its own shards; what several ranks hold alike is
written once. Where a shard lies in its tensor stands in the file's header, so any world size reads what any other wrote, and
nothing here is unpickled.

What DCP's Hugging Face storage (torch 2.13) leaves to its caller, and is done here:
- it refuses tensors that aren't contiguous, so they are packed first;
- the reader takes every ``*.safetensors`` in the folder, so a folder that already holds one is refused: a shard left by an
  earlier save of more ranks would be read as part of this one;
- the reader takes a tensor's size from the shards it finds, and casts silently, so coverage, shape and dtype are checked first;
- its errors are a ``BaseException`` with every rank's traceback; here they are a ``CheckpointError`` with every rank's reason.
Checks run inside DCP's own collective phases, so that one rank's problem is raised on all ranks instead of hanging the others.
"""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.checkpoint._hf_utils import (
    CUSTOM_METADATA_KEY,
    DCP_VERSION_KEY,
    FORMAT_KEY,
    FORMAT_VALUE,
    HF_DCP_VERSION,
    SAVED_OFFSETS_KEY,
    _gen_file_name,
)
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner
from torch.distributed.checkpoint.state_dict_loader import load as dcp_load
from torch.distributed.checkpoint.state_dict_saver import save as dcp_save
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from opensora_dist.core.errors import CheckpointError

_SUFFIX = ".safetensors"


def save_tensors(tensors: Mapping[str, Tensor], folder: Path, *, group: dist.ProcessGroup | None = None) -> None:
    """Writes tensors into a new folder of safetensors. Collective, if torch.distributed is initialised.

    Args:
        tensors: Name to Tensor (the same on every rank) or DTensor (each rank writes its shard, empty ones included). Every rank
            passes the same names.
        folder: Made if absent; must hold no safetensors yet.
        group: Ranks that take part, best a CPU (gloo) group; None is all of them.
    Raises:
        CheckpointError: On every rank, naming the ranks that failed and why.
    """
    folder = Path(folder)
    packed: dict[str, Any] = {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
    alone = not dist.is_initialized()
    with _dcp_errors("write", folder, alone=alone):
        dcp_save(
            packed,
            storage_writer=_Writer(str(folder), save_distributed=True),
            planner=DefaultSavePlanner(flatten_state_dict=False, flatten_sharded_tensors=False),
            process_group=group,
            no_dist=alone,
        )


def load_tensors(tensors: Mapping[str, Tensor], folder: Path, *, group: dist.ProcessGroup | None = None) -> None:
    """Fills preallocated tensors in place. Collective, if torch.distributed is initialised.

    Each rank reads only what its shards need. The folder may hold more names than are asked for.

    Args:
        tensors: Name to Tensor or DTensor on its final device; shape and dtype must be those that were saved.
        folder: Written by ``save_tensors`` at any world size.
        group: As in ``save_tensors``.
    Raises:
        CheckpointError: Names, shapes or dtypes that don't fit (all of them are listed), or a damaged file.
    """
    _load(tensors, folder, group=group, no_dist=not dist.is_initialized())


def read_tensors(folder: Path, *, prefix: str = "") -> dict[str, Tensor]:
    """All tensors of a folder, whole and on the CPU, for sampling and export. Not collective: one process may call it alone.

    Args:
        folder: Written by ``save_tensors``.
        prefix: Only names that start with it; names are returned as they are stored.
    Raises:
        CheckpointError: Not a folder of safetensors, or a damaged one.
    """
    folder = Path(folder)
    try:
        stored = _metadata(folder)
    except Exception as error:  # safetensors has its own error types; all mean damage here
        raise CheckpointError(f"{folder}: can't be read ({error}); use another checkpoint beside it") from error
    tensors = {
        name: torch.empty(entry.size, dtype=entry.properties.dtype)
        for name, entry in sorted(stored.items())
        if name.startswith(prefix)
    }
    if not tensors:
        raise CheckpointError(f"{folder}: holds no tensor named {prefix}*; it has {len(stored)} others")
    _load(tensors, folder, group=None, no_dist=True)
    return tensors


def _load(tensors: Mapping[str, Tensor], folder: Path, *, group: dist.ProcessGroup | None, no_dist: bool) -> None:
    folder = Path(folder)
    targets: dict[str, Any] = {name: tensor.detach() for name, tensor in tensors.items()}
    with _dcp_errors("read", folder, alone=no_dist):
        dcp_load(
            targets,
            storage_reader=_Reader(folder, targets),
            planner=DefaultLoadPlanner(flatten_state_dict=False, flatten_sharded_tensors=False),
            process_group=group,
            no_dist=no_dist,
        )


class _Writer(HuggingFaceStorageWriter):
    """Refuses a folder that already holds shards, and writes from where the tensors are.

    Torch's own makes the whole file in memory first, and holds the interpreter for as long: training beside it would stand still.
    """

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        if any(Path(self.path).glob(f"*{_SUFFIX}")):
            raise CheckpointError(f"{self.path}: already holds {_SUFFIX} files; save into an empty folder")
        return super().prepare_local_plan(plan)

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        tensors = {item.index.fqn: planner.resolve_data(item).detach().cpu() for item in plan.items}  # type: ignore[union-attr]
        offsets = {item.index.fqn: {SAVED_OFFSETS_KEY: list(item.tensor_data.chunk.offsets)} for item in plan.items}  # type: ignore[union-attr]
        if tensors:
            said = {CUSTOM_METADATA_KEY: json.dumps(offsets), DCP_VERSION_KEY: HF_DCP_VERSION, FORMAT_KEY: FORMAT_VALUE}
            name = _gen_file_name(1, 1, plan.storage_data["shard_index"])
            save_file(tensors, Path(self.path) / name, metadata={key: str(value) for key, value in said.items()})
        done: Future[list[WriteResult]] = Future()
        done.set_result([])  # for an index of files, which is not written: each file says what it holds
        return done


class _Reader(HuggingFaceStorageReader):
    """Checks that what is stored fits what is asked for, before anything is read."""

    def __init__(self, folder: Path, targets: Mapping[str, Tensor]) -> None:
        super().__init__(str(folder))
        self._targets = targets
        self._damage: Exception | None = None

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        # DCP logs and hides an error raised here, and goes on to look for its pickled metadata: so it is kept, and raised below.
        try:
            return super().read_metadata()
        except Exception as error:  # noqa: BLE001 - safetensors has its own error types; none is swallowed
            self._damage = error
            return Metadata(state_dict_metadata={}, storage_data={})

    def set_up_storage_reader(self, metadata: Metadata, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        super().set_up_storage_reader(metadata, is_coordinator, *args, **kwargs)
        if self._damage is not None:
            raise self._damage
        problems = _misfits(self._targets, metadata)
        if problems:
            raise CheckpointError(
                "the stored tensors don't fit; use the model and optimizer config that the checkpoint was made with:\n"
                + "\n".join(f"  {p}" for p in problems)
            )


def _metadata(folder: Path) -> dict[str, TensorStorageMetadata]:
    stored = HuggingFaceStorageReader(str(folder)).read_metadata().state_dict_metadata
    return {name: entry for name, entry in stored.items() if isinstance(entry, TensorStorageMetadata)}


def _misfits(targets: Mapping[str, Tensor], metadata: Metadata) -> list[str]:
    problems: list[str] = []
    for name, tensor in targets.items():
        stored = metadata.state_dict_metadata.get(name)
        if not isinstance(stored, TensorStorageMetadata):
            problems.append(f"{name}: not in the checkpoint")
        elif sum(math.prod(chunk.sizes) for chunk in stored.chunks) != math.prod(stored.size):
            problems.append(f"{name}: shards are missing, those present don't cover it")
        elif stored.size != tensor.size():
            problems.append(f"{name}: stored shape {tuple(stored.size)}, wanted {tuple(tensor.size())}")
        elif stored.properties.dtype != tensor.dtype:
            problems.append(f"{name}: stored as {stored.properties.dtype}, wanted {tensor.dtype}")
    return problems


@contextmanager
def _one_process_is_meant() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled", category=UserWarning)
        yield


@contextmanager
def _dcp_errors(verb: str, folder: Path, *, alone: bool) -> Iterator[None]:
    """DCP's failure, which lists every failed rank, as one CheckpointError."""
    # Filters of warnings are the whole process's, and a save may be a thread's: touched only where one process alone is meant.
    with _one_process_is_meant() if alone else nullcontext():
        try:
            yield
        except CheckpointException as failure:
            reasons: dict[str, list[int]] = {}
            for rank, (error, _) in failure.failures.items():
                text = str(error) if isinstance(error, CheckpointError) else f"{type(error).__name__}: {error}"
                reasons.setdefault(text, []).append(rank)
            said = "; ".join(f"rank {', '.join(map(str, ranks))}: {text}" for text, ranks in reasons.items())
            raise CheckpointError(f"can't {verb} tensors of {folder}: {said}") from failure
