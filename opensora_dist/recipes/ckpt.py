"""What a run has saved: listing it, checking it, and one file of weights from it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from opensora_dist import __version__
from opensora_dist.checkpoint.commit import LATEST_NAME, list_checkpoints, step_of, unfinished_saves
from opensora_dist.checkpoint.manifest import MANIFEST_NAME, compare_sizes, read_manifest, verify
from opensora_dist.config.train import TrainConfig
from opensora_dist.core.errors import CheckpointError, ConfigError
from opensora_dist.core.io import atomic_path
from opensora_dist.core.layout import CHECKPOINTS_DIR
from opensora_dist.recipes.build import meta_model, read_weights
from opensora_dist.recipes.sharing import describe_checkpoint

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True, kw_only=True)
class Listed:
    """One checkpoint of a run.

    Args:
        created: ISO 8601, UTC; None where the manifest can't be read.
        num_bytes: By the manifest; None likewise.
        layout: Who wrote it: ``world``, ``backend``, ``zero_stage``, ``dtype``, ``mesh``; empty likewise.
        problems: What is wrong with it; of what was asked for, names and sizes or every byte.
        latest: The file ``latest`` names it.
    """

    path: Path
    step: int
    created: str | None
    num_bytes: int | None
    layout: dict[str, Any]
    problems: tuple[str, ...]
    latest: bool


@dataclass(frozen=True, kw_only=True)
class Listing:
    """What is in a run's ``checkpoints`` folder, newest first, and how many saves were cut off there."""

    root: Path
    checkpoints: tuple[Listed, ...]
    unfinished: int


def list_run(path: Path, *, every_byte: bool) -> Listing:
    """Looks at the checkpoints of a run.

    Args:
        path: A run directory, its checkpoints folder, or one step folder, which is then listed alone.
        every_byte: Compare contents with the manifests' hashes, which reads all; else names and sizes.
    Raises:
        CheckpointError: There is nothing.
    """
    path = Path(path)
    if not path.is_dir():
        raise CheckpointError(
            f"{path}: no such folder; give a run directory, its {CHECKPOINTS_DIR}/ folder, or one step-N folder in it"
        )
    alone = (path / MANIFEST_NAME).is_file() or path in list_checkpoints(path.parent)
    root = path.parent if alone else path / CHECKPOINTS_DIR if (path / CHECKPOINTS_DIR).is_dir() else path
    folders, unfinished = [path] if alone else list_checkpoints(root), unfinished_saves(root)
    if not folders:
        cut = f"; {unfinished} saves were cut off there" if unfinished else ""
        raise CheckpointError(f"{root}: no checkpoint{cut}; give a run that reached checkpoint.every_steps or its last step")
    newest = (root / LATEST_NAME).read_text().strip() if (root / LATEST_NAME).is_file() else None
    check = verify if every_byte else compare_sizes
    listed = tuple(_listed(folder, problems=tuple(check(folder)), latest=folder.name == newest) for folder in folders)
    return Listing(root=root, checkpoints=listed, unfinished=unfinished)


def _listed(folder: Path, *, problems: tuple[str, ...], latest: bool) -> Listed:
    try:
        manifest = read_manifest(folder)
    except CheckpointError:  # stands among the problems
        return Listed(
            path=folder, step=step_of(folder), created=None, num_bytes=None, layout={}, problems=problems, latest=latest
        )
    return Listed(
        path=folder,
        step=manifest.step,
        created=manifest.created,
        num_bytes=sum(entry.num_bytes for entry in manifest.files.values()),
        layout=dict(manifest.metadata.get("layout", {})),
        problems=problems,
        latest=latest,
    )


@dataclass(frozen=True, kw_only=True)
class Export:
    """What was written.

    Args:
        source: The checkpoint.
        differences: Where the model is not Open-Sora 1.0's, one sentence each.
    """

    path: Path
    source: Path
    step: int
    tensors: int
    num_bytes: int
    differences: tuple[str, ...]


def export(checkpoint: Path, out: Path, *, weights: str, dtype: str) -> Export:
    """Writes the weights of a checkpoint as one safetensors under Open-Sora's names, whole or not at all.

    The names are this project's own, which are those of Open-Sora 1.0's STDiT. Position tables are computed by both, and left out.

    Args:
        checkpoint: A run directory, its checkpoints folder, or one step folder.
        out: Replaced where it exists.
        weights: ``ema``, or ``raw``.
        dtype: Of every tensor in the file, ``float32`` or ``bfloat16``.
    Raises:
        CheckpointError: There is no checkpoint, or it does not verify.
        ConfigError: ``out`` isn't named as a safetensors file.
    """
    out = Path(out)
    if out.suffix != ".safetensors":
        raise ConfigError(f"-o {out}: one safetensors file is written, and read by its suffix; name it {out.stem}.safetensors")
    described = describe_checkpoint(checkpoint)
    manifest = read_manifest(described.folder)
    model, _ = meta_model(described.config.model, described.config.objective, described.spec)
    stored = read_weights(described.folder, model, averaged=weights == "ema", source=str(described.folder))
    tensors = {name: stored.pop(name).to(DTYPES[dtype]).contiguous() for name in sorted(stored)}
    said = {
        "format": "pt",
        "producer": f"opensora_dist {__version__}",
        "model": described.config.model.name,
        "objective": described.config.objective.name,
        "weights": weights,
        "dtype": dtype,
        "step": str(manifest.step),
        "config_hash": str(manifest.metadata.get("config_hash", "")),
    }
    with atomic_path(out) as partial:
        save_file(tensors, partial, metadata=said)
    return Export(
        path=out,
        source=described.folder,
        step=manifest.step,
        tensors=len(tensors),
        num_bytes=out.stat().st_size,
        differences=tuple(_differences(described.config)),
    )


def _differences(config: TrainConfig) -> list[str]:
    """What Open-Sora 1.0 has no counterpart of. This project reads all of it back: ``model.init_from.format=open_sora``."""
    model, said = config.model, []
    if model.name != "stdit":
        said.append(
            f"model.name={model.name}: Open-Sora 1.0's STDiT has no such blocks, so that only this project reads the file"
        )
    if model.pooled_text:
        said.append("model.pooled_text=true: y_pool.weight and y_pool.bias have no counterpart")
    if model.temporal_positions == "residual":
        said.append("model.temporal_positions=residual: Open-Sora 1.0 adds temporal positions in its first block's attention")
    if config.objective.name != "iddpm":
        said.append(f"objective.name={config.objective.name}: Open-Sora 1.0 samples with iddpm")
    return said
