"""From configs to the parts that several recipes need."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from opensora_dist.checkpoint.commit import resolve
from opensora_dist.checkpoint.store import read_tensors
from opensora_dist.config.dataset import DatasetSpec
from opensora_dist.config.load import expand
from opensora_dist.config.train import ImportConfig, ModelConfig, ObjectiveConfig
from opensora_dist.core.errors import WeightsError
from opensora_dist.core.logging import get_logger
from opensora_dist.diffusion.base import Objective
from opensora_dist.diffusion.registry import build_objective
from opensora_dist.models.base import ModelIo, VideoTransformer
from opensora_dist.models.importers import ImportReport, read_open_sora, read_pixart
from opensora_dist.models.init import assign_weights, init_weights
from opensora_dist.models.registry import build_model
from opensora_dist.parallel.keys import Keys
from opensora_dist.train.saving import TENSORS_DIR

_log = get_logger(__name__)


def meta_model(
    model: ModelConfig, objective: ObjectiveConfig, spec: DatasetSpec, *, dtype: torch.dtype = torch.float32
) -> tuple[VideoTransformer, Objective]:
    """The model of a config, on the meta device, and the objective it is trained with."""
    built = build_objective(objective, spatial_factor=spec.spatial_factor)
    io = ModelIo(
        in_channels=spec.channels,
        out_channels=spec.channels * built.channel_multiplier,
        text_width=spec.text_width,
        max_tokens=spec.max_tokens,
    )
    with torch.device("meta"):
        return build_model(model, io).to(dtype), built


def initialiser(keys: Keys, init_from: ImportConfig | None) -> Callable[[nn.Module], None]:
    """What gives a model its first values: keyed draws, then the weights that the config names, over them."""

    def init(model: nn.Module) -> None:
        assert isinstance(model, VideoTransformer)
        init_weights(model, keys)
        if init_from is not None:
            tensors, report = _READERS[init_from.format](expand(init_from.path), model)
            assign_weights(model, tensors)
            _log.info("weights from %s: %d tensors, ignored %s", init_from.path, len(tensors), list(report.ignored) or "none")
            for warning in report.warnings:
                _log.warning("%s: %s", init_from.path, warning)

    return init


def read_weights(folder: Path, model: VideoTransformer, *, averaged: bool, source: str) -> dict[str, Tensor]:
    """The weights of one of our checkpoints, whole and on the CPU, once it is sure that they are all of this model's and no others.

    Args:
        folder: A step folder.
        model: Whose weights they are to be; may be on the meta device.
        averaged: The moving average, with buffers, which have none, as they are; else the raw weights.
        source: What an error calls the checkpoint.
    Raises:
        WeightsError: All names and shapes that differ.
    """
    tensors = _stored(folder, "model.")
    if averaged:
        parameters = dict(model.named_parameters())
        tensors = {name: t for name, t in tensors.items() if name not in parameters} | _stored(folder, "ema.")
    own = {name: t.shape for name, t in model.state_dict().items()}
    problems = [f"{name}: the model has none" for name in sorted(tensors.keys() - own.keys())]
    problems += [f"{name}: the run has none" for name in sorted(own.keys() - tensors.keys())]
    problems += [
        f"{name}: {tuple(tensor.shape)} in the run, {tuple(own[name])} in the model"
        for name, tensor in tensors.items()
        if name in own and own[name] != tensor.shape
    ]
    if problems:
        raise WeightsError(f"{source} holds another model:\n" + "\n".join(f"  {p}" for p in problems))
    return tensors


def _stored(folder: Path, prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): t for name, t in read_tensors(folder / TENSORS_DIR, prefix=prefix).items()}


def _read_run(path: Path, model: VideoTransformer) -> tuple[dict[str, Tensor], ImportReport]:
    tensors = read_weights(resolve(path), model, averaged=True, source=f"model.init_from.path={path}")
    return tensors, ImportReport(missing=(), unexpected=(), ignored=(), warnings=())


_READERS = {"open_sora": read_open_sora, "pixart": read_pixart, "run": _read_run}
