"""What a model keeps for backward, and where: the memory levers of a run, set in one place."""

from __future__ import annotations

import torch

from opensora_dist.config.train import ParallelConfig
from opensora_dist.models.base import VideoTransformer
from opensora_dist.models.layers import Block
from opensora_dist.parallel.offload import MIN_BYTES, Offload


def set_levers(
    model: VideoTransformer, parallel: ParallelConfig, *, device: torch.device, min_offload_bytes: int = MIN_BYTES
) -> Offload | None:
    """Sets ``recompute``, ``offload_activations`` and ``tile_tokens`` on every block and the final layer, as the config has them.

    The loss is the objective's, not the model's: ``train.step.TiledLoss``.

    Args:
        device: What the model will compute on.
        min_offload_bytes: Smallest storage that is moved.
    Returns:
        What counts the bytes that are moved; None where nothing is.
    """
    offload = Offload(device, min_bytes=min_offload_bytes) if parallel.offload_activations else None
    model.final_layer.tile_tokens = parallel.tile_tokens
    last = len(model.blocks) - 1
    for i, block in enumerate(model.blocks):
        assert isinstance(block, Block)
        block.recompute = parallel.recompute
        block.tile_tokens = parallel.tile_tokens
        block.offload = None if offload is None else offload.around if i < last else offload.beside
    return offload
