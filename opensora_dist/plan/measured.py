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

_FORMAT = 2


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
        memory_bytes: Most that a rank held.
    """

    source: str
    form: str
    case: MemoryCase
    device: str
    cuda: bool
    peak_flops: float | None
    step_s: float
    memory_bytes: int


def read_timed(path: Path) -> list[TimedStep]:
    """All that a file of ``bench step`` holds, or all such files below a folder, where files of other benchmarks are passed over.

    Raises:
        ConfigError: There is nothing there, a file is no JSON, or it is a step of another format.
    """
    files = sorted(path.rglob("*.json")) if path.is_dir() else [path]
    found = [timed for file in files for timed in _of_file(file, named=file == path)]
    if not found:
        raise ConfigError(
            f"--measured {path}: no step of `opensora-dist bench step` in it; write one with --out DIR, or leave it out"
        )
    return found


def timed_steps(record: Mapping[str, Any], *, source: str) -> list[TimedStep]:
    """Of one record of ``bench step``.

    Raises:
        ConfigError: It isn't what this version writes.
    """
    try:
        if record["format"] != _FORMAT:
            raise ValueError(f"format {record['format']}, and {_FORMAT} is read here")
        gpus = record["environment"]["gpus"]
        return [
            TimedStep(
                source=f"{source}: {result['name']}",
                form=result["form"],
                case=_case(result["case"]),
                device=gpus[0] if gpus else record["environment"]["cpu"],
                cuda=bool(gpus),
                peak_flops=result["work"]["peak_flops"],
                step_s=statistics.median(result["seconds"]),
                memory_bytes=result["memory_bytes"],
            )
            for result in record["results"]
        ]
    except (KeyError, TypeError, ValueError, ValidationError, statistics.StatisticsError) as error:
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
        return [timed for name, step in record["steps"].items() for timed in timed_steps(step, source=f"{file.name}, {name}")]
    if kind == "step" and "results" in record:
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
