"""Python and the packages of this install: those that are needed, and those of the extras with what they are for."""

from __future__ import annotations

import importlib.metadata
import platform
import sys
from collections.abc import Sequence
from typing import Final

from packaging.requirements import Requirement

from opensora_dist.machine.finding import Finding, Level, Subject

_SUBJECT: Final = Subject("packages")
DISTRIBUTION: Final = "opensora-dist"
CORE: Final = "core"
PURPOSES: Final = {
    CORE: "training, sampling, reading",
    "prepare": "shots, scores and pictures of raw video",
    "safety": "the filter of unsafe pictures",
    "remote": "data and checkpoints in object stores",
    "ray": "preparation on many machines by Ray",
    "hf": "text encoders and captions from Hugging Face models",
    "track": "logging to Weights & Biases and TensorBoard",
    "deepspeed": "parallel.zero.backend=deepspeed",
    "bench": "comparisons with other packages",
    "kernels": "kernels in Triton",
}
"""What each group of requirements is for; every extra of setup.py but ``all`` and ``dev`` has a line."""
_LEAST_PYTHON: Final = (3, 11)


def package_findings() -> list[Finding]:
    """Python, and one finding per group: what of it is here, in which versions, and what is missing or of another version."""
    found = [_python()]
    try:
        requires = importlib.metadata.requires(DISTRIBUTION) or []
    except importlib.metadata.PackageNotFoundError:
        way_out = "`pip install -e .` in the repository"
        said = f"{DISTRIBUTION} is not installed, so that what it requires isn't known"
        return [*found, _SUBJECT.finding(DISTRIBUTION, Level.WARNING, said, way_out)]
    found.append(_SUBJECT.finding(DISTRIBUTION, Level.OK, importlib.metadata.version(DISTRIBUTION)))
    requirements = [Requirement(text) for text in requires]
    return found + [_group(group, [r for r in requirements if _belongs(r, group)]) for group in PURPOSES]


def _python() -> Finding:
    said = f"{platform.python_version()} ({sys.executable})"
    if sys.version_info < _LEAST_PYTHON:
        return _SUBJECT.finding("python", Level.PROBLEM, said, f"use Python {'.'.join(map(str, _LEAST_PYTHON))} or newer")
    return _SUBJECT.finding("python", Level.OK, said)


def _belongs(requirement: Requirement, group: str) -> bool:
    marker = requirement.marker
    if group == CORE:
        return marker is None or marker.evaluate({"extra": ""})
    return marker is not None and marker.evaluate({"extra": group}) and not marker.evaluate({"extra": ""})


def _group(group: str, requirements: Sequence[Requirement]) -> Finding:
    here, missing, other = [], [], []
    for requirement in requirements:
        try:
            version = importlib.metadata.version(requirement.name)
        except importlib.metadata.PackageNotFoundError:
            missing.append(requirement.name)
            continue
        here.append(f"{requirement.name} {version}")
        if not requirement.specifier.contains(version, prereleases=True):
            other.append(f"{requirement.name} {version} is not {requirement.specifier}")
    needed = group == CORE
    way_out = f"pip install '{DISTRIBUTION}{'' if needed else f'[{group}]'}'"
    said = [f"for {PURPOSES[group]}"]
    said += [", ".join(here)] if here else []
    said += [f"not installed: {', '.join(missing)}"] if missing else []
    said += [f"not tested: {', '.join(other)}"] if other else []
    level = Level.OK
    if missing:
        level = Level.PROBLEM if needed else Level.NOTE
    elif other:
        level = Level.WARNING
    values = {"here": here, "missing": missing, "other": other}
    return _SUBJECT.finding(group, level, "; ".join(said), way_out if missing or other else None, values=values)
