"""What ``parallel.sp.scheme=auto`` needs of a model, and of the machine."""

from __future__ import annotations

from dataclasses import replace

import torch

from opensora_dist.config.load import expand
from opensora_dist.config.train import TrainConfig
from opensora_dist.core.errors import ConfigError
from opensora_dist.core.logging import get_logger
from opensora_dist.core.types import Thw
from opensora_dist.models.base import VideoTransformer
from opensora_dist.models.dit.model import DiTBlock
from opensora_dist.models.layers import Block, linear_flops
from opensora_dist.parallel.mesh import Mesh
from opensora_dist.parallel.sequence.auto import AutoChoice
from opensora_dist.parallel.sequence.network import Network, agree, measure_network, read_network, unfit
from opensora_dist.parallel.sequence.predict import SampleCost

_log = get_logger(__name__)


def sample_cost(model: VideoTransformer, grid: Thw, *, text_tokens: int) -> SampleCost:
    """FLOPs of one sample of a token grid, in the parts that a prediction asks for; all from the model's own counts."""
    block = model.blocks[0]
    assert isinstance(block, Block)
    text = linear_flops(block.cross_attn.kv_linear, tokens=text_tokens)
    all_of_it, linears = block.flops(grid, text_tokens=text_tokens), linear_flops(block, tokens=grid.volume)
    scores = all_of_it - text - (linears - linear_flops(block.cross_attn.kv_linear, tokens=grid.volume))
    replicated = linear_flops(model.t_embedder, tokens=1) + linear_flops(model.t_block, tokens=1)
    replicated += linear_flops(model.y_embedder, tokens=text_tokens) + len(model.blocks) * text
    whole = Thw(grid.t * model.patch.t, grid.h * model.patch.h, grid.w * model.patch.w)
    return SampleCost(
        width=block.scale_shift_table.shape[1],
        heads=block.attn.heads,
        joint=isinstance(block, DiTBlock),
        blocks=len(model.blocks),
        flops=model.flops(whole, text_tokens=text_tokens),
        replicated_flops=replicated,
        then_flops=all_of_it - block.mix_flops(grid) - text,
        scores_flops=len(model.blocks) * scores,
    )


def auto_choice(config: TrainConfig, mesh: Mesh, model: VideoTransformer, *, text_tokens: int) -> AutoChoice:
    """The chooser of a run: the file that ``parallel.sp.network`` names, or a measurement of
    about a second for each number of ranks that may share a sample. Collective.

    Args:
        model: Built, with or without values; its FLOPs are counted.
        text_tokens: Of a caption, padding included.
    """
    parallel = config.parallel
    dtype = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float64": torch.float64}[config.run.dtype]
    return AutoChoice(
        sp=parallel.sp,
        world=mesh.world,
        global_batch=config.data.global_batch,
        unit_tokens=config.data.unit_tokens,
        accum=parallel.grad_accum,
        recompute=parallel.recompute,
        element_bytes=dtype.itemsize,
        cost=lambda grid: sample_cost(model, grid, text_tokens=text_tokens),
        networks=_networks(config, mesh, width=config.model.shape.width, dtype=dtype),
    )


def _networks(config: TrainConfig, mesh: Mesh, *, width: int, dtype: torch.dtype) -> dict[int, Network]:
    """By number of ranks that share a sample.

    Raises:
        ConfigError: The file was measured on another type of device, in another dtype or between fewer ranks.
    """
    sp = config.parallel.sp
    if sp.network is not None:
        path = expand(sp.network)
        network = read_network(path)
        problems = unfit(network, device=mesh.device, dtype=dtype, degree=sp.degree)
        if problems:
            raise ConfigError([f"parallel.sp.network: {path} has {problem}, or leave it out" for problem in problems])
        if network.width != width:
            _log.warning("parallel.sp.network: %s is of products of width %d, the model's is %d", path, network.width, width)
        # Read by every rank; where files differ between machines, all take the worst of their numbers.
        network = agree(network, group=mesh.control)
        found = dict.fromkeys([1, *mesh.links], network)
    else:
        # Ranks of one machine have another network between them than those of several.
        found = {
            degree: agree(measure_network(links.sp, device=mesh.device, width=width, dtype=dtype).network, group=mesh.control)
            for degree, links in sorted(mesh.links.items())
            if degree > 1
        }
        # What a rank computes is one number, or noise would choose between degrees.
        rate = min(network.flops_per_s for network in found.values())
        found = {degree: replace(network, flops_per_s=rate) for degree, network in found.items()}
        found[1] = found[max(found)]
    for degree in sorted(found.keys() - {1}):
        network = found[degree]
        _log.info(
            "network among %d ranks%s: %.3g GB/s to others and %.3g us a message per rank, %.3g TFLOP/s",
            degree,
            "" if sp.network is None else f" ({sp.network}, measured among {network.world})",
            network.bytes_per_s / 1e9,
            network.latency_s * 1e6,
            network.flops_per_s / 1e12,
        )
    return found
