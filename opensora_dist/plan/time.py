"""How long a training step takes on a machine, by formula: matrix products, and of the traffic what nothing hides.

Three kinds of traffic: tokens between ranks that share a sample (``parallel.sequence.predict``), weights and gradients among those that
shard parameters, and activations to CPU memory. What a plan can't know, how much of the peak a step's kernels reach, is one number
(``Machine.use``), measured by ``bench step`` where there is a GPU, and assumed elsewhere.
"""

# c bytes of a number in the dtype of the computation, w in that of the weights

from __future__ import annotations

from dataclasses import dataclass

from opensora_dist.config.train import ParallelConfig
from opensora_dist.core.types import Thw
from opensora_dist.parallel.sequence.network import Network
from opensora_dist.parallel.sequence.predict import SampleCost, Workload, predict
from opensora_dist.plan.hardware import Gpu
from opensora_dist.plan.memory import MemoryCase, block_shapes, kept_of_block, root_shapes

_LATENCY_S = 20e-6
_HIDDEN = 0.9  # of the compute, under which weights and gradients travel: the first gather and the last reduction have none
_HOST_BYTES_PER_S = 50e9  # between a GPU and its share of CPU memory, PCIe 5.0 x16


@dataclass(frozen=True, kw_only=True)
class Machine:
    """What a run is planned for.

    Args:
        gpus: All of them.
        per_node: On one node.
        network_bytes_per_s: That each GPU sends to other nodes: 400 Gbit/s is 50e9.
        use: Share of the peak that a step reaches while nothing is waited for.
        dollars_per_gpu_hour: None where nobody asks.
    """

    gpu: Gpu
    gpus: int
    per_node: int = 8
    network_bytes_per_s: float = 50e9
    use: float = 0.45
    dollars_per_gpu_hour: float | None = None

    @property
    def flops_per_s(self) -> float:
        """That one GPU computes."""
        return self.gpu.flops_per_s * self.use

    def bytes_per_s(self, ranks: int) -> float:
        """That a rank sends to the others of a group of consecutive ranks."""
        return self.gpu.link_bytes_per_s if ranks <= self.per_node else min(self.gpu.link_bytes_per_s, self.network_bytes_per_s)


@dataclass(frozen=True, kw_only=True)
class StepTime:
    """Seconds of one optimizer step.

    Args:
        compute_s: Matrix products, recomputation included.
        tokens_s: Of the traffic between ranks that share a sample, what nothing hides.
        weights_s: The same of weights and gradients.
        optimizer_s: One pass over weights, gradients, moments and average.
        offload_s: Of activations on their way to CPU memory and back, what nothing hides.
        tokens_bytes: That a rank sends in a step, to others that share its samples; by time and bandwidth.
        weights_bytes: That a rank sends of weights and gradients.
    """

    compute_s: float
    tokens_s: float
    weights_s: float
    optimizer_s: float
    offload_s: float
    tokens_bytes: float
    weights_bytes: float

    @property
    def total_s(self) -> float:
        """All of it."""
        return self.compute_s + self.tokens_s + self.weights_s + self.optimizer_s + self.offload_s


def step_time(case: MemoryCase, cost: SampleCost, machine: Machine) -> StepTime:
    """Of the ``native`` backend without offload, tensor parallelism and copies of shards, whose traffic is not in here.

    Args:
        case: The layout and its micro-batch, of samples of one shape.
        cost: Of one sample, from the model.
    """
    parallel = case.parallel
    c = {"bfloat16": 2, "float32": 4, "float64": 8}[case.dtype]
    w = max(4, c)
    patch = Thw(*case.model.patch)
    grid = Thw(case.latent.t // patch.t, case.latent.h // patch.h, case.latent.w // patch.w)
    bandwidth = machine.bytes_per_s(parallel.sp.degree)
    network = Network(
        latency_s=_LATENCY_S,
        bytes_per_s=bandwidth,
        flops_per_s=machine.flops_per_s,
        world=parallel.sp.degree,
        device="cuda",
        dtype=case.dtype,
        width=case.model.shape.width,
    )
    work = Workload(
        grid=grid,
        batch=case.micro_batch,
        cost=cost,
        element_bytes=c,
        accum=parallel.grad_accum,
        recompute=parallel.recompute,
    )
    scheme = parallel.sp.scheme if parallel.sp.degree > 1 else "local"
    shared = predict(work, scheme, parallel.sp.degree, network, sp=parallel.sp)
    depth = case.model.shape.depth
    compute_s = shared.compute_s * (1 + _tiled_again(case, cost))
    numbers = depth * _numbers(block_shapes(case)) + _numbers(root_shapes(case))
    weights_bytes, weights_takes = _weights(parallel, numbers=numbers, c=c, w=w, machine=machine)
    hidden = _HIDDEN * (compute_s + shared.exposed_s)
    shards = machine.gpus if parallel.zero.stage else 1
    offloaded = (depth - 1) * kept_of_block(case) * parallel.grad_accum if parallel.offload_activations else 0.0
    return StepTime(
        compute_s=compute_s,
        tokens_s=shared.exposed_s,
        weights_s=max(0.0, weights_takes - hidden) + weights_takes / depth,
        optimizer_s=9 * w * numbers / shards / machine.gpu.memory_bytes_per_s,
        offload_s=max(0.0, 2 * offloaded / _HOST_BYTES_PER_S - compute_s),
        tokens_bytes=shared.communication_s * bandwidth,
        weights_bytes=weights_bytes,
    )


def _tiled_again(case: MemoryCase, cost: SampleCost) -> float:
    """Tiles are computed once more in backward, whatever else is: the MLP's forward, over all that a step computes."""
    parallel, D = case.parallel, case.model.shape.width
    if parallel.tile_tokens is None:
        return 0.0
    patch = Thw(*case.model.patch)
    mlp = 4 * D * D * case.model.mlp_ratio * case.model.shape.depth * (case.latent.volume // patch.volume)
    again = {"none": 0.0, "selective": 1 - cost.scores_flops / cost.flops, "full": 1.0}[parallel.recompute]
    return mlp / (cost.flops * (3 + again))


def _numbers(shapes: list[tuple[int, int]]) -> int:
    return sum(rows * row for rows, row in shapes)


def _weights(parallel: ParallelConfig, *, numbers: int, c: int, w: int, machine: Machine) -> tuple[float, float]:
    """Bytes that a rank sends of weights and gradients in a step, and the seconds that takes alone (docs/parallel.md has who sends what)."""
    stage, accum = parallel.zero.stage, parallel.grad_accum
    if stage == 0:
        return _among(machine, machine.gpus, 2 * w * numbers)
    gathers = 2 * accum if stage == 3 else 1
    reductions = 1 if stage == 1 else accum
    return _among(machine, machine.gpus, (gathers * c + reductions * w) * numbers)


def _among(machine: Machine, ranks: int, num_bytes: float) -> tuple[float, float]:
    """A gathering, or a summing, of so many bytes: what a rank sends, and seconds.

    Over several nodes every GPU's network card carries its part of what the nodes pass on, and NVLink the rest: whichever takes longer.
    """
    sent = num_bytes * (ranks - 1) / ranks
    within = min(ranks, machine.per_node)
    nodes = ranks / within
    between = num_bytes * (nodes - 1) / nodes / within / machine.network_bytes_per_s
    return sent, max(sent / machine.gpu.link_bytes_per_s if within > 1 else 0.0, between)
