"""What one rank holds in memory at the worst moment of a training step, by formula.

One formula for the planner, the documents and the tests, which hold it to simulated steps in worlds of up to 512 ranks and to real ones.
A step has a few moments at which memory can be highest; each is the sum of what is alive then. What grows or shrinks from block to block
does so evenly, so that only the first blocks that backward comes to, and the last, need be looked at.

Not in it: what a GPU's allocator loses to fragmentation, buffers of NCCL, workspaces of cuDNN and cuBLAS, the CUDA context.
"""

# n tokens of a micro-batch on this rank, D width, H hidden width of the MLP, N heads, A self-attentions of a block
# c bytes of a number in the dtype of the computation, w in that of the weights, r in that of the residual stream

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from math import ceil
from typing import Literal

from opensora_dist.config.train import ModelConfig, ParallelConfig
from opensora_dist.core.types import Thw
from opensora_dist.plan.moment import MemoryEstimate

_TIMESTEP_FREQUENCIES = 256
_TABLE_ROWS = 6  # shift, scale and gate of attention and of the MLP
_BYTES = {"float32": 4, "bfloat16": 2, "float64": 8}


@dataclass(frozen=True, kw_only=True)
class MemoryCase:
    """A layout to be judged, with the ``native`` backend.

    Args:
        latent: Of one whole sample.
        dtype: ``run.dtype``.
        kernels: ``run.kernels``. Triton's norms keep their input alone.
        micro_batch: Samples that a rank (with those that share them) works on at once.
        packed_samples: Of packs, how many samples there really are, of any shapes, whose tokens are those of ``micro_batch`` of ``latent``;
            0 where samples have one shape.
        text_tokens: Of the longest caption of a batch.
        max_tokens: Of the null caption.
        channels: Latent channels, in and out.
    """

    model: ModelConfig
    parallel: ParallelConfig
    world: int
    latent: Thw
    dtype: str
    kernels: Literal["torch", "triton"] = "torch"
    micro_batch: int = 1
    packed_samples: int = 0
    channels: int = 4
    text_width: int = 4096
    text_tokens: int = 120
    max_tokens: int = 120

    @property
    def captions(self) -> int:
        """Samples that text is held for."""
        return self.packed_samples or self.micro_batch


@dataclass(frozen=True, kw_only=True)
class _Unit:
    """Numbers of what FSDP2 shards together: a block, or all that is in none.

    Args:
        whole: Of the parameters.
        shard: Of the largest shard. Each parameter is cut along its first dim: ``ceil`` of its rows.
        padded: Of the parameters as they are gathered and reduced, each to equal shards.
    """

    whole: int
    shard: int
    padded: int


_Shape = tuple[int, int]  # rows, along which a parameter is cut, and numbers in a row


def block_shapes(case: MemoryCase) -> list[_Shape]:
    """Of a block's parameters; of linears the part of one of ``tp`` ranks."""
    D, H, tp = case.model.shape.width, _hidden(case), case.parallel.tp
    attention = [(3 * D // tp, D), (3 * D // tp, 1), (D, D // tp), (D, 1)]
    cross = [(D // tp, D), (D // tp, 1), (2 * D // tp, D), (2 * D // tp, 1), (D, D // tp), (D, 1)]
    mlp = [(H // tp, D), (H // tp, 1), (D, H // tp), (D, 1)]
    return [*attention * _attentions(case), *cross, *mlp, (_TABLE_ROWS, D)]


def root_shapes(case: MemoryCase) -> list[_Shape]:
    """Of the parameters outside of blocks: embedders of patches, timestep and text, ``t_block``, the final layer."""
    D, E, patch = case.model.shape.width, case.text_width, Thw(*case.model.patch).volume
    ends = [(D, case.channels * patch), (case.channels * patch, D)]
    linears = [*ends, (D, _TIMESTEP_FREQUENCIES), (D, D), (6 * D, D), *[(D, E)] * (1 + case.model.pooled_text), (D, D)]
    return [*linears, *((rows, 1) for rows, _ in linears), (2, D)]


def estimate(case: MemoryCase) -> MemoryEstimate:
    """The moment of a step at which a rank holds most."""
    return max(moments(case), key=lambda moment: moment.total)


def moments(case: MemoryCase) -> list[MemoryEstimate]:
    """Those at which memory can be highest, in the order of a step; of the last micro-batch, where there are several."""
    step = _Step(case)
    depth = case.model.shape.depth
    blocks = sorted({0, min(1, depth - 1), depth - 1})
    found = [step.forward_of_last(), step.at("backward of the final layer", done=0, activations=step.acts.final_peak())]
    for done in blocks:
        name = f"backward of block {depth - 1 - done}"
        found.append(step.at(f"{name}, begun", done=done, activations=step.acts.block_begun(depth - done)))
        found.append(step.block_ended(f"{name}, ended", done=done))
    return [*found, step.root_ended(), step.optimizer_step()]


def forward_end(case: MemoryCase) -> MemoryEstimate:
    """When forward ends: what is kept for backward, and nothing else."""
    step = _Step(case)
    return step.at("end of forward", done=0, activations=step.acts.kept(case.model.shape.depth) + step.acts.ends(), unsharded=0)


def kept_of_block(case: MemoryCase) -> float:
    """Bytes that autograd keeps of one block, not the last, from its forward until its backward; offloaded or not."""
    return _Activations(case).of_block


def tokens_of_rank(case: MemoryCase) -> int:
    """Of a micro-batch, those of the rank that has most: of some frames, or of some rows where frames are fewer than ranks."""
    sp, grid = case.parallel.sp.degree, _grid(case)
    t, h = (ceil(grid.t / sp), grid.h) if grid.t >= sp else (grid.t, ceil(grid.h / sp))
    return case.micro_batch * t * h * grid.w


def _grid(case: MemoryCase) -> Thw:
    patch = Thw(*case.model.patch)
    return Thw(case.latent.t // patch.t, case.latent.h // patch.h, case.latent.w // patch.w)


def _hidden(case: MemoryCase) -> int:
    return int(case.model.shape.width * case.model.mlp_ratio)


def _attentions(case: MemoryCase) -> int:
    return 2 if case.model.name == "stdit" else 1


class _Step:
    """What is alive, as a function of how many blocks backward is done with."""

    def __init__(self, case: MemoryCase) -> None:
        parallel = case.parallel
        self.case, self.stage, self.depth = case, parallel.zero.stage, case.model.shape.depth
        self.c = _BYTES[case.dtype]
        self.w = max(4, self.c)
        ranks = case.world // (parallel.dp_replicate * parallel.tp) if self.stage else 1
        self.block, self.root = _unit(block_shapes(case), ranks), _unit(root_shapes(case), ranks)
        self.acts = _Activations(case)
        self.shard = self.w * (self.depth * self.block.shard + self.root.shard)
        self.buffers = self.w * case.max_tokens * case.text_width
        self.offload = parallel.zero.offload

    def at(self, moment: str, *, done: int, activations: float, unsharded: int = 1) -> MemoryEstimate:
        """A moment of the last backward.

        Args:
            done: Blocks that are done.
            unsharded: 0 before backward has gathered anything.
        """
        return MemoryEstimate(
            moment=moment,
            parameters=self.buffers + (0 if self.offload == "all" else self.shard),
            gathered=self._gathered(done, unsharded=unsharded),
            gradients=self._gradients(done),
            optimizer=0 if self.offload != "none" else 2 * self.shard,
            ema=0 if self.offload != "none" else self.shard,
            activations=int(activations),
            # Weights, gradients, both moments and the moving average.
            host=int(self.acts.offloaded()) + (0 if self.offload == "none" else 5 * self.shard),
        )

    def forward_of_last(self) -> MemoryEstimate:
        """Forward of the last block ends. The buffer that its weights were gathered in is let go with the next gathering only."""
        now = self.at("forward of the last block", done=0, activations=self.acts.forward_of_last())
        gathers = self.stage in (1, 2) and self.case.parallel.grad_accum == 1  # else the first micro-batch has done it
        return replace(now, gathered=now.gathered + (self.c * self.block.padded if gathers else 0))

    def block_ended(self, moment: str, *, done: int) -> MemoryEstimate:
        """Whole gradients of a block are there; what was reduced before has not been let go, unless it is the first."""
        now = self.at(moment, done=done, activations=self.acts.block_ended(self.depth - done))
        if self.stage == 0:
            return now
        own = self.c * self.block.whole
        if done == 0:
            # Packed for the first reduction, once weights are let go; accumulated gradients wait in what they were added to.
            packed = (self.w - self.c) * self.block.padded
            own = max(own, packed) if self.stage == 1 and self.case.parallel.grad_accum > 1 else own + packed
        return replace(now, gradients=now.gradients + own)

    def root_ended(self) -> MemoryEstimate:
        """The parameters outside of blocks come last."""
        now = self.at("end of backward", done=self.depth, activations=self.acts.inputs)
        return replace(now, gradients=now.gradients + (self.c * self.root.whole if self.stage else 0))

    def optimizer_step(self) -> MemoryEstimate:
        """Nothing is gathered; every gradient is there."""
        now = self.at("optimizer step", done=self.depth, activations=self.acts.inputs)
        return replace(now, gathered=0, gradients=self.shard if self.offload != "all" else 0)

    def _gathered(self, done: int, *, unsharded: int) -> int:
        """Whole weights, padded: FSDP2 gathers them in the dtype of the computation. The root's stay from forward on.

        Stages 1 and 2 let a block's go after its last backward. Stage 3 has those of the block at work and of ``prefetch`` after it.
        Stage 0 has casts of all under autocast, which keeps them until the micro-batch ends.
        """
        block, root = self.c * self.block.padded, self.c * self.root.padded
        if self.stage == 0:
            return self.depth * block + root if self.c < self.w else 0
        if self.stage < 3:
            return root + (self.depth - done) * block
        ahead = min(self.case.parallel.zero.prefetch, max(0, self.depth - 1 - done))
        return root + unsharded * min(1, self.depth - done) * (1 + ahead) * block

    def _gradients(self, done: int) -> int:
        """Between two blocks: shards of what is done, what the last reduction was given, and whole ones of earlier micro-batches."""
        accum = self.case.parallel.grad_accum
        if self.stage == 0:
            return self.shard  # buckets, which are there all the time
        shards = self.shard if accum > 1 and self.stage > 1 else self.w * done * self.block.shard
        if self.offload == "all":
            shards = 0  # each leaves for CPU memory when it is summed
        whole = self.w * ((self.depth - done) * self.block.whole + self.root.whole) if accum > 1 and self.stage == 1 else 0
        before = self.root.padded if accum > 1 and self.stage > 1 else 0  # of the micro-batch before
        packed = self.block.padded if done else before
        return shards + whole + self.w * packed


def _unit(shapes: list[_Shape], ranks: int) -> _Unit:
    shard = sum(ceil(rows / ranks) * row for rows, row in shapes)
    return _Unit(whole=sum(rows * row for rows, row in shapes), shard=shard, padded=shard * ranks)


class _Activations:
    """What autograd keeps, and what operators need beside it.

    Held to the storages that are alive after the forward of a block, to the byte, for every scheme and ``recompute``, in
    ``tests/unit/test_levers.py``. What operators need beside it is held to whole steps only, to some percent.
    """

    def __init__(self, case: MemoryCase) -> None:
        self.case = case
        self.c = _BYTES[case.dtype]
        self.r = max(4, self.c)
        self.grid, self.tokens = _grid(case), tokens_of_rank(case)
        # Of a norm, what torch keeps beside its input: numbers of one [n, D] that the scale multiplies.
        self.normal = self.r if case.kernels == "torch" else 0
        self.latents = self.tokens * Thw(*case.model.patch).volume * case.channels
        self.stream = self.tokens * case.model.shape.width  # numbers of one [n, D]

    def kept(self, blocks: int) -> float:
        """Of this many blocks, the embedded inputs among them. Offloaded are all but the block at work and the one that is fetched."""
        here = min(blocks, 2) if self.case.parallel.offload_activations else blocks
        return here * self.of_block + self.inputs

    def offloaded(self) -> float:
        """In CPU memory when backward begins: of all blocks but the last."""
        return (self.case.model.shape.depth - 1) * self.of_block if self.case.parallel.offload_activations else 0.0

    @cached_property
    def inputs(self) -> float:
        """Latents of all micro-batches, noise, what the loss keeps; text and what is made of it; tables of positions."""
        case, D = self.case, self.case.model.shape.width
        text = case.captions * case.text_tokens * (case.text_width * (self.r + 2 * self.c) + 3 * D * self.c)
        tables = (self.grid.h * self.grid.w + self.grid.t) * D * self.r
        return self.latents * self.r * (case.parallel.grad_accum + 3) + text + tables

    def ends(self) -> float:
        """The final layer: the last block's output, its norm, and the modulated norm; with tiles, the output alone."""
        return self.stream * (self.r if self.case.parallel.tile_tokens else self.r + self.c + self.normal)

    def forward_of_last(self) -> float:
        """Without recomputation: all that is kept, and what its MLP works with."""
        return self.kept(self.case.model.shape.depth) + self._forward_work()

    def _forward_work(self) -> float:
        """At the end of a block's forward: the stream, the modulated norm before its cast, the output; under ``dsp`` rows, too."""
        sp = self.case.parallel.sp
        rows = 2 * self.r + self.c if sp.degree > 1 and sp.scheme == "dsp" else 0
        return self.stream * (2 * self.r + self.c + rows)

    def final_peak(self) -> float:
        """Backward of its norm: three more of the residual stream, and the modulated norm is gone."""
        work = self.r if self.case.parallel.tile_tokens else 3 * self.r - self.c
        return self.kept(self.case.model.shape.depth) + self.ends() + self.stream * work

    def block_begun(self, blocks: int) -> float:
        """Backward comes to the last of ``blocks``: all that it keeps is there, the residual's gradient, and what its MLP makes."""
        case, D = self.case, self.case.model.shape.width
        hidden = _hidden(case) // case.parallel.tp
        # Gradients of the MLP's hidden layer and of a weight; of a tile also what its second run keeps.
        tile = case.parallel.tile_tokens
        work, inner = float(self.c * hidden * (D + (self.tokens if tile is None else 3 * min(tile, self.tokens)))), 0.0
        if case.parallel.recompute != "none":
            inner = self._block_none - self.stream * self.r
            if case.parallel.recompute == "selective":
                inner -= self._attention_outputs()
            work = max(work, self._forward_work())
        return self.kept(blocks) + inner + self.stream * self.r + work

    def block_ended(self, blocks: int) -> float:
        """Nothing of the last of ``blocks`` is left but its input, and gradients of the residual."""
        return self.kept(blocks - 1) + self.stream * 3 * self.r

    @cached_property
    def of_block(self) -> float:
        """Kept of a block between its forward and its backward."""
        if self.case.parallel.recompute == "none":
            return self._block_none
        kept = self.stream * self.r + self._received()
        return kept + self._attention_outputs() if self.case.parallel.recompute == "selective" else kept

    @cached_property
    def _block_none(self) -> float:
        """All of a block. In multiples of [n, D]; what lies between two linears of a branch is a ``tp``-th of it.

        - Two norms: input and output in the residual's dtype, mean and deviation of each token; by Triton the input alone.
        - Self-attention, ``A`` times: its input, cast (1), q, k and v (3 / tp), the attention's output, which is the projection's input
          (1 / tp), the output that the gate multiplies (1). Of a second, along time, the input is a copy, since it is transposed.
        - Cross-attention: its input, cast (1), q (1 / tp), output (1 / tp). The sum keeps nothing.
        - MLP: its input, cast (1), before and after GELU (2 H / D / tp), the output that the gate multiplies (1).
          With tiles, without the two of H.
        - Log-sum-exps of all attentions; the caption's keys and values.
        - Of a pack, outputs of attentions shape by shape (1 each), beside the one sequence that the projection takes; for an attention
          that crosses ranks that is the scheme's.
        Weights are not counted: gathered ones are FSDP2's, and casts are autocast's.
        """
        case, A, tp = self.case, _attentions(self.case), self.case.parallel.tp
        D, N = case.model.shape.width, case.model.shape.heads
        hidden = 0 if case.parallel.tile_tokens else 2 * _hidden(case) / D / tp
        of_packs = (A + 1 - (case.parallel.sp.degree > 1)) / tp if case.packed_samples else 0
        multiples = A * (2 + 4 / tp) + (1 + 2 / tp) + (2 + hidden) + of_packs
        stats = self.tokens * self.r * (4 * (case.kernels == "torch") + (A + 1) * N / tp)
        text = case.captions * case.text_tokens * 4 * D * self.c / tp
        return self.stream * (2 * self.r + 2 * self.normal + multiples * self.c) + stats + text + self._scheme_extra()

    def _attention_outputs(self) -> float:
        """What selective recomputation keeps: outputs and log-sum-exps of attentions, but of one in hops, which the tape has."""
        case, in_hops = self.case, self.case.parallel.sp.degree > 1 and self.case.parallel.sp.scheme in ("ring", "usp")
        attentions = _attentions(case) + (0 if in_hops else 1)
        return attentions * (self.stream * self.c + self.tokens * case.model.shape.heads * self.r) / case.parallel.tp

    def _received(self) -> float:
        """What recomputation keeps of the attention that crosses ranks, so that nothing is sent again (the schemes' docstrings)."""
        sp = self.case.parallel.sp
        if sp.degree == 1:
            return 0.0
        lse = self.tokens * self.case.model.shape.heads * self.r
        known = {"dsp": 2 * (sp.degree - 1) / sp.degree * self.c, "ring": self.c, "usp": 5 * self.c}
        multiples = known.get(sp.scheme, 4 * self.c)
        return self.stream * multiples + (lse if sp.scheme in ("ring", "usp") else 0)

    def _scheme_extra(self) -> float:
        """Without recomputation: the attention's output is kept twice, as it was computed and as it came to the projection."""
        sp = self.case.parallel.sp
        multiples = 0 if sp.degree == 1 or sp.scheme in ("ring", "allgather") else self.c
        return self.stream * multiples
