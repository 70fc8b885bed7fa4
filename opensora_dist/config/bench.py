"""Schema of a sweep of benchmarks: a grid of cases, and how each is measured.

An empty list leaves a key to the benchmark's own default.
"""

from __future__ import annotations

from itertools import product
from typing import Annotated, Any, Literal

from pydantic import Field

from opensora_dist.config.base import Section
from opensora_dist.config.load import Problem
from opensora_dist.config.train import ModelName, SchemeName, SizeName

_MOST_POINTS = 1000
Count = Annotated[int, Field(ge=1)]
Sizes = Annotated[str, Field(pattern=r"^[1-9]\d*x[1-9]\d*x[1-9]\d*$")]


class _Grid(Section):
    nodes: tuple[Count, ...] = Field((1,), min_length=1, description="Machines; under Slurm the first of the job's.")
    model: tuple[ModelName, ...] = Field((), description="Whose step or block.")
    width: tuple[Count, ...] = Field((), description="Of the model.")
    heads: tuple[Count, ...] = Field((), description="Of attention.")
    batch: tuple[Count, ...] = Field((), description="Samples of the ranks that share them.")
    text_tokens: tuple[Count, ...] = Field((), description="Of a caption.")
    dtype: tuple[Literal["float32", "bfloat16", "float64"], ...] = Field((), description="Of the computation.")
    recompute: tuple[Literal["none", "selective", "full"], ...] = Field((), description="What backward runs again.")
    ulysses: tuple[Count, ...] = Field((), description="Inner axis of usp.")

    @property
    def points(self) -> list[dict[str, Any]]:
        """All combinations, by the keys that have values."""
        keys = {name: getattr(self, name) for name in type(self).model_fields if getattr(self, name)}
        return [dict(zip(keys, values, strict=True)) for values in product(*keys.values())]


class StepGrid(_Grid):
    """Cases of `bench step`: every combination is a point."""

    size: tuple[SizeName, ...] = Field((), description="Published sizes.")
    depth: tuple[Count, ...] = Field((), description="Blocks, instead of the size's.")
    clip: tuple[Sizes, ...] = Field((), description="Latents of a sample, FRAMESxROWSxCOLUMNS.")
    sp: tuple[Count, ...] = Field((), description="Ranks that share a sample.")
    scheme: tuple[SchemeName, ...] = Field((), description="How they do.")
    zero: tuple[Literal[0, 1, 2, 3], ...] = Field((), description="ZeRO stage.")
    dp_replicate: tuple[Count, ...] = Field((), description="Groups of ranks that hold copies (HSDP).")
    grad_accum: tuple[Count, ...] = Field((), description="Micro-batches of a step.")


class SequenceGrid(_Grid):
    """Cases of `bench sequence`: every combination is a point, in which all ranks share the samples and all schemes take turns."""

    grid: tuple[Sizes, ...] = Field((), description="Tokens of a sample, FRAMESxROWSxCOLUMNS.")


class _Sweep(Section):
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="auto takes CUDA where there is a GPU.")
    ranks_per_node: int | None = Field(None, ge=1, description="Default: one per GPU, or 2.")
    rounds: int = Field(5, ge=1, description="Passes of each form that count.")
    warmup: int = Field(2, ge=0, description="Passes before them.")
    timeout_s: float = Field(600.0, gt=0, description="Of a stuck transfer.")
    point_timeout_s: float = Field(1800.0, gt=0, description="Of a point.")


class StepSweep(_Sweep):
    """A sweep of `bench step`."""

    steps: int = Field(3, ge=1, description="Steps of a pass.")
    forms: tuple[Literal["eager", "compile", "ours"], ...] = Field(
        ("eager",),
        min_length=1,
        description="As --forms: ways of computing the step, the first of which others are compared with.",
    )
    dollars_per_gpu_hour: float | None = Field(None, gt=0, description="What a GPU costs; null leaves dollars out.")
    grid: StepGrid = Field(StepGrid(), description="What is measured.")


class SequenceSweep(_Sweep):
    """A sweep of `bench sequence`."""

    schemes: tuple[str, ...] = Field((), description="As --schemes; default: all.")
    grid: SequenceGrid = Field(SequenceGrid(), description="What is measured.")


Sweep = StepSweep | SequenceSweep
SWEEPS: dict[str, type[StepSweep] | type[SequenceSweep]] = {"step": StepSweep, "sequence": SequenceSweep}
"""By the benchmark that runs the points."""


def sweep_problems(sweep: Sweep) -> list[Problem]:
    """Rules across fields. Whether a point can run is the point's own matter, and is written down there."""
    problems = []
    for name in type(sweep.grid).model_fields:
        values = getattr(sweep.grid, name)
        if len(set(values)) < len(values):
            message = f"grid.{name}={list(values)} names a value twice; keep one of each"
            problems.append(Problem(fields=(f"grid.{name}",), message=message))
    count = len(sweep.grid.points)
    if count > _MOST_POINTS:
        message = f"grid has {count} points, more than {_MOST_POINTS}; leave values out, or make several sweeps of it"
        problems.append(Problem(fields=("grid",), message=message))
    return problems
