"""What keeps a training run from starting: every rule that needs the data set or this machine, all problems at once."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Mapping
from contextlib import closing

import torch

from opensora_dist.checkpoint.commit import SAVE_PHASES
from opensora_dist.codecs.registry import build_codec, check_text_encoder
from opensora_dist.config.faults import InSave, parse_fault
from opensora_dist.config.load import Problem, expand
from opensora_dist.config.rules import train_problems
from opensora_dist.config.train import DataConfig, TrainConfig
from opensora_dist.core.errors import ConfigError, OpensoraError
from opensora_dist.core.layout import CHECKPOINTS_DIR
from opensora_dist.core.types import Thw
from opensora_dist.core.urls import is_remote, redact
from opensora_dist.data.index import Index
from opensora_dist.data.mixture import open_data
from opensora_dist.data.remote import holds_index
from opensora_dist.data.transport import FetchError, Patience
from opensora_dist.diffusion.samplers import check_sampling
from opensora_dist.models.base import VideoTransformer
from opensora_dist.observe.trackers import track_problems
from opensora_dist.parallel.keys import Keys
from opensora_dist.parallel.mesh import default_nproc, launched_world, resolve_device
from opensora_dist.parallel.sequence.network import read_network
from opensora_dist.parallel.zero.deepspeed import import_deepspeed
from opensora_dist.recipes.build import meta_model
from opensora_dist.recipes.data import order_of
from opensora_dist.recipes.shards import share_problems
from opensora_dist.resilience.restarts import restart_count

_ASKING_S = 10.0  # of a store, by a machine that only submits


def places(data: DataConfig) -> list[str]:
    """Paths and URLs of its data sets."""
    return [entry.path for entry in data.mixture] or ([data.path] if data.path is not None else [])


def world_of(config: TrainConfig) -> int:
    """How many ranks the run has, or will have."""
    return launched_world() or config.parallel.nproc or default_nproc(config.run.device)


def training_problems(config: TrainConfig) -> list[Problem]:
    """Everything that can be found wrong with a run on this machine before a process group is made."""
    problems = []
    if config.run.device == "cuda" and not torch.cuda.is_available():
        message = "run.device=cuda, but torch sees no CUDA device here; use run.device=auto or cpu, or check the driver"
        problems.append(Problem(fields=("run.device",), message=message))
        world = launched_world() or config.parallel.nproc or 1
    else:
        world = world_of(config)
        problems += rank_problems(config)
        problems += _plugin_problems(config, gpus=resolve_device(config.run.device).type == "cuda")
    problems += _run_problems(config, world=world)
    problems += _nvme_problems(config)
    if launched_world() is not None and not _started_by_us():
        problems += _restart_problems(config, instead="torchrun --max-restarts")
    # The data set can be asked only where the fields that build a model from it are right. Ranks that were just started by the command
    # that has asked it don't open it and plan its order once more.
    if not problems and not (_started_by_us() and restart_count() == 0):
        problems += _dataset_problems(config)
    # Rank 0 alone has trackers, and other machines need neither their packages nor a key.
    if os.environ.get("RANK", "0") == "0":
        problems += track_problems(config.track)
    return problems


def submitted_problems(config: TrainConfig, *, nodes: int, ranks_per_node: int, gpus_per_node: int) -> list[Problem]:
    """Everything that can be found wrong here with a run that a scheduler starts elsewhere, on machines that have what was asked for.

    This machine needs no GPU; what it lacks of paths and packages (``Problem.here``) the others may have.
    """
    problems = []
    if config.run.device == "cuda" and gpus_per_node == 0:
        message = "run.device=cuda with --gpus-per-node 0, which asks for none; use --gpus-per-node 8, or run.device=auto or cpu"
        problems.append(Problem(fields=("run.device",), message=message))
    if config.run.device == "cpu" and gpus_per_node > 0:
        message = (
            f"run.device=cpu with --gpus-per-node {gpus_per_node}, which would stay idle; use run.device=auto, or --gpus-per-node 0 "
            f"--ranks-per-node {ranks_per_node}"
        )
        problems.append(Problem(fields=("run.device",), message=message))
    problems += _plugin_problems(config, gpus=gpus_per_node > 0)
    problems += _run_problems(config, world=nodes * ranks_per_node)
    problems += _restart_problems(config, instead="--max-requeues")
    if all(p.here and not p.fields[0].startswith("data.") for p in problems):
        hurried = config.data.cache.model_copy(update={"patience_s": min(config.data.cache.patience_s, _ASKING_S)})
        data = config.data.model_copy(update={"cache": hurried})
        problems += _unread_problems(data) or _dataset_problems(config.model_copy(update={"data": data}))
    return problems + track_problems(config.track)


def _unread_problems(data: DataConfig) -> list[Problem]:
    """Remote data sets that would have to be fetched whole to know what is in them, or that can't be asked."""
    problems = []
    for url in filter(is_remote, places(data)):
        said = "tars without an index, which are read where the run is"
        try:
            if holds_index(url, Patience(total_s=data.cache.patience_s)):
                continue
        except (OpensoraError, FetchError) as error:
            said = str(error)
        message = f"{redact(url)}: {said}; whether model and layout fit its samples isn't known before the run starts"
        problems.append(Problem(fields=("data.path", "data.mixture"), message=message, here=True))
    return problems


def _run_problems(config: TrainConfig, *, world: int) -> list[Problem]:
    """What is wrong with a run of ``world`` ranks, wherever they are; but of its data set."""
    problems = train_problems(config, world=world)
    try:
        check_sampling(config.objective, sampler=config.validation.sampler, steps=config.validation.sampling_steps)
    except ConfigError as error:
        fields = ("validation.sampler", "validation.sampling_steps", "objective")
        problems += [Problem(fields=fields, message=f"validation.{p}") for p in error.problems]
    problems += _init_from_problems(config)
    problems += _save_phase_problems(config)
    if config.parallel.sp.scheme == "auto" and config.parallel.sp.network is not None:
        try:
            read_network(expand(config.parallel.sp.network))
        except ConfigError as error:
            problems += [Problem(fields=("parallel.sp.network",), message=p, here=True) for p in error.problems]
    return problems


def rank_problems(config: TrainConfig) -> list[Problem]:
    """Each rank on CUDA needs a GPU of its own."""
    gpus, nproc = torch.cuda.device_count(), config.parallel.nproc
    if launched_world() is not None or nproc is None or nproc <= gpus or resolve_device(config.run.device).type != "cuda":
        return []
    message = f"parallel.nproc={nproc} exceeds the {gpus} GPU(s) of this machine; use at most {gpus}, or run.device=cpu"
    return [Problem(fields=("parallel.nproc", "run.device"), message=message)]


def _plugin_problems(config: TrainConfig, *, gpus: bool) -> list[Problem]:
    """Colossal-AI's plugins want ranks with GPUs."""
    if config.parallel.zero.backend != "colossalai" or gpus:
        return []
    message = (
        f"parallel.zero.backend=colossalai with run.device={config.run.device} and no GPU: its plugins run on CUDA "
        "devices only; use parallel.zero.backend=native"
    )
    return [Problem(fields=("parallel.zero.backend", "run.device"), message=message)]


def _restart_problems(config: TrainConfig, *, instead: str) -> list[Problem]:
    """Ranks that a launcher starts are its own to start again; ``instead`` is its option for that."""
    restarts = config.parallel.max_restarts
    if restarts == 0:
        return []
    message = (
        f"parallel.max_restarts={restarts} under a launcher, which alone can start its ranks again; use {instead}={restarts} "
        "and parallel.max_restarts=0"
    )
    return [Problem(fields=("parallel.max_restarts",), message=message)]


def _started_by_us() -> bool:
    """Ranks of ``parallel.spawn`` have a count of restarts without torchrun's id."""
    return "TORCHELASTIC_RESTART_COUNT" in os.environ and "TORCHELASTIC_RUN_ID" not in os.environ


def _save_phase_problems(config: TrainConfig) -> list[Problem]:
    """A phase in which a rank is to be killed must be one that saves have."""
    text = config.fault.kill_in_save
    fault = parse_fault("kill_in_save", text) if text is not None else None
    if not isinstance(fault, InSave) or fault.phase in SAVE_PHASES:
        return []
    message = f"fault.kill_in_save={text!r} names no phase of a save; use one of {', '.join(SAVE_PHASES)}"
    return [Problem(fields=("fault.kill_in_save",), message=message)]


def _nvme_problems(config: TrainConfig) -> list[Problem]:
    """DeepSpeed's asynchronous reads and writes are compiled against a library of the system's."""
    zero = config.parallel.zero
    if zero.backend != "deepspeed" or zero.nvme_path is None or importlib.util.find_spec("deepspeed") is None:
        return []
    deepspeed = import_deepspeed(torch.device("cpu") if config.run.device == "cpu" else resolve_device(config.run.device))
    if deepspeed.ops.op_builder.AsyncIOBuilder().is_compatible(verbose=False):
        return []
    message = (
        f"parallel.zero.nvme_path={zero.nvme_path!r} needs libaio and its headers, which DeepSpeed finds none of; install them "
        "(apt-get install libaio-dev), or drop it for offload to CPU memory"
    )
    return [Problem(fields=("parallel.zero.nvme_path",), message=message)]


def _init_from_problems(config: TrainConfig) -> list[Problem]:
    """Weights to start from must be there, unless the run has a checkpoint of its own already."""
    wanted = config.model.init_from
    if wanted is None or any((expand(config.run.dir) / CHECKPOINTS_DIR).glob("step-*")):
        return []
    path = expand(wanted.path)
    if path.is_dir() if wanted.format == "run" else path.is_file():
        return []
    what = "a run directory" if wanted.format == "run" else "a file"
    message = f"model.init_from.path={wanted.path!r} is not {what}; give the path of the weights"
    return [Problem(fields=("model.init_from.path",), message=message, here=True)]


def _dataset_problems(config: TrainConfig) -> list[Problem]:
    """What does not fit the data set: the model must cut each shape of clips into patches, and the ranks those into parts."""
    fields = ("data.path", "data.mixture")
    try:
        index = open_data(config.data, max_lost=config.resilience.max_bad_samples)
    except OpensoraError as error:
        # Of one that lies elsewhere, this machine may know nothing.
        elsewhere = any(
            is_remote(path) for path in (config.data.path, *(e.path for e in config.data.mixture)) if path is not None
        )
        return [Problem(fields=fields, message=p, here=elsewhere) for p in _sentences(error)]
    with closing(index.shard_source):
        try:
            model, _ = meta_model(config.model, config.objective, index.spec)
            return _fit_problems(config, index, model)
        except OpensoraError as error:
            return [Problem(fields=fields, message=p) for p in _sentences(error)]


def _fit_problems(config: TrainConfig, index: Index, model: VideoTransformer) -> list[Problem]:
    problems: list[Problem] = []
    grids: dict[Thw, Thw] = {}
    for bucket in index.buckets:
        try:
            grids[bucket] = model.token_grid(index.latent_of(bucket))
        except ConfigError as error:
            problems += [Problem(fields=("model.patch",), message=f"clips of {bucket}: {p}") for p in error.problems]
    if not problems:
        problems += _order_problems(config, index, model, grids)
    if config.validation.every_steps:
        problems += _drawing_problems(config, index, model)
    return problems


def _order_problems(config: TrainConfig, index: Index, model: VideoTransformer, grids: Mapping[Thw, Thw]) -> list[Problem]:
    """Buckets that fill no step, and ranks that can't share the samples of those that do.

    Args:
        grids: Token grid of each bucket.
    """
    fields = ("data.global_batch", "data.batching", "data.unit_tokens", "data.image_share")
    try:
        order = order_of(config.data, index, model, keys=Keys(config.run.seed))
    except OpensoraError as error:
        return [Problem(fields=fields, message=p) for p in _sentences(error)]
    used = {f"clips of {bucket}": grid for bucket, grid in grids.items() if index.latent_of(bucket) in order.latents}
    return share_problems(config.parallel.sp, config.model, used)


def validation_clip(config: TrainConfig, index: Index) -> Thw:
    """Frames, height and width of the validation videos: what the config asks for, or the largest clips of the data set."""
    asked = config.validation.clip
    return max(index.buckets, key=lambda bucket: bucket.volume) if asked is None else Thw(*asked)


def _drawing_problems(config: TrainConfig, index: Index, model: VideoTransformer) -> list[Problem]:
    """Validation videos take the text encoder and the codec that the data set was made with."""
    problems: list[Problem] = []
    spec = index.spec

    def add(error: OpensoraError) -> None:
        what = f"validation.every_steps={config.validation.every_steps} needs the data set's codec and text encoder"
        fields = ("validation.every_steps", "data.path")
        problems.extend(Problem(fields=fields, message=f"{what}: {p}", here=True) for p in _sentences(error))

    try:
        check_text_encoder(spec.text)
    except ConfigError as error:
        add(error)
    try:
        codec = build_codec(spec.codec, device=torch.device("cpu"))
    except OpensoraError as error:
        add(error)
        return problems
    clip, asked = validation_clip(config, index), config.validation.clip is not None
    try:
        grid = model.token_grid(codec.latent_shape(clip))
    except ConfigError as error:
        if asked:  # of clips of the data set it is said already
            problems += [Problem(fields=("validation.clip",), message=f"validation.clip: {p}") for p in error.problems]
        return problems
    what = f"validation.clip={list(clip)}" + ("" if asked else ", by default the largest clips; set it to smaller ones")
    return problems + share_problems(config.parallel.sp, config.model, {what: grid})


def _sentences(error: OpensoraError) -> list[str]:
    return error.problems if isinstance(error, ConfigError) else [str(error)]
