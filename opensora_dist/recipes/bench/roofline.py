"""The least time that a training step can take on a device, operator by operator: its arithmetic, or its traffic with the memory.

Each operator reads its inputs and writes its outputs once, in forward and in backward; what a kernel could keep to itself by doing two
operators at once is the operators of ``ops`` (LayerNorm with modulation, a sum with the norm after it, a bias with GELU). One rank.
"""

# n tokens of a micro-batch, Y text tokens of all its samples, D width, H hidden width of the MLP, N heads
# c bytes of a number in the dtype of the computation, r in that of the residual stream, w in that of the weights

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from torch import nn

from opensora_dist.core.types import Thw
from opensora_dist.models.layers import Block, SelfAttention
from opensora_dist.models.stdit.model import STDiTBlock
from opensora_dist.plan.hardware import Gpu
from opensora_dist.plan.memory import MemoryCase
from opensora_dist.plan.time import OPTIMIZER_PASSES
from opensora_dist.recipes.bench.case import DTYPES
from opensora_dist.recipes.bench.training import meta_model

PRODUCTS, ATTENTION, NORMS, GELU, COPIES, OPTIMIZER = (
    "matrix products",
    "attention",
    "norms, modulation, gates",
    "GELU",
    "copies",
    "optimizer",
)
_FLASH_BACKWARD = 2.5
"""Products of an attention's backward over those of its forward, where scores are computed again rather than stored: 5 to 2."""


@dataclass(frozen=True, kw_only=True)
class Pass:
    """One reading of inputs and writing of outputs.

    Args:
        flops: Of matrix products and attention; pointwise work is never the limit, and has 0.
        bytes: Read and written.
    """

    flops: float = 0.0
    bytes: float = 0.0

    def limit_s(self, gpu: Gpu) -> float:
        """Seconds that it takes at least."""
        return max(self.flops / gpu.flops_per_s, self.bytes / gpu.memory_bytes_per_s)


@dataclass(frozen=True, kw_only=True)
class Operator:
    """All calls of one operator in a step.

    Args:
        kind: A key of ``kinds.KINDS``.
        times: How often.
        forward: One call's, with what backward runs again.
        backward: One call's; a linear has two products there.
    """

    name: str
    kind: str
    times: int
    forward: tuple[Pass, ...]
    backward: tuple[Pass, ...]

    @property
    def flops(self) -> float:
        """Of all calls, both directions."""
        return self.times * sum(p.flops for p in (*self.forward, *self.backward))

    @property
    def bytes(self) -> float:
        """Likewise."""
        return self.times * sum(p.bytes for p in (*self.forward, *self.backward))

    @property
    def forward_flops(self) -> float:
        """Of all calls, without what backward runs again."""
        return self.times * sum(p.flops for p in self.forward[:1])

    def limit_s(self, gpu: Gpu) -> float:
        """Of all calls."""
        return self.times * sum(p.limit_s(gpu) for p in (*self.forward, *self.backward))


def limit_s(operators: list[Operator], gpu: Gpu) -> float:
    """Of a whole step."""
    return sum(op.limit_s(gpu) for op in operators)


def model_flops(operators: list[Operator]) -> float:
    """That MFU is of: the model's own of a forward, times 3."""
    return 3 * sum(op.forward_flops for op in operators)


def step_operators(case: MemoryCase) -> list[Operator]:
    """Of a step of one rank that holds whole samples (``parallel.sp`` and ``tp`` of 1)."""
    assert case.parallel.sp.degree == case.parallel.tp == 1, case.parallel
    model = meta_model(replace(case, model=case.model.model_copy(update={"depth": 1})))  # all blocks are alike
    c = DTYPES[case.dtype].itemsize
    w = max(4, c)
    grid = model.token_grid(case.latent)
    sizes = _Sizes(n=case.micro_batch * grid.volume, Y=case.micro_batch * case.text_tokens, grid=grid, c=c, r=max(4, c))
    block = model.blocks[0]
    assert isinstance(block, Block)
    depth, accum = case.model.shape.depth, case.parallel.grad_accum
    found = [_again(replace(op, times=op.times * depth), case.parallel.recompute) for op in _of_block(block, sizes)]
    embed = model.x_embedder.proj
    rows = embed.in_channels * model.patch.volume
    found.append(_product("patch embedder", rows, embed.out_channels, rows_of=sizes.n, c=c))
    found.append(_linear("final layer", model.final_layer.linear, tokens=sizes.n, c=c))
    found.append(_pointwise("final norm and modulation", NORMS, sizes, width=embed.out_channels, forward="rc", backward="rrc"))
    few = [(model.t_embedder, 1), (model.t_block, 1), (model.y_embedder, case.text_tokens), (model.y_pool, 1)]
    for module, tokens in few:
        for linear in _linears(module) if module is not None else ():
            found.append(_linear("timestep and caption", linear, tokens=case.micro_batch * tokens, c=c))
    found = [replace(op, times=op.times * accum) for op in found]
    numbers = sum(p.numel() for p in model.parameters()) + (depth - 1) * sum(p.numel() for p in block.parameters())
    if c < w:
        cast = Pass(bytes=numbers * (w + c))
        found.append(
            Operator(name="casts of weights and their gradients", kind=COPIES, times=accum, forward=(cast,), backward=(cast,))
        )
    passes = Pass(bytes=OPTIMIZER_PASSES * w * numbers)
    found.append(Operator(name="clip, AdamW, average", kind=OPTIMIZER, times=1, forward=(), backward=(passes,)))
    return found


@dataclass(frozen=True, kw_only=True)
class _Sizes:
    n: int
    Y: int
    grid: Thw
    c: int
    r: int


def _of_block(block: Block, sizes: _Sizes) -> Iterator[Operator]:
    D, H, S, T = block.mlp.fc2.out_features, block.mlp.fc1.out_features, sizes.grid.h * sizes.grid.w, sizes.grid.t
    n, c = sizes.n, sizes.c
    space, time = ("space", S), ("time", T)
    attentions: list[tuple[str, int, SelfAttention]] = [("all tokens", S * T, block.attn)]
    if isinstance(block, STDiTBlock):
        attentions = [(*space, block.attn), (*time, block.attn_temp)]
    yield _pointwise("norm and modulation", NORMS, sizes, width=D, forward="rc", backward="rrrc")
    for name, length, attn in attentions:
        if name == "time":
            yield _pointwise("positions and cast, time", NORMS, sizes, width=D, forward="rc", backward="rrc")
        yield _linear(f"qkv, {name}", attn.qkv, tokens=n, c=c)
        yield _attention(f"attention, {name}", sizes, queries=n, keys=n, length=length, width=D, heads=attn.heads)
        yield _linear(f"projection, {name}", attn.proj, tokens=n, c=c)
        yield _pointwise(f"gate and sum, {name}", NORMS, sizes, width=D, forward="rrc", backward="rcc")
    cross, Y = block.cross_attn, sizes.Y
    yield _pointwise("cast, caption", NORMS, sizes, width=D, forward="rc", backward="rrc")
    yield _linear("q, caption", cross.q_linear, tokens=n, c=c)
    yield _linear("k and v, caption", cross.kv_linear, tokens=Y, c=c)
    per_sample = Y * sizes.grid.volume // n
    yield _attention("attention, caption", sizes, queries=n, keys=Y, length=per_sample, width=D, heads=cross.heads)
    yield _linear("projection, caption", cross.proj, tokens=n, c=c)
    yield _pointwise("sum, norm and modulation", NORMS, sizes, width=D, forward="rrcc", backward="rrrcc")
    yield _linear("MLP, in", block.mlp.fc1, tokens=n, c=c)
    yield _pointwise("bias and GELU", GELU, sizes, width=H, forward="cc", backward="ccc")
    yield _linear("MLP, out", block.mlp.fc2, tokens=n, c=c)
    yield _pointwise("gate and sum, MLP", NORMS, sizes, width=D, forward="rrc", backward="rcc")


def _linears(module: nn.Module) -> list[nn.Linear]:
    return [m for m in module.modules() if isinstance(m, nn.Linear)]


def _linear(name: str, linear: nn.Linear, *, tokens: int, c: int) -> Operator:
    return _product(name, linear.in_features, linear.out_features, rows_of=tokens, c=c)


def _product(name: str, width_in: int, width_out: int, *, rows_of: int, c: int) -> Operator:
    """``x W``, and in backward the gradients of x and of W: each of the three reads two of them and writes the third."""
    one = Pass(flops=2.0 * rows_of * width_in * width_out, bytes=c * (rows_of * (width_in + width_out) + width_in * width_out))
    return Operator(name=name, kind=PRODUCTS, times=1, forward=(one,), backward=(one, one))


def _attention(name: str, sizes: _Sizes, *, queries: int, keys: int, length: int, width: int, heads: int) -> Operator:
    """Scores stay in the chip. Forward: q, k, v in, the output and its log-sum-exps out; backward: those and a gradient in, three out."""
    flops = 4.0 * queries * length * width
    lse = 4 * queries * heads
    forward = Pass(flops=flops, bytes=2 * width * sizes.c * (queries + keys) + lse)
    backward = Pass(flops=_FLASH_BACKWARD * flops, bytes=4 * width * sizes.c * (queries + keys) + lse)
    return Operator(name=name, kind=ATTENTION, times=1, forward=(forward,), backward=(backward,))


def _pointwise(name: str, kind: str, sizes: _Sizes, *, width: int, forward: str, backward: str) -> Operator:
    """
    Args:
        forward: What is read and written of each token, in the residual's dtype (r) or the computation's (c).
        backward: Likewise; the residual's gradient is read and written where a branch's is added to it.
    """
    of = {"r": sizes.r, "c": sizes.c}
    first, then = (Pass(bytes=sizes.n * width * sum(of[letter] for letter in letters)) for letters in (forward, backward))
    return Operator(name=name, kind=kind, times=1, forward=(first,), backward=(then,))


def _again(op: Operator, recompute: str) -> Operator:
    """With what backward runs again of a block."""
    if recompute == "none" or (recompute == "selective" and op.kind == ATTENTION):
        return op
    return replace(op, forward=op.forward * 2)
