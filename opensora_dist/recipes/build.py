"""From configs to the parts that several recipes need."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from opensora_dist.config.dataset import DatasetSpec
from opensora_dist.config.load import expand
from opensora_dist.config.train import ImportConfig, ModelConfig, ObjectiveConfig
from opensora_dist.core.logging import get_logger
from opensora_dist.diffusion.base import Objective
from opensora_dist.diffusion.registry import build_objective
from opensora_dist.models.base import ModelIo, VideoTransformer
from opensora_dist.models.importers import read_open_sora, read_pixart
from opensora_dist.models.init import assign_weights, init_weights
from opensora_dist.models.registry import build_model
from opensora_dist.parallel.keys import Keys

_log = get_logger(__name__)
_READERS = {"open_sora": read_open_sora, "pixart": read_pixart}


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
    """What gives a model its first values: keyed draws, then foreign weights over them where the config names some."""

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
