"""A step to be timed, from what a command line or a point of a sweep has: everything that is wrong with it at once."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import product
from typing import Any

import torch

from opensora_dist.config.load import Problem, load_config
from opensora_dist.config.rules import train_problems
from opensora_dist.config.train import TrainConfig
from opensora_dist.core.errors import ConfigError
from opensora_dist.core.types import Thw
from opensora_dist.plan.memory import MemoryCase
from opensora_dist.recipes.bench.step import StepOptions, Variant
from opensora_dist.recipes.bench.step_forms import FORMS, compiles, form_problems
from opensora_dist.recipes.bench.training import meta_model
from opensora_dist.recipes.shards import share_problems

_KEYS = {
    "model": "model.name",
    "size": "model.size",
    "depth": "model.depth",
    "width": "model.width",
    "heads": "model.heads",
    "dtype": "run.dtype",
    "sp": "parallel.sp.degree",
    "scheme": "parallel.sp.scheme",
    "ulysses": "parallel.sp.ulysses",
    "zero": "parallel.zero.stage",
    "dp_replicate": "parallel.dp_replicate",
    "grad_accum": "parallel.grad_accum",
    "recompute": "parallel.recompute",
}
CASE_FIELDS = (*_KEYS, "clip", "batch", "text_tokens")
"""What a case is made of: options of ``bench step`` and keys of a sweep's grid."""
_CLIP, _BATCH, _TEXT_TOKENS = "16x32x32", 1, 120


_COMPARED = ("model", "size", "recompute")
"""What ``--compare`` may vary: what leaves the layout of ranks as it is."""


def step_inputs(
    given: Mapping[str, Any], *, world: int, timeout_s: float, device: torch.device, compare: Sequence[str] = (), **measuring: Any
) -> tuple[list[Variant], StepOptions]:
    """The cases that are compared, one where ``compare`` is empty, and ``step_options``.

    Args:
        device: What will run it.
        compare: Each a ``KEY=VALUE,VALUE,...``; every combination is a case.
    Raises:
        ConfigError: Everything that is wrong with any of them.
    """
    problems: list[str] = []
    variants: list[Variant] = []
    try:
        options = step_options(**measuring)
        problems += form_problems(options.forms, device=device, dtype=given.get("dtype") or "float32")
    except ConfigError as error:
        problems += error.problems
    for changed in _compared(given, compare, problems):
        try:
            variants.append(Variant(case=step_case({**given, **changed}, world=world, timeout_s=timeout_s), changed=changed))
        except ConfigError as error:
            problems += [problem for problem in error.problems if problem not in problems]
    if problems:
        raise ConfigError(problems)
    return variants, options


def _compared(given: Mapping[str, Any], compare: Sequence[str], problems: list[str]) -> list[dict[str, str]]:
    """What changes in each case."""
    axes: dict[str, list[str]] = {}
    for said in compare:
        key, equals, values = said.partition("=")
        if not equals or key not in _COMPARED:
            problems.append(f"--compare {said!r} is not KEY=VALUE,VALUE with a KEY of {', '.join(_COMPARED)}")
        elif given.get(key) is not None:
            problems.append(f"--compare {said} and --{key} {given[key]}; give one of them")
        elif len(set(axes.setdefault(key, values.split(",")))) < 2:
            problems.append(f"--compare {said} compares nothing; name two values or more")
    return [dict(zip(axes, values, strict=True)) for values in product(*axes.values())]


def step_case(given: Mapping[str, Any], *, world: int, timeout_s: float) -> MemoryCase:
    """
    Args:
        given: By ``CASE_FIELDS``; what is missing or None is as a training has it.
        world: Ranks that will run.
        timeout_s: Of a collective.
    Raises:
        ConfigError: Every rule that keeps it from running, by the names of flags.
    """
    problems: list[str] = []
    latent = _latent(given.get("clip") or _CLIP, problems)
    sizes = {name: _or(given.get(name), default) for name, default in (("batch", _BATCH), ("text_tokens", _TEXT_TOKENS))}
    problems += [f"--{_flag(name)} must be 1 or more, and is {value}" for name, value in sizes.items() if value < 1]
    if given.get("scheme") == "auto":
        problems.append("--scheme auto chooses by what is measured when a training starts; name a scheme")
    overrides = [f"{key}={value}" for name, key in _KEYS.items() if (value := given.get(name)) is not None]
    try:
        config = load_config(TrainConfig, None, overrides=overrides, rules=lambda config: _rules(config, world=world))
    except ConfigError as error:
        raise ConfigError([*problems, *map(_with_flags, error.problems)]) from None
    if problems:
        raise ConfigError(problems)
    case = MemoryCase(
        model=config.model,
        parallel=config.parallel.model_copy(update={"timeout_s": timeout_s}),
        world=world,
        latent=latent,
        dtype=config.run.dtype,
        micro_batch=sizes["batch"],
        text_tokens=sizes["text_tokens"],
        max_tokens=sizes["text_tokens"],
    )
    of_one_block = replace(case, model=case.model.model_copy(update={"depth": 1}))  # which has the same patches
    shared = share_problems(case.parallel.sp, case.model, {f"latents of {latent}": meta_model(of_one_block).token_grid(latent)})
    if shared:
        raise ConfigError([_with_flags(problem.message) for problem in shared])
    return case


def step_options(*, forms: list[str], rounds: int, warmup: int, steps: int, dollars_per_gpu_hour: float | None) -> StepOptions:
    """
    Raises:
        ConfigError: Everything that is out of range, by the names of flags.
    """
    problems = [f"--forms {name}: not known; use some of {', '.join(FORMS)}" for name in forms if name not in FORMS]
    for flag, value, least in (("rounds", rounds, 1), ("warmup", warmup, 0), ("steps", steps, 1)):
        if value < least:
            problems.append(f"--{flag} must be {least} or more, and is {value}")
    if dollars_per_gpu_hour is not None and not 0 < dollars_per_gpu_hour < math.inf:
        problems.append(f"--dollars-per-gpu-hour must be a price above 0, and is {dollars_per_gpu_hour:g}")
    if problems:
        raise ConfigError(problems)
    return StepOptions(forms=tuple(forms), rounds=rounds, warmup=warmup, steps=steps, dollars_per_gpu_hour=dollars_per_gpu_hour)


def check_share(*, form: str, ranks: int, steps: int, gib: tuple[float, float], device: torch.device, dtype: str) -> None:
    """
    Args:
        gib: Of the device and of CPU memory.
    Raises:
        ConfigError: What is wrong with the options of ``bench share``, beyond those of a case.
    """
    if form not in FORMS:
        raise ConfigError(f"--form {form}: not known; use one of {', '.join(FORMS)}")
    problems = [problem.replace("--forms", "--form") for problem in form_problems([form], device=device, dtype=dtype)]
    if device.type == "cpu" and compiles(form):
        problems.append(f"--form {form} on a CPU: nobody sees what memory compiled code takes there; use --form eager")
    problems += [
        f"--{name} must be 1 or more, and is {value}" for name, value in (("ranks", ranks), ("steps", steps)) if value < 1
    ]
    for flag, value in zip(("memory-cap-gib", "host-gib"), gib):
        if not 0 < value < math.inf:
            problems.append(f"--{flag} must be above 0, and is {value:g}")
    if problems:
        raise ConfigError(problems)


def _latent(clip: str, problems: list[str]) -> Thw:
    match = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)x([1-9]\d*)", clip)
    if match is None:
        problems.append(f"--clip {clip!r} is not FRAMESxROWSxCOLUMNS of latents, each 1 or more; write e.g. {_CLIP}")
        return Thw(1, 1, 1)
    return Thw(*map(int, match.groups()))


def _or(value: Any, default: int) -> int:
    return default if value is None else int(value)


def _rules(config: TrainConfig, *, world: int) -> list[Problem]:
    """Those of a training, but for its data: what is made up has no path, and is as large as the ranks take."""
    return [p for p in train_problems(config, world=world) if not any(field.startswith("data.") for field in p.fields)]


def _flag(name: str) -> str:
    return name.replace("_", "-")


def _with_flags(problem: str) -> str:
    """A message of a config's rule, in the words of the command line."""
    for name, key in _KEYS.items():
        problem = re.sub(rf"\b{re.escape(key)}\b", f"--{_flag(name)}", problem)
    return problem
