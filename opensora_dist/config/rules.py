"""Rules across fields. Each returns every broken rule, so that a user mends a config once.

Rules that need the data set (does the patch divide the latents?) are in ``recipes.train``, before any process is spawned.
"""

from __future__ import annotations

from opensora_dist.config.load import Problem, expand
from opensora_dist.config.prepare import PrepareConfig
from opensora_dist.config.train import ModelConfig, TrainConfig


def prepare_problems(config: PrepareConfig) -> list[Problem]:
    """What can't be in a preparation."""
    problems = []
    for name, value, example in (("input.path", config.input.path, "videos/"), ("output.path", config.output.path, "shards/")):
        if value is None:
            problems.append(Problem(fields=(name,), message=f"{name} is not set; add it, or pass {name}={example}"))
    if config.input.path is not None and not expand(config.input.path).is_dir():
        problems.append(
            Problem(fields=("input.path",), message=f"input.path={config.input.path!r} is not a folder; point it at your videos")
        )
    for bucket in config.clip.buckets:
        if min(bucket) < 1:
            message = f"clip.buckets holds {list(bucket)}; frames, height and width must each be 1 or more"
            problems.append(Problem(fields=("clip.buckets",), message=message))
    if len(set(config.clip.buckets)) != len(config.clip.buckets):
        problems.append(Problem(fields=("clip.buckets",), message="clip.buckets names a shape twice; keep one of each"))
    return problems


def train_problems(config: TrainConfig, *, world: int) -> list[Problem]:
    """What can't be in a training run of ``world`` ranks."""
    return [
        *_model_problems(config.model),
        *_batch_problems(config, world=world),
        *_optim_problems(config),
        *_validation_problems(config),
    ]


def _model_problems(model: ModelConfig) -> list[Problem]:
    problems = []
    _, width, heads = model.shape
    if width % heads:
        fits = [n for n in range(1, width + 1) if width % n == 0 and width // n >= 8]
        message = f"model.heads={heads} must divide model.width={width}; use one of {fits}"
        problems.append(Problem(fields=("model.heads", "model.width", "model.size"), message=message))
    if width % 4:
        message = (
            f"model.width={width} must be a multiple of 4 (sin-cos positions take quarters of it); use {width - width % 4 or 4}"
        )
        problems.append(Problem(fields=("model.width",), message=message))
    if min(model.patch) < 1:
        message = f"model.patch={list(model.patch)}: each side must be 1 or more; use [1, 2, 2]"
        problems.append(Problem(fields=("model.patch",), message=message))
    if model.init_from is not None and model.name != "stdit" and model.init_from.format != "run":
        message = f"model.init_from loads STDiT weights, but model.name={model.name}; use model.name=stdit or drop init_from"
        problems.append(Problem(fields=("model.init_from", "model.name"), message=message))
    return problems


def _batch_problems(config: TrainConfig, *, world: int) -> list[Problem]:
    problems = []
    parallel, data = config.parallel, config.data
    if data.path is None:
        message = "data.path is not set; make a data set with `opensora-dist data prepare` and pass data.path=FOLDER"
        problems.append(Problem(fields=("data.path",), message=message))
    elif not expand(data.path).is_dir():
        message = f"data.path={data.path!r} is not a folder; make it with `opensora-dist data prepare`, or correct the path"
        problems.append(Problem(fields=("data.path",), message=message))
    if world % parallel.dp_replicate:
        message = (
            f"parallel.dp_replicate={parallel.dp_replicate} must divide the {world} ranks; "
            f"use one of {[n for n in range(1, world + 1) if world % n == 0]}"
        )
        problems.append(Problem(fields=("parallel.dp_replicate", "parallel.nproc"), message=message))
    if parallel.dp_replicate > 1 and parallel.zero.stage == 0:
        message = (
            f"parallel.dp_replicate={parallel.dp_replicate} with parallel.zero.stage=0: stage 0 replicates on all ranks already; "
            "use dp_replicate=1, or stage 2 or 3"
        )
        problems.append(Problem(fields=("parallel.dp_replicate", "parallel.zero.stage"), message=message))
    pieces = world * parallel.grad_accum
    if data.global_batch % pieces:
        up = (data.global_batch // pieces + 1) * pieces
        message = (
            f"data.global_batch={data.global_batch} must be a multiple of ranks x parallel.grad_accum = {world} x {parallel.grad_accum}"
            f" = {pieces}; use {up}" + (f" or {up - pieces}" if up > pieces else "")
        )
        problems.append(Problem(fields=("data.global_batch", "parallel.grad_accum", "parallel.nproc"), message=message))
    return problems


def _optim_problems(config: TrainConfig) -> list[Problem]:
    problems = []
    if config.optim.warmup_steps > config.run.steps:
        message = (
            f"optim.warmup_steps={config.optim.warmup_steps} exceeds run.steps={config.run.steps}; use at most {config.run.steps}"
        )
        problems.append(Problem(fields=("optim.warmup_steps", "run.steps"), message=message))
    if not all(0 <= b < 1 for b in config.optim.betas):
        message = f"optim.betas={list(config.optim.betas)}: each must be in [0, 1); use [0.9, 0.999]"
        problems.append(Problem(fields=("optim.betas",), message=message))
    return problems


def _validation_problems(config: TrainConfig) -> list[Problem]:
    problems = []
    validation = config.validation
    if validation.every_steps and not validation.prompts:
        message = f"validation.every_steps={validation.every_steps} but validation.prompts is empty; add prompts, or set every_steps to 0"
        problems.append(Problem(fields=("validation.every_steps", "validation.prompts"), message=message))
    if validation.clip is not None and min(validation.clip) < 1:
        message = f"validation.clip={list(validation.clip)}: frames, height and width must each be 1 or more"
        problems.append(Problem(fields=("validation.clip",), message=message))
    return problems
