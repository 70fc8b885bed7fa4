"""A training as a benchmark steps it: the training's own parts and its own step, on made-up samples."""

# B micro-batch, C latent channels, t h w latent frames, height, width of the region that this rank holds, Y text tokens, E text width

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial

import torch
from torch import nn

from opensora_dist.config.train import OptimConfig, RectifiedFlowConfig
from opensora_dist.core.types import Thw
from opensora_dist.data.loader import MicroBatch, StepData
from opensora_dist.diffusion.base import Objective
from opensora_dist.diffusion.draws import draw_noise
from opensora_dist.diffusion.rectified_flow import RectifiedFlow
from opensora_dist.models.base import ModelIo, VideoTransformer
from opensora_dist.models.init import init_weights
from opensora_dist.models.layers import Block
from opensora_dist.models.levers import set_levers
from opensora_dist.models.registry import build_model
from opensora_dist.models.tensor import share_blocks
from opensora_dist.parallel.keys import Keys
from opensora_dist.parallel.mesh import Mesh, build_mesh
from opensora_dist.parallel.recompute import Recompute
from opensora_dist.parallel.sequence.layout import SequenceParallel
from opensora_dist.parallel.zero.native import NativeBackend
from opensora_dist.parallel.zero.registry import build_backend
from opensora_dist.plan.memory import MemoryCase
from opensora_dist.recipes.bench.case import DTYPES
from opensora_dist.recipes.bench.forms import silent
from opensora_dist.recipes.bench.memory import zero_parked
from opensora_dist.recipes.shards import LatentShards
from opensora_dist.train.ema import Ema
from opensora_dist.train.step import StepResult, TiledLoss, train_step

_PARTS_FROM_ZERO_STD = 0.02


class Training:
    """A model with optimizer and average as a training has them, and one global batch that every step is given.

    The learning rate is zero: the step does all its work, and the weights stay, so that forms can be compared.
    """

    def __init__(self, case: MemoryCase, device: torch.device) -> None:
        parallel = case.parallel
        self.case, self.keys = case, Keys(0)
        self.mesh = build_mesh(
            device, dp_replicate=parallel.dp_replicate, sp=parallel.sp, tp=parallel.tp, timeout_s=parallel.timeout_s
        )
        self.model = meta_model(case)
        share_blocks(self.model, self.mesh)
        self._offload = set_levers(self.model, parallel, device=device)
        self.backend = build_backend(
            self.model,
            mesh=self.mesh,
            units=list(self.model.blocks),
            init=partial(_init, keys=self.keys),
            parallel=parallel,
            optim=OptimConfig(),
            compute_dtype=DTYPES[case.dtype],
        )
        self._zero_parked = zero_parked(self.backend, parallel.zero.offload)
        self.ema = Ema(self.backend.weights, decay=0.9999)
        self.objective: Objective = RectifiedFlow(RectifiedFlowConfig(), spatial_factor=8)
        if parallel.tile_tokens is not None:
            self.objective = TiledLoss(of=self.objective, positions=parallel.tile_tokens * self.model.patch.volume)
        self.shards = self._speaking = self._shards(self.mesh)
        self._silent = self._shards(replace(self.mesh, links={n: silent(links) for n, links in self.mesh.links.items()}))
        self.micros = self._micros()

    def _shards(self, mesh: Mesh) -> LatentShards:
        return LatentShards(mesh, SequenceParallel(mesh, self.case.parallel.sp), self.model)

    def _micros(self) -> list[MicroBatch]:
        case, device = self.case, self.mesh.device
        share = self.shards.share(case.latent)
        B, accum = case.micro_batch, case.parallel.grad_accum
        weight = 1 / (samples_of(case) * case.latent.volume)
        dtype = torch.float64 if case.dtype == "float64" else torch.float32

        def micro(first: int) -> MicroBatch:
            samples = tuple(range(first, first + B))
            latents = draw_noise(
                self.keys, "latents", samples=samples, step=0, channels=case.channels, latent=case.latent, region=share.region
            )
            text = torch.stack([self._text(sample) for sample in samples])
            return MicroBatch(
                latents_BCthw=latents.to(device, dtype),
                latent=case.latent,
                region=share.region,
                text_BYE=text.to(device, dtype),
                text_mask_BY=torch.ones(B, case.text_tokens, dtype=torch.bool, device=device),
                samples=samples,
                keys=("",) * B,
                weight_B=torch.full((B,), weight, dtype=torch.float64, device=device),
            )

        return [micro((share.data_rank * accum + i) * B) for i in range(accum)]

    def _text(self, sample: int) -> torch.Tensor:
        shape = self.case.text_tokens, self.case.text_width
        return torch.empty(shape).normal_(generator=self.keys.generator("text", sample))

    @property
    def parked_bytes(self) -> int:
        """What is in CPU memory now, beside a GPU."""
        return self._zero_parked() + (self._offload.parked_bytes if self._offload is not None else 0)

    def step(self) -> StepResult:
        """One, as ``train.loop`` takes it. Collective; waits for no device."""
        data = StepData(
            step=0,
            epoch=0,
            digest="bench",
            micros=list(self.micros),
            substitute=lambda micro, _bad, _attempt: micro,
            shapes={self.case.latent: samples_of(self.case)},
        )
        result = train_step(
            self.backend,
            data,
            objective=self.objective,
            keys=self.keys,
            shards=self.shards.shard,
            agree=partial(self.shards.agree, data),
            lr=0.0,
            clip_norm=1.0,
        )
        self.ema.update(step=data.step, skipped=self.backend.skipped())
        return result

    @contextmanager
    def silenced(self) -> Iterator[None]:
        """Steps inside send nothing, but for a few numbers that ranks agree by. Only where ``silence_problem`` has none."""
        assert isinstance(self.backend, NativeBackend)
        self.shards = self._silent
        try:
            with self.backend.silent():
                yield
        finally:
            self.shards = self._speaking

    @contextmanager
    def recomputing(self, how: Recompute) -> Iterator[None]:
        """Steps inside run again in backward what ``how`` says."""
        blocks = [block for block in self.model.blocks if isinstance(block, Block)]
        before = [block.recompute for block in blocks]
        for block in blocks:
            block.recompute = how
        try:
            yield
        finally:
            for block, was in zip(blocks, before, strict=True):
                block.recompute = was


def meta_model(case: MemoryCase) -> VideoTransformer:
    """The model of a case, on the meta device."""
    io = ModelIo(in_channels=case.channels, out_channels=case.channels, text_width=case.text_width, max_tokens=case.max_tokens)
    with torch.device("meta"):
        return build_model(case.model, io).to(torch.float64 if case.dtype == "float64" else torch.float32)


@torch.no_grad()
def _init(model: nn.Module, *, keys: Keys) -> None:
    """As a training starts, but for what would start at zero: no gate may keep work from mattering, and a GPU multiplies zeros faster."""
    assert isinstance(model, VideoTransformer)
    init_parameter = model.init_parameter

    def never_zero(name: str, tensor: torch.Tensor, generator: torch.Generator) -> None:
        init_parameter(name, tensor, generator)
        if not tensor.any():
            tensor.normal_(std=_PARTS_FROM_ZERO_STD, generator=generator)

    model.init_parameter = never_zero  # type: ignore[method-assign]
    try:
        init_weights(model, keys)
    finally:
        del model.init_parameter


def latent_flops(case: MemoryCase) -> tuple[int, Thw]:
    """Forward FLOPs of one sample, by the model's own formula, and its token grid."""
    model = meta_model(case)
    return model.flops(case.latent, text_tokens=case.text_tokens), model.token_grid(case.latent)


def samples_of(case: MemoryCase) -> int:
    """Of the global batch."""
    return case.micro_batch * case.parallel.grad_accum * (case.world // (case.parallel.sp.degree * case.parallel.tp))
