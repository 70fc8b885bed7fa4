"""Every case that sequence parallelism must get right, generated from the registry of schemes, and the comparison with one process.

A row is scheme x model x ranks that share a sample x world. Its cases are all shapes x recompute x every value of every option
that the scheme reads. A scheme joins by its line in the registry.
"""

# B batch, C latent channels, T frames, H rows, W columns, D width, Y text tokens, E text width; t, h: those of this rank

from __future__ import annotations

import copy
import itertools
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields
from functools import cache
from typing import Any, get_args

import torch
import torch.distributed as dist
from torch import Tensor, nn

from opensora_dist.config.train import ModelConfig, SpConfig
from opensora_dist.core.types import Region, Thw
from opensora_dist.models.base import ModelIo
from opensora_dist.models.registry import MODELS, build_model
from opensora_dist.parallel.keys import Keys
from opensora_dist.parallel.mesh import Mesh, build_mesh, sp_ulysses
from opensora_dist.parallel.recompute import Recompute
from opensora_dist.parallel.sequence.base import Shard
from opensora_dist.parallel.sequence.layout import SequenceParallel, scheme_problems
from opensora_dist.parallel.sequence.registry import SCHEMES

TOLERANCE = 1e-12
"""Largest difference from one process, over the largest value of that tensor. The law asks for 1e-10."""
STEPS = 10
MODEL_NAMES = ("stdit", "dit")
WORLDS = ((2, 1), (3, 1), (4, 1), (2, 2))
"""(ranks that share a sample, groups of them with other samples)."""

_PATCH, _CHANNELS, _TEXT_TOKENS, _TEXT_WIDTH = Thw(1, 2, 2), 2, 5, 6
_IO = ModelIo(in_channels=_CHANNELS, out_channels=_CHANNELS, text_width=_TEXT_WIDTH, max_tokens=_TEXT_TOKENS)
_VALUES = {"overlap": (True, False), "chunks": (1, 2), "fastseq_dw": ("gather", "keep")}


@dataclass(frozen=True)
class Shape:
    """Tokens of a sample, samples of a micro-batch, and the model's heads and width."""

    grid: Thw
    batch: int = 1
    heads: int = 12
    width: int = 24


SHAPES = {
    "even": Shape(Thw(12, 4, 3)),
    "uneven": Shape(Thw(5, 7, 5)),
    "one frame": Shape(Thw(1, 5, 3)),  # cut into rows, which are uneven, too
    "two captions": Shape(Thw(5, 3, 2), batch=2),
    "few frames": Shape(Thw(3, 5, 2), batch=2),  # of four ranks one would have none: rows again
    "few places": Shape(Thw(5, 1, 2)),  # some ranks own no sequence over time
    "odd heads": Shape(Thw(5, 3, 3), heads=5, width=20),
}


@dataclass(frozen=True)
class Row:
    """One line of the result table."""

    scheme: str
    model: str
    size: int
    groups: int

    @property
    def world(self) -> int:
        return self.size * self.groups

    def __str__(self) -> str:
        return f"{self.scheme}-{self.model}-sp{self.size}-dp{self.groups}"


@dataclass(frozen=True)
class Case:
    """One comparison."""

    row: Row
    shape: str
    recompute: Recompute
    options: tuple[tuple[str, Any], ...]

    @property
    def sp(self) -> SpConfig:
        return SpConfig(degree=self.row.size, scheme=self.row.scheme, **dict(self.options))

    @property
    def problems(self) -> list[str]:
        shape = SHAPES[self.shape]
        return scheme_problems(self.sp, shape.grid, heads=shape.heads, joint=self.row.model == "dit")


def rows() -> list[Row]:
    """Every scheme of the registry, under every model and world."""
    return [Row(s, m, *world) for s, m, world in itertools.product(SCHEMES, MODEL_NAMES, WORLDS)]


def cases(row: Row) -> list[Case]:
    """The full grid of a row, what the rules forbid included."""
    return [
        Case(row, shape, recompute, options)
        for shape, options, recompute in itertools.product(SHAPES, _options(row.scheme, row.size), ("none", "full"))
    ]


def covering(row: Row) -> list[Case]:
    """A few cases of a row: each shape once, each with another of its variants; neighbouring rows start elsewhere."""
    full, start, chosen = cases(row), rows().index(row), []
    for i, shape in enumerate(SHAPES):
        every = [case for case in full if case.shape == shape]
        variants = [case for case in every if not case.problems] or every
        n = len(variants)
        step = next(k for k in itertools.count(2 * n // 5 + 1) if math.gcd(k, n) == 1)  # far, so that every option changes
        chosen.append(variants[(start + i * step) % n])
    return chosen


def alternatives(problem: str) -> list[str]:
    """The schemes that a problem's text says to use instead."""
    known = get_args(SpConfig.model_fields["scheme"].annotation)
    said = re.findall(r"parallel\.sp\.scheme=(\w+(?:(?:, or | or |, )\w+)*)", problem.partition(";")[2])
    return [name for names in said for name in re.findall(r"\w+", names) if name in known]


class _Reads:
    """A config that notes what is read of it."""

    def __init__(self, sp: SpConfig) -> None:
        self.sp, self.names = sp, set()

    def __getattr__(self, name: str) -> Any:
        self.names.add(name)
        return getattr(self.sp, name)


def _options(scheme: str, size: int) -> list[tuple[tuple[str, Any], ...]]:
    """All values of all options that a scheme is made from."""
    reads = _Reads(SpConfig(degree=size, scheme=scheme))
    SCHEMES[scheme](reads)
    values = {name: of for name, of in _VALUES.items() if name in reads.names}
    if "ulysses" in reads.names:
        values["ulysses"] = tuple(u for u in range(1, size + 1) if size % u == 0)
    unknown = reads.names - {*values, "degree", "scheme"}
    assert not unknown, f"{scheme} reads parallel.sp.{unknown}, of which this matrix knows no values"
    return [tuple(zip(values, chosen)) for chosen in itertools.product(*values.values())]


# --- what is computed


@dataclass(frozen=True)
class Inputs:
    """A micro-batch; ``weight`` makes a scalar of the output, of the size that a loss has."""

    x_BCTHW: Tensor
    timestep_B: Tensor
    text_BYE: Tensor
    text_mask_BY: Tensor
    drop_caption_B: Tensor
    weight_BCTHW: Tensor


@dataclass(frozen=True)
class Result:
    """Of one forward and backward."""

    output: Tensor
    dx: Tensor
    grads: dict[str, Tensor]
    loss: Tensor


@dataclass(frozen=True)
class Errors:
    """Largest differences from one process. ``text`` and ``timestep`` are the embedders', whose use is neither whole nor sharded."""

    output: float
    dx: float
    grads: float
    text: float
    timestep: float

    @property
    def worst(self) -> float:
        return worst(asdict(self).values())


def worst(values: Any) -> float:
    """The largest; what is not a number is larger than anything."""
    return max((math.inf if math.isnan(v) else v for v in values), default=0.0)


def errors_over(ranks: Sequence[Errors]) -> Errors:
    """The largest of each."""
    return Errors(**{f.name: worst(getattr(e, f.name) for e in ranks) for f in fields(Errors)})


def latent(shape: Shape) -> Thw:
    """Of a shape's token grid."""
    return Thw(*(n * p for n, p in zip(shape.grid, _PATCH)))


def make_inputs(shape: Shape, *, group: int, step: int = 0, dtype: torch.dtype = torch.float64) -> Inputs:
    """What a group of ranks sees in a step: other samples than the other group, captions of 3, 5, 4, 1 tokens, every other dropped."""

    def normal(what: str, *size: int) -> Tensor:
        return torch.empty(size, dtype=dtype).normal_(generator=Keys(2).generator(what, group, step))

    B = shape.batch
    lengths = torch.tensor([(3, 5, 4, 1)[(B * group + i + step) % 4] for i in range(B)])
    return Inputs(
        x_BCTHW=normal("x", B, _CHANNELS, *latent(shape)),
        timestep_B=torch.tensor([3.0, 500.0, 999.0, 42.0])[B * group : B * group + B].to(dtype),
        text_BYE=normal("text", B, _TEXT_TOKENS, _TEXT_WIDTH),
        text_mask_BY=torch.arange(_TEXT_TOKENS) < lengths[:, None],
        drop_caption_B=(torch.arange(B) + group + step) % 2 == 1,
        weight_BCTHW=normal("weight", B, _CHANNELS, *latent(shape)) / (B * latent(shape).volume),
    )


def make_model(name: str, shape: Shape, *, depth: int = 2) -> nn.Module:
    """A small model in float64, every parameter and buffer random: zeros hide wrong gradients."""
    config = ModelConfig(
        name=name, depth=depth, width=shape.width, heads=shape.heads, patch=tuple(_PATCH), mlp_ratio=2, pooled_text=True
    )
    assert set(MODEL_NAMES) == set(MODELS.names())
    model = build_model(config, _IO).double()
    with torch.no_grad():
        for key, tensor in model.state_dict().items():
            tensor.normal_(std=0.1, generator=Keys(1).generator(key))
    return model


def compute(model: nn.Module, inputs: Inputs, *, shard: Shard | None, between: Callable[[], None] = lambda: None) -> Result:
    """Forward, ``between``, backward of a shard of a micro-batch, or of all of it. Gradients are of this rank alone."""
    latents = Thw(*inputs.x_BCTHW.shape[2:])
    part = Region.whole(latents) if shard is None else shard.region.times(_PATCH)
    model.zero_grad()
    x = cut(inputs.x_BCTHW, part).clone().requires_grad_()
    output = model(x, inputs.timestep_B, inputs.text_BYE, inputs.text_mask_BY, drop_caption_B=inputs.drop_caption_B, shard=shard)
    loss = (output * cut(inputs.weight_BCTHW, part)).sum()
    between()
    loss.backward()
    assert x.grad is not None
    grads = {name: torch.zeros_like(p) if p.grad is None else p.grad.clone() for name, p in model.named_parameters()}
    return Result(output.detach(), x.grad, grads, loss.detach())


def cut(x_BCTHW: Tensor, part: Region) -> Tensor:
    """The latents of a region."""
    return x_BCTHW[:, :, part.t0 : part.t1, part.h0 : part.h1]


@cache
def _unchanged_model(name: str, shape: str) -> nn.Module:
    """For who writes no weights."""
    return make_model(name, SHAPES[shape])


@cache
def one_process(name: str, shape: str, group: int) -> Result:
    """What each group's samples give where they are whole. Computed once per process."""
    model = _unchanged_model(name, shape)
    for block in model.blocks:
        block.recompute = "none"
    return compute(model, make_inputs(SHAPES[shape], group=group), shard=None)


# --- what ranks run


class Meshes:
    """The meshes of one process group, each built once. Every rank asks for the same ones in the same order."""

    def __init__(self) -> None:
        self._made: dict[tuple[int, int], Mesh] = {}

    def shard(self, case: Case) -> tuple[Mesh, Shard]:
        key = (case.row.size, sp_ulysses(case.sp))
        if key not in self._made:
            self._made[key] = build_mesh(torch.device("cpu"), dp_replicate=1, sp=case.sp, timeout_s=60)
        mesh = self._made[key]
        return mesh, SequenceParallel(mesh, case.sp).shard(SHAPES[case.shape].grid)


def compare(chosen: Sequence[Case]) -> list[Errors]:
    """Each case against one process, as this rank sees it; all cases are of one world."""
    meshes, found = Meshes(), []
    for case in chosen:
        try:
            found.append(_compare(case, *meshes.shard(case)))
        except BaseException as error:
            error.add_note(f"in {case}")
            raise
    return found


def _compare(case: Case, mesh: Mesh, shard: Shard) -> Errors:
    shape = SHAPES[case.shape]
    wanted = [one_process(case.row.model, case.shape, group) for group in range(case.row.groups)]
    model = _unchanged_model(case.row.model, case.shape)
    for block in model.blocks:
        block.recompute = case.recompute
    result = compute(model, make_inputs(shape, group=mesh.rank // mesh.sp_size), shard=shard)
    here, part = wanted[mesh.rank // mesh.sp_size], shard.region.times(_PATCH)
    grads = {name: sum(one.grads[name] for one in wanted) for name in here.grads}
    differences = gradient_errors(summed(result.grads), grads)
    return Errors(
        output=difference(result.output, cut(here.output, part), scale=here.output),
        dx=difference(result.dx, cut(here.dx, part), scale=here.dx),
        grads=worst(differences.values()),
        text=worst(_of(differences, "y_embedder.").values()),
        timestep=worst([*_of(differences, "t_embedder.").values(), *_of(differences, "t_block.").values()]),
    )


def summed(grads: dict[str, Tensor]) -> dict[str, Tensor]:
    """Gradients over all ranks of the world: the one rule, with no factor."""
    flat = torch.cat([g.flatten() for g in grads.values()])
    dist.all_reduce(flat)
    parts = torch.split(flat, [g.numel() for g in grads.values()])
    return {name: part.view_as(grads[name]) for name, part in zip(grads, parts)}


def gradient_errors(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> dict[str, float]:
    """Of every parameter; each must have a gradient in one process to compare with."""
    assert found.keys() == wanted.keys()
    still = [name for name, grad in wanted.items() if not grad.abs().max() > 1e-8]
    assert not still, f"no gradient reaches {still}: nothing would be compared"
    return {name: difference(found[name], grad, scale=grad) for name, grad in wanted.items()}


def difference(found: Tensor, wanted: Tensor, *, scale: Tensor) -> float:
    """The largest, over the largest value of ``scale``."""
    assert found.shape == wanted.shape and found.dtype == wanted.dtype == torch.float64
    return ((found - wanted).abs().max() / scale.abs().max()).item()


def _of(differences: dict[str, float], prefix: str) -> dict[str, float]:
    chosen = {name: d for name, d in differences.items() if name.startswith(prefix)}
    assert chosen, f"no parameter is called {prefix}*"
    return chosen


# --- ten steps


@dataclass(frozen=True)
class Trajectory:
    """Losses of all groups together, and the weights at the end."""

    losses: list[float]
    weights: dict[str, Tensor]


def trajectories(chosen: Sequence[Case]) -> list[dict[str, float]]:
    """Ten steps of AdamW of each case on this rank against one process: the largest difference of losses and of weights."""
    meshes, found = Meshes(), []
    for case in chosen:
        mesh, shard = meshes.shard(case)
        wanted = _one_process_trajectory(case.row.model, case.shape, case.row.groups)
        got = _train(case.row.model, case.shape, groups=[mesh.rank // mesh.sp_size], shard=shard, recompute=case.recompute)
        of_losses = worst(abs(a - b) / max(abs(b), 1.0) for a, b in zip(got.losses, wanted.losses, strict=True))
        of_weights = worst(difference(got.weights[n], w, scale=w) for n, w in wanted.weights.items())
        found.append({"losses": of_losses, "weights": of_weights})
    return found


@cache
def _one_process_trajectory(name: str, shape: str, groups: int) -> Trajectory:
    return _train(name, shape, groups=list(range(groups)), shard=None, recompute="none")


def _train(name: str, shape: str, *, groups: list[int], shard: Shard | None, recompute: Recompute) -> Trajectory:
    model, losses = make_model(name, SHAPES[shape]), []
    for block in model.blocks:
        block.recompute = recompute
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.95), weight_decay=0.1)
    for step in range(STEPS):
        results = [compute(model, make_inputs(SHAPES[shape], group=g, step=step), shard=shard) for g in groups]
        grads = {n: sum(r.grads[n] for r in results) for n in results[0].grads} | {"loss": sum(r.loss for r in results)}
        grads = grads if shard is None else summed(grads)
        losses.append(grads.pop("loss").item())
        for parameter_name, parameter in model.named_parameters():
            parameter.grad = grads[parameter_name]
        optimizer.step()
    return Trajectory(losses, copy.deepcopy(model.state_dict()))
