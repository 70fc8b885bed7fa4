"""From a checkpoint and prompts to videos."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from opensora_dist.checkpoint.commit import resolve
from opensora_dist.codecs.registry import build_codec, build_text_encoder
from opensora_dist.config.dataset import DatasetSpec
from opensora_dist.config.load import load_config
from opensora_dist.config.train import TrainConfig
from opensora_dist.core.errors import ConfigError
from opensora_dist.core.io import read_json
from opensora_dist.core.layout import CHECKPOINTS_DIR, CONFIG_NAME, SAMPLES_DIR
from opensora_dist.core.protocols import TextEncoder, VideoCodec
from opensora_dist.core.types import Thw
from opensora_dist.core.video import SHEET_COLUMNS, Frames, contact_sheet, evenly_spaced, write_video
from opensora_dist.diffusion.base import Objective
from opensora_dist.models.base import VideoTransformer
from opensora_dist.models.init import assign_weights
from opensora_dist.parallel.keys import Keys
from opensora_dist.parallel.mesh import resolve_device
from opensora_dist.recipes.build import meta_model, read_weights
from opensora_dist.train.generate import SamplingOptions, generate_latents, noise_ids, to_frames
from opensora_dist.train.saving import DATASET_NAME

_SHEET_ROWS = 64


@dataclass(frozen=True, kw_only=True)
class LoadedModel:
    """A trained model with all that it takes to draw from it. Needs no data set."""

    folder: Path
    config: TrainConfig
    spec: DatasetSpec
    model: VideoTransformer
    objective: Objective
    codec: VideoCodec
    text: TextEncoder
    device: torch.device

    @property
    def default_clip(self) -> Thw:
        """Clip shape where none is asked for: that of the validation videos, or the one trained on most."""
        return Thw(*(self.config.validation.clip or self.spec.buckets[0]))


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
    folder = resolve(checkpoint)
    config = load_config(TrainConfig, folder / CONFIG_NAME)
    spec = DatasetSpec.model_validate(read_json(folder / DATASET_NAME))
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
    loaded: LoadedModel, prompts: Sequence[str], *, clip: Thw, options: SamplingOptions, seed: int, batch: int
) -> Iterator[Frames]:
    """One video per prompt, in order; a prompt given twice gives two. The batch size changes speed, not videos.

    bfloat16 where the run computed in it, as its validation videos did; else float32.

    Raises:
        ConfigError: The codec or the model can't make clips of this shape, or a sampling option doesn't fit.
    """
    latent = loaded.codec.latent_shape(clip)
    loaded.model.token_grid(latent)
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
                shard=None,
            )
        yield from to_frames(latents, spec=loaded.spec, codec=loaded.codec)


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
) -> SampleFiles:
    """Writes ``count`` videos per prompt as mp4, each as it is drawn, and one contact sheet of the first of them.

    Args:
        out: Folder for the files; None is ``samples/manual`` in the run, or beside a checkpoint that stands alone.
    Raises:
        CheckpointError: No usable checkpoint.
        ConfigError: Something asked for does not fit the model; nothing has been written.
    """
    if not prompts:
        raise ConfigError("no prompt: pass --prompt TEXT (again for more), or --prompt-file FILE with one caption per line")
    loaded = load_model(checkpoint, device=device, weights=weights)
    out = out or run_dir_of(loaded.folder) / SAMPLES_DIR / "manual"
    wanted = [p for p in prompts for _ in range(count)]
    videos = draw_videos(loaded, wanted, clip=clip or loaded.default_clip, options=options, seed=seed, batch=batch)
    paths: list[Path] = []
    shown: list[Frames] = []
    for i, (prompt, frames) in enumerate(zip(wanted, videos, strict=True)):
        paths.append(out / f"{i:03d}-{_slug(prompt)}.mp4")
        write_video(paths[-1], frames, fps=loaded.spec.fps)
        if len(shown) < _SHEET_ROWS:
            shown.append(evenly_spaced(frames, SHEET_COLUMNS))
    sheet = out / "contact_sheet.png"
    contact_sheet(sheet, shown, captions=wanted[: len(shown)])
    return SampleFiles(videos=tuple(paths), contact_sheet=sheet)


def run_dir_of(step_folder: Path) -> Path:
    """The run that a step folder belongs to, or the folder's parent where it stands alone."""
    parent = step_folder.parent if step_folder.parent.name else step_folder.resolve().parent
    return parent.parent if parent.name == CHECKPOINTS_DIR else parent


def _slug(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")[:48] or "video"
