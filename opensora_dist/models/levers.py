"""What a model keeps for backward, and where: the memory levers of a run, set in one place."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from opensora_dist.config.train import ParallelConfig
from opensora_dist.models.base import VideoTransformer
from opensora_dist.models.layers import Block, SelfAttention
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


@dataclass(frozen=True, kw_only=True)
class Kept:
    """Numbers that autograd keeps of one block for each token of a sample, between its forward and its backward.

    Args:
        width: Multiples of the model's width, in the dtype of the computation.
        heads: Multiples of the number of heads (log-sum-exps), in float32 or wider.
        norms: Means and deviations, in float32 or wider.
    """

    width: float
    heads: int
    norms: int

    def bytes(self, block: Block, *, element_bytes: int) -> float:
        """Per token, where everything is computed in one dtype (under autocast the residual stream is wider than that)."""
        wide = max(4, element_bytes)
        return self.width * block.attn.proj.in_features * element_bytes + (self.heads * block.attn.heads + self.norms) * wide


def kept_per_token(block: Block) -> Kept:
    """The formula of ``recompute`` and ``tile_tokens``, for samples that are whole on a rank.

    With D the width, H the MLP's hidden width, N heads, and A attentions of tokens among each other (stdit 2, dit 1):

    - full: D, the block's input.
    - selective: D, and D + N for each of A + 1 attentions: their outputs and log-sum-exps.
    - none: the block's input, norm, modulated input, and the branch's output where the gate multiplies it: 4 D. Each attention: qkv
      and output, 4 D + N; of a second one also its input, made contiguous, and its branch's output: 2 D. Cross-attention: input, q and
      output, 3 D + N. MLP: input, norm, modulated input, output where the gate multiplies it, and before and after GELU: 4 D + 2 H.
      Mean and deviation of two norms.
    - none, with tiles: without the MLP's 2 H.

    Under sequence parallelism what the scheme keeps of the attention that crosses ranks comes in its place (its docstring has it).
    """
    attentions = sum(isinstance(module, SelfAttention) for module in block.modules())
    if block.recompute == "full":
        return Kept(width=1, heads=0, norms=0)
    if block.recompute == "selective":
        return Kept(width=1 + attentions + 1, heads=attentions + 1, norms=0)
    hidden = 2 * block.mlp.fc1.out_features / block.mlp.fc1.in_features if block.tile_tokens is None else 0
    width = 4 + 4 * attentions + 2 * (attentions - 1) + 3 + 4 + hidden
    return Kept(width=width, heads=attentions + 1, norms=4)
