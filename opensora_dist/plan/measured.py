"""Steps that ``bench step`` has timed, as it wrote them: where a plan's efficiency comes from, and what plans are held to."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from opensora_dist.config.train import ModelConfig, ParallelConfig
from opensora_dist.core.errors import ConfigError
from opensora_dist.core.io import read_json
from opensora_dist.core.types import Thw
from opensora_dist.plan.memory import MemoryCase

STEP_FORMAT = 3
"""Of what `bench step` writes, and of what is read here."""


@dataclass(frozen=True, kw_only=True)
class TimedStep:
    """One form of one case.

    Args:
        source: File and name in it.
        form: As ``bench step --forms`` names it.
        device: Name of the GPU, or of the CPU.
        cuda: Whether it is a GPU.
        peak_flops: Of one rank's device, FLOP/s; None where it isn't known.
        step_s: Median over rounds.
        memory_bytes: Most that a rank held; None where nobody saw it.
        kinds_ms: Milliseconds of a step by kind of kernel; empty where it wasn't watched.
        mfu: Model FLOPs over the peak; None where that isn't known.
    """

    source: str
    form: str
    case: MemoryCase
    device: str
    cuda: bool
    peak_flops: float | None
    step_s: float
    memory_bytes: int | None
    kinds_ms: Mapping[str, float]
    mfu: float | None


def read_timed(path: Path) -> list[TimedStep]:
    """All that a file of ``bench step`` holds, or all such files below a folder, where files of other benchmarks are passed over.

    Raises:
        ConfigError: There is nothing there, a file is no JSON, or it is a step of another format.
    """
    found = timed_below(path) if path.is_dir() else _of_file(path, named=True)
    if not found:
        raise ConfigError(
            f"--measured {path}: no step of `opensora-dist bench step` in it; write one with --out DIR, or leave it out"
        )
    return found


def timed_below(folder: Path) -> list[TimedStep]:
    """All steps in the files below a folder, which may be none.

    Raises:
        ConfigError: A file is no JSON, or a step of another format.
    """
    return [timed for file in sorted(folder.rglob("*.json")) for timed in _of_file(file, named=False)]


def timed_steps(record: Mapping[str, Any], *, source: str) -> list[TimedStep]:
    """Of one record of ``bench step``.

    Raises:
        ConfigError: It isn't what this version writes.
    """
    try:
        if record["format"] != STEP_FORMAT:
            raise ValueError(f"format {record['format']}, and {STEP_FORMAT} is read here")
        cuda = record["device"] == "cuda"
        return [
            TimedStep(
                source=f"{source}: {result['name']}",
                form=result["form"],
                case=_case(result["case"]),
                device=record["environment"]["gpus"][0] if cuda else record["environment"]["cpu"],
                cuda=cuda,
                peak_flops=result["work"]["peak_flops"],
                step_s=statistics.median(result["seconds"]),
                memory_bytes=result["memory_bytes"],
                kinds_ms=result["kinds"]["milliseconds"] if result["kinds"] is not None else {},
                mfu=result["figures"]["speed"]["mfu"],
            )
            for result in record["results"]
        ]
    except (KeyError, IndexError, TypeError, ValueError, ValidationError, statistics.StatisticsError) as error:
        said = f"{source} is no step that this version measured ({type(error).__name__}: {error})"
        raise ConfigError(f"{said}; measure again with `opensora-dist bench step`") from error


def _of_file(file: Path, *, named: bool) -> list[TimedStep]:
    try:
        record = read_json(file)
    except OSError as error:
        raise ConfigError(
            f"--measured {file} can't be read ({error.strerror}); name a file of `bench step`, or a folder"
        ) from error
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ConfigError(f"--measured: {file} is no JSON ({error}); measure again, or name another file") from error
    kind = record.get("kind") if isinstance(record, dict) else None
    if kind == "plan":  # of benchmarks/plan.py: several such records
        steps = record.get("steps")
        if not isinstance(steps, dict):
            raise ConfigError(f"{file} has no steps; write it with `python benchmarks/plan.py --measure`")
        return [timed for name, step in steps.items() for timed in timed_steps(step, source=f"{file.name}, {name}")]
    if kind == "step":
        return timed_steps(record, source=file.name)
    if named:
        raise ConfigError(f"--measured {file} is no record of `opensora-dist bench step`; name one, or a folder with some")
    return []


def _case(record: Mapping[str, Any]) -> MemoryCase:
    names = {field.name for field in fields(MemoryCase)}
    if record.keys() != names:
        raise ValueError(f"its case has other fields: {', '.join(sorted(record.keys() ^ names))}")
    made = {
        "model": ModelConfig.model_validate(record["model"]),
        "parallel": ParallelConfig.model_validate(record["parallel"]),
        "latent": Thw(*record["latent"]),
    }
    return MemoryCase(**{**record, **made})
