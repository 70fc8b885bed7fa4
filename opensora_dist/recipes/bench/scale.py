"""One training step, followed byte by byte: on real ranks, or on fake tensors in a simulated world of any size."""

# B micro-batch, C latent channels, t h w latent frames, height, width of the region that this rank holds, Y text tokens, E text width

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.tensor import DTensor

from opensora_dist.config.train import OptimConfig, RectifiedFlowConfig
from opensora_dist.core.types import Thw
from opensora_dist.data.loader import MicroBatch
from opensora_dist.diffusion.base import Objective
from opensora_dist.diffusion.draws import Draws
from opensora_dist.diffusion.rectified_flow import RectifiedFlow
from opensora_dist.models.base import ModelIo, VideoTransformer
from opensora_dist.models.levers import set_levers
from opensora_dist.models.registry import build_model
from opensora_dist.models.tensor import share_blocks
from opensora_dist.ops.choice import Choice, using
from opensora_dist.parallel.mesh import Mesh, build_mesh
from opensora_dist.parallel.sequence.layout import SequenceParallel
from opensora_dist.parallel.zero.base import ZeroBackend
from opensora_dist.parallel.zero.native import NativeBackend
from opensora_dist.parallel.zero.registry import build_backend
from opensora_dist.plan.memory import MemoryCase
from opensora_dist.recipes.bench.case import DTYPES
from opensora_dist.recipes.bench.memory import LiveTensors, zero_parked
from opensora_dist.train.ema import Ema
from opensora_dist.train.step import TiledLoss, weighted_loss


@dataclass(frozen=True, kw_only=True)
class MeasuredStep:
    """Bytes of this rank, as ``LiveTensors`` counts them.

    Args:
        parameters: Weights and buffers between steps.
        optimizer: Moments.
        ema: The moving average.
        gathered: Whole weights that are there when forward ends.
        kept: What else there is then, of the last micro-batch: activations, and gradients. Also what is in CPU memory.
        gradients: What parameters hold as gradients before the optimizer's step.
        peak: The most that was there at once in the step, everything above included, but nothing that would be in CPU memory.
    """

    parameters: int
    optimizer: int
    ema: int
    gathered: int
    kept: int
    gradients: int
    peak: int


@contextmanager
def simulated(world: int, *, rank: int = 0) -> Iterator[None]:
    """This process as one rank of a process group whose other ranks don't exist: collectives return at once, with garbage."""
    from torch.testing._internal.distributed.fake_pg import FakeStore  # registers the backend

    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world)
    try:
        yield
    finally:
        dist.destroy_process_group()


def simulate_step(case: MemoryCase, *, rank: int = 0) -> MeasuredStep:
    """One step of a rank of ``case.world``, on tensors that have a size and no memory."""
    with simulated(case.world, rank=rank):
        mesh = _mesh(case)  # before the mode: a mesh computes with the numbers of ranks
        with FakeTensorMode(), using(Choice(kernels=case.kernels)):
            return _measure(case, mesh, init=lambda _model: None, steps=1)


def real_step(case: MemoryCase, *, init: Callable[[nn.Module], None]) -> MeasuredStep:
    """The second step of this rank, in the process group there is. Collective."""
    return _measure(case, _mesh(case), init=init, steps=2)


def _mesh(case: MemoryCase) -> Mesh:
    parallel = case.parallel
    return build_mesh(
        torch.device("cpu"), dp_replicate=parallel.dp_replicate, sp=parallel.sp, tp=parallel.tp, timeout_s=parallel.timeout_s
    )


def _measure(case: MemoryCase, mesh: Mesh, *, init: Callable[[nn.Module], None], steps: int) -> MeasuredStep:
    io = ModelIo(in_channels=case.channels, out_channels=case.channels, text_width=case.text_width, max_tokens=case.max_tokens)
    dtype = torch.float64 if case.dtype == "float64" else torch.float32
    with torch.device("meta"):
        model = build_model(case.model, io)
    if dtype != torch.float32:  # a module of fake tensors can't be converted, and needn't be
        model.to(dtype)
    share_blocks(model, mesh)
    offload = set_levers(model, case.parallel, device=mesh.device)
    parked: list[Callable[[], int]] = [] if offload is None else [lambda: offload.parked_bytes]
    with LiveTensors(parked=lambda: sum(bytes_now() for bytes_now in parked)) as live:
        backend = build_backend(
            model,
            mesh=mesh,
            units=list(model.blocks),
            init=init,
            parallel=case.parallel,
            optim=OptimConfig(),
            compute_dtype=DTYPES[case.dtype],
        )
        weights_and_optimizer = live.now
        ema = Ema(backend.weights, decay=0.9999)
        assert isinstance(backend, NativeBackend)
        optimizer = sum(t.nbytes for moments in backend.optimizer.state.values() for t in moments.values())
        static = live.now
        zero = case.parallel.zero
        parked.append(zero_parked(backend, zero.offload))
        if zero.offload != "none":
            parked.append(lambda: static - weights_and_optimizer)  # the average
        shape = _Shape(case, mesh, model)
        for step in range(steps):
            forward, gathered, gradients = _step(backend, ema, shape, live, step=step)
    return MeasuredStep(
        parameters=weights_and_optimizer - optimizer,
        optimizer=optimizer,
        ema=static - weights_and_optimizer,
        gathered=gathered,
        kept=forward - static - gathered,
        gradients=gradients,
        peak=live.peak,
    )


class _Shape:
    """What a rank is given in a step."""

    def __init__(self, case: MemoryCase, mesh: Mesh, model: VideoTransformer) -> None:
        self.case = case
        self.shard = SequenceParallel(mesh, case.parallel.sp).shard(model.token_grid(case.latent))
        self.region = self.shard.region.times(model.patch)
        self.dtype = model.x_embedder.proj.weight.dtype

    def micros(self) -> list[MicroBatch]:
        """All that a step holds, of zeros."""
        case, shape = self.case, self.region.shape(self.case.latent)
        B = case.micro_batch
        return [
            MicroBatch(
                latents_BCthw=torch.zeros(B, case.channels, *shape, dtype=self.dtype),
                latent=case.latent,
                region=self.region,
                text_BYE=torch.zeros(B, case.text_tokens, case.text_width, dtype=self.dtype),
                text_mask_BY=torch.ones(B, case.text_tokens, dtype=torch.bool),
                samples=tuple(range(B)),
                keys=("",) * B,
                weight_B=torch.ones(B, dtype=torch.float64),
            )
            for _ in range(case.parallel.grad_accum)
        ]

    def draws(self, micro: MicroBatch) -> Draws:
        """As keyed draws would be."""
        B = len(micro.samples)
        return Draws(
            noise_BCthw=torch.zeros(micro.latents_BCthw.shape, dtype=torch.float32),
            level_B=torch.full((B,), 0.5, dtype=torch.float64),
            drop_caption_B=torch.zeros(B, dtype=torch.bool),
        )


def _step(backend: ZeroBackend, ema: Ema, shape: _Shape, live: LiveTensors, *, step: int) -> tuple[int, int, int]:
    """As ``train_step``; gives the bytes when the last forward ends, those of gathered weights then, and of gradients."""
    objective: Objective = RectifiedFlow(RectifiedFlowConfig(), spatial_factor=8)
    if (tile := shape.case.parallel.tile_tokens) is not None:
        objective = TiledLoss(of=objective, positions=tile * Thw(*shape.case.model.patch).volume)
    sharded = any(isinstance(p, DTensor) for p in backend.model.parameters())
    live.restart()
    micros = shape.micros()
    for i, micro in enumerate(micros):
        with backend.forward_context(last_micro=i == len(micros) - 1):
            loss = weighted_loss(backend.model, [micro], [shape.draws(micro)], objective=objective, shards=[shape.shard])
            forward = live.now
            whole = [p for p in backend.model.parameters() if not isinstance(p, DTensor)] if sharded else []
            gathered = sum(p.untyped_storage().nbytes() for p in whole)
            backend.backward(loss)
        del loss
    gradients = sum(_local(p.grad).nbytes for p in backend.model.parameters() if p.grad is not None)
    backend.clip(1.0)
    backend.step(lr=1e-4)
    ema.update(step=step, skipped=backend.skipped())
    return forward, gathered, gradients


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
