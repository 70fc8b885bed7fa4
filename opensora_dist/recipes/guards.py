"""The callbacks that watch over a training, as the config asks for them."""

from __future__ import annotations

from opensora_dist.config.train import TrainConfig
from opensora_dist.train.callbacks import Callback


def guards(config: TrainConfig) -> list[Callback]:
    """In the order in which the loop calls them."""
    return []
