"""Ranks that draw each video together, in `sample` and `evaluate`: how they share it, and where they come from."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import gcd
from pathlib import Path

import torch

from opensora_dist.checkpoint.commit import resolve
from opensora_dist.codecs.registry import build_codec
from opensora_dist.config.dataset import DatasetSpec
from opensora_dist.config.load import load_config
from opensora_dist.config.train import SpConfig, TrainConfig
from opensora_dist.core.errors import ConfigError
from opensora_dist.core.io import read_json
from opensora_dist.core.layout import CONFIG_NAME
from opensora_dist.core.logging import setup_logging
from opensora_dist.core.types import Thw
from opensora_dist.diffusion.samplers import check_sampling
from opensora_dist.parallel.failures import lost_contact_said
from opensora_dist.parallel.mesh import build_mesh, launched_world, process_group, resolve_device
from opensora_dist.parallel.sequence.base import Shard
from opensora_dist.parallel.sequence.layout import SequenceParallel, scheme_problems
from opensora_dist.parallel.spawn import run_ranks
from opensora_dist.recipes.build import meta_model
from opensora_dist.train.generate import SamplingOptions
from opensora_dist.train.saving import DATASET_NAME

# Of the groups of ranks that draw together. The first decodes, scores and writes alone while the others wait in the next batch's first
# exchange: that takes as long as it takes, and the timeout that training runs with knows nothing of it. A rank that ends is noticed
# without a timeout: its sockets close, and whoever started the ranks ends the others.
_TIMEOUT_S = 6 * 3600.0

# What the config calls the things that these verbs have flags for.
_FLAGS = {"parallel.sp.scheme": "--scheme", "parallel.sp.degree": "--nproc"}


@dataclass(frozen=True, kw_only=True)
class Description:
    """What a checkpoint says of itself: all but its tensors."""

    folder: Path
    config: TrainConfig
    spec: DatasetSpec

    @property
    def default_clip(self) -> Thw:
        """Clip shape where none is asked for: that of the validation videos, or the one trained on most."""
        return Thw(*(self.config.validation.clip or self.spec.buckets[0]))


def describe_checkpoint(checkpoint: Path) -> Description:
    """Finds a checkpoint and reads what it is of.

    Args:
        checkpoint: A run directory, its checkpoints folder, or one step folder.
    Raises:
        CheckpointError: There is none, or it does not verify.
    """
    folder = resolve(checkpoint)
    config = load_config(TrainConfig, folder / CONFIG_NAME)
    return Description(folder=folder, config=config, spec=DatasetSpec.model_validate(read_json(folder / DATASET_NAME)))


def sampling_sp(config: TrainConfig, *, degree: int, scheme: str | None, grid: Thw) -> SpConfig:
    """How ``degree`` ranks share the tokens of a video.

    By the scheme asked for; else by the run's own where it names one that takes such videos; else by the one with the fewest bytes
    that does: dsp for stdit, and for dit ulysses where the ranks divide the heads, else ring.

    Args:
        scheme: None leaves it open.
        grid: Tokens of a video.
    Raises:
        ConfigError: The scheme asked for, or any, does not take such videos.
    """
    model, own = config.model, config.parallel.sp
    joint, heads = model.name == "dit", model.shape.heads
    usual = ["ulysses", "ring"] if joint else ["dsp"]
    problems: list[str] = []
    for name in [scheme] if scheme else [*([] if own.scheme == "auto" else [own.scheme]), *usual]:
        ulysses = gcd(degree, heads) if name == "usp" else None
        sp = own.model_copy(update={"degree": degree, "scheme": name, "ulysses": ulysses, "min_degree": None})
        problems = scheme_problems(sp, grid, heads=heads, joint=joint)
        if not problems:
            return sp
    raise ConfigError([_with_flags(p) for p in problems])


def _with_flags(problem: str) -> str:
    for name, flag in _FLAGS.items():
        problem = problem.replace(name, flag)
    return problem


def start_ranks(
    argv: Sequence[str],
    *,
    nproc: int,
    scheme: str | None,
    checkpoint: Path,
    clip: Thw | None,
    options: SamplingOptions,
    device: str,
) -> int | None:
    """Runs a command as ``nproc`` ranks of this machine, where it takes more than this process and no launcher has done so.

    Everything that keeps them from sharing a video is said before one starts.

    Args:
        argv: The command, as this process was given it.
    Returns:
        The exit code; None where this process is to do the work.
    Raises:
        CheckpointError: No usable checkpoint.
        ConfigError: The ranks can't share such videos, there are too few GPUs, or a flag says what would have no effect.
    """
    world = launched_world()
    if (world or nproc) == 1 and scheme is not None:
        raise ConfigError(
            f"--scheme={scheme} says how ranks share a video, and there is one rank; drop it, or add --nproc 2 or more"
        )
    if world is not None:
        here = int(os.environ.get("LOCAL_WORLD_SIZE", world))
        if nproc not in (1, here):
            raise ConfigError(f"--nproc={nproc}, but the launcher has started {here} ranks on this machine; leave --nproc out")
        return None
    if nproc == 1:
        return None
    gpus = torch.cuda.device_count()
    if resolve_device(device).type == "cuda" and nproc > gpus:
        raise ConfigError(f"--nproc={nproc} exceeds the {gpus} GPU(s) of this machine; use at most {gpus}, or --device cpu")
    described = describe_checkpoint(checkpoint)
    config = described.config
    check_sampling(config.objective, sampler=options.sampler, steps=options.steps)
    model, _ = meta_model(config.model, config.objective, described.spec)
    codec = build_codec(described.spec.codec, device=torch.device("cpu"))
    grid = model.token_grid(codec.latent_shape(clip or described.default_clip))
    sampling_sp(config, degree=nproc, scheme=scheme, grid=grid)
    del codec  # its weights are of no use while the ranks run
    logs = Path(tempfile.mkdtemp(prefix="opensora-dist-ranks-"))
    code = run_ranks(argv, nproc=nproc, log_dir=logs)
    if code == 0:
        shutil.rmtree(logs)  # of ranks that had nothing to say
    return code


@contextmanager
def joined_ranks(config: TrainConfig, *, grid: Thw, scheme: str | None, device: torch.device) -> Iterator[Shard | None]:
    """The part of each video that this rank draws; None in a process that no launcher started beside others. Collective.

    Args:
        grid: Tokens of a video.
    Raises:
        ConfigError: As ``sampling_sp``.
        CommunicationError: Another rank is gone.
    """
    world = launched_world() or 1
    if world == 1:
        yield None
        return
    sp = sampling_sp(config, degree=world, scheme=scheme, grid=grid)
    with lost_contact_said(timeout_s=_TIMEOUT_S, option=None), process_group(device, timeout_s=_TIMEOUT_S):
        mesh = build_mesh(device, dp_replicate=1, sp=sp, timeout_s=_TIMEOUT_S)
        setup_logging(rank=mesh.rank, world=mesh.world)
        yield SequenceParallel(mesh, sp).shard(grid)
