"""The models that ``model.name`` may choose."""

from __future__ import annotations

from opensora_dist.config.train import ModelConfig
from opensora_dist.core.registry import Registry
from opensora_dist.models.base import ModelIo, VideoTransformer
from opensora_dist.models.dit.model import DiT
from opensora_dist.models.stdit.model import STDiT

MODELS: Registry[type[VideoTransformer]] = Registry("model.name")
MODELS.register("stdit")(STDiT)
MODELS.register("dit")(DiT)


def build_model(config: ModelConfig, io: ModelIo) -> VideoTransformer:
    """The model of a config, without values: build under ``torch.device("meta")``, ``to_empty``, then ``init.init_weights``."""
    return MODELS.get(config.name)(config, io)
