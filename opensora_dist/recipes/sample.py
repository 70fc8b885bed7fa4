"""From a checkpoint and prompts to videos."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from opensora_dist.codecs.registry import build_codec, build_text_encoder
from opensora_dist.core.errors import ConfigError
from opensora_dist.core.layout import CHECKPOINTS_DIR, SAMPLES_DIR
from opensora_dist.core.protocols import TextEncoder, VideoCodec
from opensora_dist.core.types import Thw
from opensora_dist.core.video import SHEET_COLUMNS, Frames, contact_sheet, evenly_spaced, write_video
from opensora_dist.diffusion.base import Objective
from opensora_dist.models.base import VideoTransformer
from opensora_dist.models.init import assign_weights
from opensora_dist.parallel.keys import Keys
from opensora_dist.parallel.mesh import resolve_device
from opensora_dist.parallel.sequence.base import Shard
from opensora_dist.recipes.build import meta_model, read_weights
from opensora_dist.recipes.sharing import Description, describe_checkpoint, joined_ranks
from opensora_dist.train.generate import SamplingOptions, generate_latents, noise_ids, to_frames

_SHEET_ROWS = 64


@dataclass(frozen=True, kw_only=True)
class LoadedModel(Description):
    """A trained model with all that it takes to draw from it. Needs no data set."""

    model: VideoTransformer
    objective: Objective
    codec: VideoCodec
    text: TextEncoder
    device: torch.device

    @contextmanager
    def ranks(self, *, clip: Thw, scheme: str | None) -> Iterator[Shard | None]:
        """``joined_ranks`` for videos of a clip shape.

        Raises:
            ConfigError: The codec or the model can't make clips of this shape, or the ranks can't share them.
        """
        grid = self.model.token_grid(self.codec.latent_shape(clip))
        with joined_ranks(self.config, grid=grid, scheme=scheme, device=self.device) as shard:
            yield shard


def load_model(checkpoint: Path, *, device: str, weights: str) -> LoadedModel:
    """Reads a checkpoint for sampling.

    Args:
        checkpoint: A run directory, its checkpoints folder, or one step folder.
        device: ``auto``, ``cpu`` or ``cuda``.
        weights: ``ema``, or ``model`` for the raw ones.
    Raises:
        CheckpointError: There is none, or it does not verify.
        WeightsError: Its weights are not those of the model that its config describes.
    """
    described = describe_checkpoint(checkpoint)
    folder, config, spec = described.folder, described.config, described.spec
    where = resolve_device(device)
    model, objective = meta_model(config.model, config.objective, spec)
    tensors = read_weights(folder, model, averaged=weights == "ema", source=str(folder))
    model.to_empty(device=where)
    assign_weights(model, {name: t.float() for name, t in tensors.items()})
    return LoadedModel(
        folder=folder,
        config=config,
        spec=spec,
        model=model.eval().requires_grad_(False),
        objective=objective,
        codec=build_codec(spec.codec, device=where),
        text=build_text_encoder(spec.text, device=where),
        device=where,
    )


def draw_videos(
    loaded: LoadedModel,
    prompts: Sequence[str],
    *,
    clip: Thw,
    options: SamplingOptions,
    seed: int,
    batch: int,
    shard: Shard | None,
) -> Iterator[tuple[str, Frames]]:
    """Each prompt with its video, in order; a prompt given twice gives two. The batch size changes speed, not videos.

    bfloat16 where the run computed in it, as its validation videos did; else float32. Of ranks that draw together, which all
    must go through it to its end, the first is given the videos, the others nothing.

    Args:
        shard: What ``LoadedModel.ranks`` gave for this clip shape.
    Raises:
        ConfigError: A sampling option doesn't fit.
    """
    latent = loaded.codec.latent_shape(clip)
    keys, ids = Keys(seed), noise_ids(prompts)
    half = loaded.config.run.dtype == "bfloat16"
    for start in range(0, len(prompts), batch):
        texts: list[Tensor] = loaded.text.encode(prompts[start : start + batch])
        with torch.no_grad(), torch.autocast(loaded.device.type, dtype=torch.bfloat16, enabled=half):
            latents = generate_latents(
                loaded.model,
                noise_ids=ids[start : start + batch],
                texts=texts,
                latent=latent,
                spec=loaded.spec,
                objective=loaded.objective,
                options=options,
                keys=keys,
                device=loaded.device,
                shard=shard,
            )
        if is_first(shard):
            yield from zip(prompts[start : start + batch], to_frames(latents, spec=loaded.spec, codec=loaded.codec), strict=True)


def is_first(shard: Shard | None) -> bool:
    """Whether this rank is the one of those that draw together which writes and prints."""
    return shard is None or shard.rank == 0


@dataclass(frozen=True, kw_only=True)
class SampleFiles:
    """What ``sample`` wrote."""

    videos: tuple[Path, ...]
    contact_sheet: Path


def sample(
    checkpoint: Path,
    *,
    prompts: Sequence[str],
    out: Path | None,
    count: int,
    clip: Thw | None,
    options: SamplingOptions,
    seed: int,
    batch: int,
    device: str,
    weights: str,
    scheme: str | None = None,
) -> SampleFiles | None:
    """Writes ``count`` videos per prompt as mp4, each as it is drawn, and one contact sheet of the first of them.

    All ranks that a launcher started draw each video together.

    Args:
        out: Folder for the files; None is ``samples/manual`` in the run, or beside a checkpoint that stands alone.
        scheme: How the ranks share a video; None as in ``sampling_sp``.
    Returns:
        What was written; None on ranks other than the first, which write nothing.
    Raises:
        CheckpointError: No usable checkpoint.
        ConfigError: Something asked for does not fit the model; nothing has been written.
    """
    if not prompts:
        raise ConfigError("no prompt: pass --prompt TEXT (again for more), or --prompt-file FILE with one caption per line")
    loaded = load_model(checkpoint, device=device, weights=weights)
    out = out or run_dir_of(loaded.folder) / SAMPLES_DIR / "manual"
    wanted = [p for p in prompts for _ in range(count)]
    clip = clip or loaded.default_clip
    paths: list[Path] = []
    shown: list[Frames] = []
    with loaded.ranks(clip=clip, scheme=scheme) as shard:
        for prompt, frames in draw_videos(loaded, wanted, clip=clip, options=options, seed=seed, batch=batch, shard=shard):
            paths.append(out / f"{len(paths):03d}-{_slug(prompt)}.mp4")
            write_video(paths[-1], frames, fps=loaded.spec.fps)
            if len(shown) < _SHEET_ROWS:
                shown.append(evenly_spaced(frames, SHEET_COLUMNS))
    if not is_first(shard):
        return None
    sheet = out / "contact_sheet.png"
    contact_sheet(sheet, shown, captions=wanted[: len(shown)])
    return SampleFiles(videos=tuple(paths), contact_sheet=sheet)


def run_dir_of(step_folder: Path) -> Path:
    """The run that a step folder belongs to, or the folder's parent where it stands alone."""
    parent = step_folder.parent if step_folder.parent.name else step_folder.resolve().parent
    return parent.parent if parent.name == CHECKPOINTS_DIR else parent


def _slug(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")[:48] or "video"
