"""Rules across fields. Each returns every broken rule, so that a user mends a config once.

Rules that need the data set (does the patch divide the latents?) are in ``recipes.checks``, before any process is spawned.
"""

from __future__ import annotations

import importlib.util
from dataclasses import replace
from math import gcd, prod

from opensora_dist.config.caption_rules import caption_problems
from opensora_dist.config.compile_rules import compile_problems
from opensora_dist.config.data_rules import data_problems
from opensora_dist.config.faults import fault_form, parse_fault
from opensora_dist.config.load import Problem, expand
from opensora_dist.config.prepare import PrepareConfig
from opensora_dist.config.prepare_rules import preparing_problems
from opensora_dist.config.train import ModelConfig, ParallelConfig, SpConfig, TrainConfig
from opensora_dist.core.extras import missing_extra


def prepare_problems(config: PrepareConfig) -> list[Problem]:
    """What can't be in a preparation."""
    problems = []
    for name, value, example in (("input.path", config.input.path, "videos/"), ("output.path", config.output.path, "shards/")):
        if value is None:
            problems.append(Problem(fields=(name,), message=f"{name} is not set; add it, or pass {name}={example}"))
    if config.input.path is not None and not expand(config.input.path).is_dir():
        problems.append(
            Problem(
                fields=("input.path",),
                message=f"input.path={config.input.path!r} is not a folder; point it at your videos",
                here=True,
            )
        )
    for bucket in config.clip.buckets:
        if min(bucket) < 1:
            message = f"clip.buckets holds {list(bucket)}; frames, height and width must each be 1 or more"
            problems.append(Problem(fields=("clip.buckets",), message=message))
    if len(set(config.clip.buckets)) != len(config.clip.buckets):
        problems.append(Problem(fields=("clip.buckets",), message="clip.buckets names a shape twice; keep one of each"))
    return [*problems, *preparing_problems(config), *caption_problems(config)]


def train_problems(config: TrainConfig, *, world: int) -> list[Problem]:
    """What can't be in a training run of ``world`` ranks."""
    return [
        *_model_problems(config.model),
        *mesh_problems(config.parallel, config.model, world=world),
        *_sp_problems(config.parallel.sp),
        *_lever_problems(config),
        *compile_problems(config),
        *data_problems(config, world=world),
        *_optim_problems(config),
        *_validation_problems(config),
        *_fault_problems(config, world=world),
        *_nvme_problems(config),
        *_deepspeed_problems(config),
        *_colossalai_problems(config),
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


def divisors(number: int) -> list[int]:
    """All of them, ascending."""
    return [n for n in range(1, number + 1) if number % n == 0]


def mesh_problems(parallel: ParallelConfig, model: ModelConfig, *, world: int) -> list[Problem]:
    """Why ``world`` ranks can't be laid out as dp_replicate x dp_shard x ring x ulysses x tp: every reason, each with a way out.

    Rules of a sequence scheme that need a sample, or heads alone, are the scheme's own.
    """
    return [*_division_problems(parallel, world=world), *_stage_problems(parallel), *_tp_problems(parallel, model)]


def _division_problems(parallel: ParallelConfig, *, world: int) -> list[Problem]:
    sizes = {"dp_replicate": parallel.dp_replicate, "sp.degree": parallel.sp.degree, "tp": parallel.tp}
    problems = [
        Problem(
            fields=(f"parallel.{name}", "parallel.nproc"),
            message=f"parallel.{name}={size} must divide the {world} ranks; use one of {divisors(world)}",
        )
        for name, size in sizes.items()
        if world % size
    ]
    product = prod(sizes.values())
    if not problems and world % product:
        used = {name: size for name, size in sizes.items() if size > 1}
        ways = [
            f"parallel.{name} from {divisors(world // (product // size))}"
            for name, size in used.items()
            if world % (product // size) == 0
        ] or [f"{product} ranks, or smaller ones"]
        message = (
            f"{' x '.join(f'parallel.{name}={size}' for name, size in used.items())} = {product} must divide the {world} ranks; "
            f"with the others as they are use {', or '.join(ways)}"
        )
        problems.append(Problem(fields=(*(f"parallel.{name}" for name in used), "parallel.nproc"), message=message))
    return problems


def _stage_problems(parallel: ParallelConfig) -> list[Problem]:
    """Stage 0 has one kind of ranks: those that hold copies."""
    problems = []
    if parallel.zero.stage != 0:
        return []
    if parallel.dp_replicate > 1:
        message = (
            f"parallel.dp_replicate={parallel.dp_replicate} with parallel.zero.stage=0: stage 0 replicates on all ranks already; "
            "use dp_replicate=1, or stage 2 or 3"
        )
        problems.append(Problem(fields=("parallel.dp_replicate", "parallel.zero.stage"), message=message))
    if parallel.tp > 1:
        message = (
            f"parallel.tp={parallel.tp} with parallel.zero.stage=0: stage 0 keeps copies of whole parameters, and ranks of tp have "
            "parts of them; use parallel.zero.stage=1, 2 or 3, or parallel.tp=1"
        )
        problems.append(Problem(fields=("parallel.tp", "parallel.zero.stage"), message=message))
    return problems


def _tp_problems(parallel: ParallelConfig, model: ModelConfig) -> list[Problem]:
    """What ranks of ``tp`` can't share."""
    tp, sp, problems = parallel.tp, parallel.sp, list[Problem]()
    if tp == 1:
        return []
    _, width, heads = model.shape
    hidden = int(width * model.mlp_ratio)
    if heads % tp:
        message = f"parallel.tp={tp} must divide model.heads={heads}, which it deals out; use one of {divisors(heads)}"
        problems.append(Problem(fields=("parallel.tp", "model.heads", "model.size"), message=message))
    if hidden % tp:
        message = (
            f"parallel.tp={tp} must divide the MLP's hidden width, {hidden} = model.width {width} x model.mlp_ratio "
            f"{model.mlp_ratio:g}; use one of {divisors(gcd(hidden, heads))}, or another model.mlp_ratio"
        )
        problems.append(Problem(fields=("parallel.tp", "model.width", "model.mlp_ratio", "model.size"), message=message))
    if parallel.zero.backend != "native":
        message = (
            f"parallel.tp={tp} with parallel.zero.backend={parallel.zero.backend}, which knows no DTensors; "
            "use parallel.zero.backend=native, or parallel.tp=1"
        )
        problems.append(Problem(fields=("parallel.tp", "parallel.zero.backend"), message=message))
    if sp.scheme == "auto" and sp.degree > 1:
        message = (
            f"parallel.tp={tp} with parallel.sp.scheme=auto, whose prediction knows nothing of tp; "
            "name a scheme (bench sequence compares them), or use parallel.tp=1"
        )
        problems.append(Problem(fields=("parallel.tp", "parallel.sp.scheme"), message=message))
    dealt = {"usp": sp.ulysses or sp.degree, "ulysses": sp.degree, "fastseq": sp.degree, "allgather": sp.degree}.get(sp.scheme, 1)
    if heads % tp == 0 and (heads // tp) % dealt:
        what = "ulysses" if sp.scheme == "usp" else "degree"
        message = (
            f"parallel.sp.{what}={dealt} must divide the {heads // tp} of model.heads={heads} that parallel.tp={tp} leaves a rank, "
            f"for parallel.sp.scheme={sp.scheme}, which deals them out; use parallel.sp.{what} from {divisors(heads // tp)}, "
            f"or parallel.sp.scheme={'ring' if model.name == 'dit' else 'dsp or ring'}, which has no such rule"
        )
        fields = ("parallel.tp", f"parallel.sp.{what}", "parallel.sp.scheme", "model.heads", "model.size")
        problems.append(Problem(fields=fields, message=message))
    return problems


def _sp_problems(sp: SpConfig) -> list[Problem]:
    """The rules of ``parallel.sp`` that need no sample."""
    problems = []
    name, ulysses, least = f"parallel.sp.ulysses={sp.ulysses}", sp.ulysses or sp.degree, sp.min_degree
    fields = ("parallel.sp.ulysses", "parallel.sp.degree", "parallel.sp.scheme")
    if sp.degree % ulysses:
        message = f"{name} must divide parallel.sp.degree={sp.degree}; use one of {divisors(sp.degree)}"
        problems.append(Problem(fields=fields, message=message))
    elif sp.scheme == "ring" and sp.ulysses not in (None, 1):
        message = f"{name} with parallel.sp.scheme=ring, whose ring is all of degree; drop it, or use parallel.sp.scheme=usp"
        problems.append(Problem(fields=fields, message=message))
    elif sp.scheme not in ("ring", "usp", "auto") and ulysses < sp.degree:
        message = (
            f"{name} is less than parallel.sp.degree={sp.degree} with parallel.sp.scheme={sp.scheme}, which has no ring around it; "
            f"drop it, or use parallel.sp.scheme=usp for {ulysses} x a ring of {sp.degree // ulysses}"
        )
        problems.append(Problem(fields=fields, message=message))
    if sp.network is not None and sp.scheme != "auto":
        message = (
            f"parallel.sp.network={sp.network!r} is what parallel.sp.scheme=auto predicts with, and the scheme is {sp.scheme}; "
            "drop it, or use parallel.sp.scheme=auto"
        )
        problems.append(Problem(fields=("parallel.sp.network", "parallel.sp.scheme"), message=message))
    least_fields = ("parallel.sp.min_degree", "parallel.sp.degree", "parallel.sp.scheme")
    if least is not None and sp.scheme != "auto":
        message = (
            f"parallel.sp.min_degree={least} is a choice for parallel.sp.scheme=auto, and the scheme is {sp.scheme}; "
            "drop it, or use parallel.sp.scheme=auto"
        )
        problems.append(Problem(fields=least_fields, message=message))
    elif least is not None and sp.degree % least:
        message = f"parallel.sp.min_degree={least} must divide parallel.sp.degree={sp.degree}; use one of {divisors(sp.degree)}"
        problems.append(Problem(fields=least_fields, message=message))
    return problems


def _lever_problems(config: TrainConfig) -> list[Problem]:
    """Memory levers that would do nothing."""
    problems = []
    if config.parallel.offload_activations and config.model.shape.depth == 1:
        message = (
            "parallel.offload_activations=true with model.depth=1: the last block's backward comes at once, so it stays on the device, "
            "and there is no other; set offload_activations to false, or use parallel.recompute"
        )
        problems.append(Problem(fields=("parallel.offload_activations", "model.depth", "model.size"), message=message))
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


def _fault_problems(config: TrainConfig, *, world: int) -> list[Problem]:
    """Faults that mean nothing, or are of ranks that are not there. Phases of a save are checked in ``recipes.checks``."""
    problems = []
    for name, text in config.fault.model_dump().items():
        if text is None:
            continue
        fault, field = parse_fault(name, text), f"fault.{name}"
        if fault is None:
            message = f"{field}={text!r} must be {fault_form(name)}; correct it, or drop it"
            problems.append(Problem(fields=(field,), message=message))
        elif fault.rank >= world:
            message = f"{field}={text!r} names rank {fault.rank}, but there are {world}; use a rank from 0 to {world - 1}"
            problems.append(Problem(fields=(field, "parallel.nproc"), message=message))
    return problems


def _colossalai_problems(config: TrainConfig) -> list[Problem]:
    """What Colossal-AI's plugins can't do, or what of it isn't wired."""
    zero, parallel, dtype = config.parallel.zero, config.parallel, config.run.dtype
    if zero.backend != "colossalai":
        return []
    problems = []

    def refuse(*fields: str, because: str, instead: str) -> None:
        problems.append(_refused(config, *fields, because=because, instead=instead))

    if importlib.util.find_spec("colossalai") is None:
        message = (
            "parallel.zero.backend=colossalai needs the package colossalai, which isn't installed; it takes an environment of its own "
            "(requirements/colossalai.txt, docs/colossalai.md), or use parallel.zero.backend=native"
        )
        problems.append(Problem(fields=("parallel.zero.backend",), message=message, here=True))
    if zero.stage == 0:
        refuse("parallel.zero.stage", because="it shards from stage 1 on", instead="stage 1, 2 or 3")
    if dtype == "float64":
        refuse("run.dtype", because="the weights it steps are float32", instead="float32 or bfloat16")
    if zero.stage == 3 and dtype == "float32":
        refuse(
            "parallel.zero.stage",
            "run.dtype",
            because="its stage 3 computes in bfloat16",
            instead="run.dtype=bfloat16 or stage 2",
        )
    if zero.stage == 3 and parallel.sp.degree > 1:
        because = "schemes reach for weights that its stage 3 may have freed"
        refuse("parallel.zero.stage", "parallel.sp.degree", because=because, instead="stage 2")
    if zero.stage < 3 and zero.offload == "all":
        because = "parameters leave the GPU in stage 3 only"
        refuse("parallel.zero.offload", "parallel.zero.stage", because=because, instead="offload=optimizer or stage 3")
    if parallel.dp_replicate > 1:
        refuse("parallel.dp_replicate", because="it shards over all ranks", instead="dp_replicate=1")
    return problems


def _deepspeed_problems(config: TrainConfig) -> list[Problem]:
    """What DeepSpeed can't do, or what of it isn't wired."""
    zero, parallel = config.parallel.zero, config.parallel
    if zero.backend != "deepspeed":
        return []
    problems = []

    def refuse(*fields: str, because: str, instead: str) -> None:
        problems.append(_refused(config, *fields, because=because, instead=instead))

    missing = missing_extra("deepspeed", extra="deepspeed", wanted_by="parallel.zero.backend=deepspeed")
    if missing is not None:
        said = f"{missing}, or use parallel.zero.backend=native"
        problems.append(Problem(fields=("parallel.zero.backend",), message=said, here=True))
    if config.run.dtype == "float64":
        refuse("run.dtype", because="the weights it steps are float32", instead="float32 or bfloat16")
    if parallel.dp_replicate > 1:
        refuse("parallel.dp_replicate", because="it shards over all ranks", instead="dp_replicate=1")
    if zero.offload != "none" and zero.stage == 0:
        because = "stage 0 is plain AdamW, where the parameters are"
        refuse("parallel.zero.offload", "parallel.zero.stage", because=because, instead="stage 1, 2 or 3")
    elif zero.offload == "all" and zero.stage < 3:
        because = "parameters leave the GPU in stage 3 only"
        refuse("parallel.zero.offload", "parallel.zero.stage", because=because, instead="offload=optimizer or stage 3")
    if zero.nvme_path is not None and zero.offload != "all":
        because = "it is parameters that go to files"
        refuse("parallel.zero.nvme_path", "parallel.zero.offload", because=because, instead="offload=all, or no nvme_path")
    if zero.nvme_path is not None and not expand(zero.nvme_path).is_dir():
        problem = _refused(config, "parallel.zero.nvme_path", because="it is not a folder", instead="a folder on a local disk")
        problems.append(replace(problem, here=True))
    return problems


def _nvme_problems(config: TrainConfig) -> list[Problem]:
    """Files of parameters are DeepSpeed's."""
    zero = config.parallel.zero
    if zero.backend == "deepspeed" or zero.nvme_path is None:
        return []
    message = (
        f"parallel.zero.nvme_path={zero.nvme_path!r} with parallel.zero.backend={zero.backend}, which offloads to CPU memory alone; "
        "drop it, or use parallel.zero.backend=deepspeed"
    )
    return [Problem(fields=("parallel.zero.nvme_path", "parallel.zero.backend"), message=message)]


def _refused(config: TrainConfig, *fields: str, because: str, instead: str) -> Problem:
    """Values that a backend of another package can't have."""
    backend = config.parallel.zero.backend
    said = " and ".join(f"{name}={_value(config, name)}" for name in fields)
    message = f"{said} with parallel.zero.backend={backend}: {because}; use {instead}, or parallel.zero.backend=native"
    return Problem(fields=(*fields, "parallel.zero.backend"), message=message)


def _value(config: TrainConfig, path: str) -> object:
    """A field by its dotted name."""
    value: object = config
    for part in path.split("."):
        value = getattr(value, part)
    return value
