"""How long a training step takes on a machine, by formula: matrix products, and of the traffic what nothing hides.

Four kinds of traffic: tokens between ranks that share a sample (``parallel.sequence.predict``), sums between ranks that share linears,
weights and gradients among those that shard or copy parameters, and what goes to CPU memory and back. What a plan can't know, how much of
the peak a step's kernels reach, is one number (``Machine.use``), measured by ``bench step`` where there is a GPU, and assumed elsewhere.
"""

# c bytes of a number in the dtype of the computation, w in that of the weights

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache

from opensora_dist.core.types import Thw
from opensora_dist.parallel.sequence.network import Network
from opensora_dist.parallel.sequence.predict import Prediction, SampleCost, Workload, predict
from opensora_dist.plan.hardware import Gpu
from opensora_dist.plan.memory import MemoryCase, block_shapes, kept_of_block, root_shapes, tokens_of_rank

_HIDDEN = 0.9  # of the compute, under which weights and gradients travel: the first gather and the last reduction have none
OPTIMIZER_PASSES = 13  # over a shard: norm 1, clip 2, AdamW 7 (4 read, 3 written), moving average 3
_predict = lru_cache(maxsize=4096)(predict)  # ZeRO stages, tiles and offload change nothing of it
_HOST_BYTES_PER_S = 50e9  # between a GPU and its share of CPU memory, PCIe 5.0 x16
_HOST_MEMORY_BYTES_PER_S = (
    77e9  # a GPU's eighth of two sockets of eight channels of DDR5-4800, where an offloaded optimizer steps
)


@dataclass(frozen=True, kw_only=True)
class Machine:
    """What a run is planned for.

    Args:
        gpus: All of them.
        per_node: On one node.
        network_bytes_per_s: That each GPU sends to other nodes: 400 Gbit/s is 50e9.
        use: Share of the peak that a step reaches while nothing is waited for.
        attention_use: The same of attentions' scores and sums; None: as ``use``.
        latency_s: Of a message, however small.
        overlaps: Whether anything travels while it computes. Ranks on a CPU whose cores all compute have nobody else to copy.
        dollars_per_gpu_hour: None where nobody asks.
    """

    gpu: Gpu
    gpus: int
    per_node: int = 8
    network_bytes_per_s: float = 50e9
    use: float = 0.45
    attention_use: float | None = None
    latency_s: float = 20e-6
    overlaps: bool = True
    dollars_per_gpu_hour: float | None = None

    @property
    def flops_per_s(self) -> float:
        """That one GPU computes, but for attentions."""
        return self.gpu.flops_per_s * self.use

    @property
    def scores_cost(self) -> float:
        """What a FLOP of an attention's scores and sums takes, over one of a product."""
        return 1.0 if self.attention_use is None else self.use / self.attention_use

    def bytes_per_s(self, ranks: int) -> float:
        """That a rank sends to the others of a group of consecutive ranks."""
        return self.gpu.link_bytes_per_s if ranks <= self.per_node else min(self.gpu.link_bytes_per_s, self.network_bytes_per_s)


@dataclass(frozen=True, kw_only=True)
class StepTime:
    """Seconds of one optimizer step.

    Args:
        compute_s: Matrix products, recomputation included.
        tokens_s: Of the traffic between ranks that share a sample, what nothing hides.
        tensor_s: Sums between ranks that share linears; nothing hides them.
        weights_s: Of weights and gradients, what nothing hides.
        optimizer_s: One pass over weights, gradients, moments and average; in CPU memory, where ``zero.offload`` has them there.
        offload_s: To CPU memory and back, what nothing hides.
        tokens_bytes: That a rank sends in a step, to others that share its samples; by time and bandwidth.
        tensor_bytes: That a rank sends to those that share its linears.
        weights_bytes: That a rank sends of weights and gradients.
    """

    compute_s: float
    tokens_s: float
    tensor_s: float
    weights_s: float
    optimizer_s: float
    offload_s: float
    tokens_bytes: float
    tensor_bytes: float
    weights_bytes: float

    @property
    def total_s(self) -> float:
        """All of it."""
        return self.compute_s + self.tokens_s + self.tensor_s + self.weights_s + self.optimizer_s + self.offload_s


def step_time(case: MemoryCase, cost: SampleCost, machine: Machine) -> StepTime:
    """Of the ``native`` backend.

    Args:
        case: The layout and its micro-batch, of samples of one shape.
        cost: Of one sample, from the model.
    """
    parallel, depth = case.parallel, case.model.shape.depth
    cost = _as_products(_of_tp(case, cost), scores_cost=machine.scores_cost)
    shared, bandwidth = _predicted(case, cost, machine)
    compute_s = shared.compute_s * (1 + _tiled_again(case, cost))
    tensor_bytes, tensor_s = _tensor(case, machine)
    weights_bytes, weights_takes = _weights(case, machine)
    hidden = _HIDDEN * compute_s if machine.overlaps else 0.0
    shard_bytes = _weight_bytes(case) * _numbers_of_rank(case) / _shards(case)
    passes_per_s = machine.gpu.memory_bytes_per_s if parallel.zero.offload == "none" else _HOST_MEMORY_BYTES_PER_S
    return StepTime(
        compute_s=compute_s,
        tokens_s=shared.exposed_s,
        tensor_s=tensor_s,
        weights_s=max(0.0, weights_takes - hidden) + (weights_takes / depth if machine.overlaps else 0.0),
        optimizer_s=OPTIMIZER_PASSES * shard_bytes / passes_per_s,
        offload_s=_offload(case, shard_bytes=shard_bytes, compute_s=compute_s),
        tokens_bytes=shared.communication_s * bandwidth,
        tensor_bytes=tensor_bytes,
        weights_bytes=weights_bytes,
    )


def _predicted(case: MemoryCase, cost: SampleCost, machine: Machine) -> tuple[Prediction, float]:
    """Compute and tokens, and the bytes per second that these rest on."""
    parallel = case.parallel
    patch = Thw(*case.model.patch)
    # Ranks that share a sample are ``tp`` apart.
    bandwidth = machine.bytes_per_s(parallel.sp.degree * parallel.tp)
    network = Network(
        latency_s=machine.latency_s,
        bytes_per_s=bandwidth,
        flops_per_s=machine.flops_per_s,
        world=parallel.sp.degree,
        device="cuda",
        dtype=case.dtype,
        width=case.model.shape.width,
    )
    work = Workload(
        grid=Thw(case.latent.t // patch.t, case.latent.h // patch.h, case.latent.w // patch.w),
        batch=case.micro_batch,
        cost=cost,
        element_bytes=_compute_bytes(case),
        accum=parallel.grad_accum,
        recompute=parallel.recompute,
        tp=parallel.tp,
        scores_cost=machine.scores_cost,
    )
    scheme = parallel.sp.scheme if parallel.sp.degree > 1 else "local"
    sp = parallel.sp if machine.overlaps else parallel.sp.model_copy(update={"overlap": False})
    return _predict(work, scheme, parallel.sp.degree, network, sp=sp), bandwidth


def _of_tp(case: MemoryCase, cost: SampleCost) -> SampleCost:
    """What one of ``tp`` ranks does of it: its part of every linear and attention of the blocks, and all that is outside of them."""
    tp = case.parallel.tp
    if tp == 1:
        return cost
    patch = Thw(*case.model.patch).volume
    ends = 4 * (case.latent.volume // patch) * case.model.shape.width * case.channels * patch
    whole = cost.replicated_flops + ends
    return replace(
        cost, flops=(cost.flops - whole) // tp + whole, then_flops=cost.then_flops // tp, scores_flops=cost.scores_flops // tp
    )


def _as_products(cost: SampleCost, *, scores_cost: float) -> SampleCost:
    """With as many FLOPs of products instead of scores as would take as long."""
    more = round((scores_cost - 1) * cost.scores_flops)
    return replace(cost, flops=cost.flops + more, scores_flops=cost.scores_flops + more)


def _tiled_again(case: MemoryCase, cost: SampleCost) -> float:
    """Tiles are computed once more in backward, whatever else is: the MLP's forward, over all that a step computes. Of a rank of ``tp``."""
    parallel, D = case.parallel, case.model.shape.width
    if parallel.tile_tokens is None:
        return 0.0
    patch = Thw(*case.model.patch)
    mlp = 4 * D * D * case.model.mlp_ratio * case.model.shape.depth * (case.latent.volume // patch.volume) / parallel.tp
    again = {"none": 0.0, "selective": 1 - cost.scores_flops / cost.flops, "full": 1.0}[parallel.recompute]
    return mlp / (cost.flops * (3 + again))


def _numbers(shapes: list[tuple[int, int]]) -> int:
    return sum(rows * row for rows, row in shapes)


def _numbers_of_rank(case: MemoryCase) -> int:
    """Of all parameters, or of one of ``tp`` ranks' part of them."""
    return case.model.shape.depth * _numbers(block_shapes(case)) + _numbers(root_shapes(case))


def _compute_bytes(case: MemoryCase) -> int:
    return {"bfloat16": 2, "float32": 4, "float64": 8}[case.dtype]


def _weight_bytes(case: MemoryCase) -> int:
    return max(4, _compute_bytes(case))


def _shards(case: MemoryCase) -> int:
    """Ranks that a copy of the parameters, or of a rank of ``tp``'s part of them, is spread over."""
    return case.world // (case.parallel.dp_replicate * case.parallel.tp) if case.parallel.zero.stage else 1


def _weights(case: MemoryCase, machine: Machine) -> tuple[float, float]:
    """Bytes that a rank sends of weights and gradients in a step, and the seconds that takes alone (docs/parallel.md has who sends what).

    Shards lie ``tp`` ranks apart; copies of them further apart than all shards of one. Copies are summed with the last micro-batch.
    """
    parallel, numbers, w = case.parallel, _numbers_of_rank(case), _weight_bytes(case)
    stage, accum = parallel.zero.stage, parallel.grad_accum
    if stage == 0:
        return _among(machine, case.world, 2 * w * numbers, apart=1)
    gathers = 2 * accum if stage == 3 else 1
    reductions = 1 if stage == 1 else accum
    shards = _shards(case)
    sent, takes = _among(machine, shards, (gathers * _compute_bytes(case) + reductions * w) * numbers, apart=parallel.tp)
    more, longer = _among(machine, parallel.dp_replicate, 2 * w * numbers / shards, apart=parallel.tp * shards)
    return sent + more, takes + longer


def _tensor(case: MemoryCase, machine: Machine) -> tuple[float, float]:
    """Bytes that a rank sends to those that share its linears, and seconds.

    A branch sums its tokens once in forward and once in backward, and no more where it is computed again; the caption's gradient is summed
    once for all blocks, and once in a step the gradients of what these ranks hold alike (``parallel.tensor.group``, ``NativeBackend.clip``).
    """
    tp, accum, c, width = case.parallel.tp, case.parallel.grad_accum, _compute_bytes(case), case.model.shape.width
    if tp == 1:
        return 0.0, 0.0
    branches = case.model.shape.depth * (4 if case.model.name == "stdit" else 3)
    tokens = 2 * branches * tokens_of_rank(case) + case.captions * case.text_tokens
    alike = _weight_bytes(case) * _numbers(root_shapes(case)) / _shards(case)
    sent, takes = _among(machine, tp, 2 * (accum * tokens * width * c + alike), apart=1)
    return sent, takes + (2 * branches + 1) * accum * machine.latency_s


def _offload(case: MemoryCase, *, shard_bytes: float, compute_s: float) -> float:
    """Seconds that compute doesn't hide, of what goes to CPU memory or comes from there.

    Activations go and come; of ``all`` a shard of the weights comes for every gathering and its gradient goes with every reduction. Of
    ``optimizer`` gradients go when all are there, and weights come back before the next step: nothing hides either.
    """
    parallel, accum = case.parallel, case.parallel.grad_accum
    beside = 2 * (case.model.shape.depth - 1) * kept_of_block(case) * accum if parallel.offload_activations else 0.0
    if parallel.zero.offload == "all":
        gathers = 2 * accum if parallel.zero.stage == 3 else 1
        beside += (gathers + (1 if parallel.zero.stage == 1 else accum)) * shard_bytes
    alone = 2 * shard_bytes if parallel.zero.offload == "optimizer" else 0.0
    return max(0.0, beside / _HOST_BYTES_PER_S - compute_s) + alone / _HOST_BYTES_PER_S


def _among(machine: Machine, ranks: int, num_bytes: float, *, apart: int) -> tuple[float, float]:
    """A gathering, or a summing, of so many bytes: what a rank sends, and seconds.

    Over several nodes every GPU's network card carries its part of what the nodes pass on, and NVLink the rest: whichever takes longer.

    Args:
        apart: Of two neighbours in the group, how far their ranks are.
    """
    sent = num_bytes * (ranks - 1) / ranks
    within = max(1, min(ranks, machine.per_node // apart))
    nodes = ranks / within
    between = num_bytes * (nodes - 1) / nodes / within / machine.network_bytes_per_s
    return sent, max(sent / machine.gpu.link_bytes_per_s if within > 1 else 0.0, between)
