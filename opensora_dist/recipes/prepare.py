"""The preparation recipe: check the config, build codec and text encoder, prepare."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch

from opensora_dist.codecs.registry import build_codec, build_text_encoder
from opensora_dist.config.load import load_config
from opensora_dist.config.prepare import PrepareConfig
from opensora_dist.config.rules import prepare_problems
from opensora_dist.core.protocols import TextEncoder, VideoCodec
from opensora_dist.observe.progress import Bar, format_seconds
from opensora_dist.parallel.mesh import resolve_device
from opensora_dist.prepare.pipeline import PartReport, prepare, prepare_part
from opensora_dist.prepare.report import PrepareReport
from opensora_dist.prepare.run import PrepareProgress


def prepare_dataset(path: Path | None, *, overrides: Sequence[str] = ()) -> PrepareReport:
    """Prepares what a config says, with a progress bar.

    Raises:
        ConfigError: Every problem of the config.
        DataError: The videos can't be used, or none gives a sample.
    """
    config = load_config(PrepareConfig, path, overrides=overrides, rules=prepare_problems)
    codec, text, device = build_networks(config)
    with _shown() as show:
        return prepare(config, codec=codec, text=text, device=device, build=build_networks, on_progress=show)


def prepare_dataset_part(path: Path | None, *, part: tuple[int, int], overrides: Sequence[str] = ()) -> PartReport:
    """One part of the work, for a job of an array. ``prepare_dataset`` does what is left, and makes the data set.

    Args:
        part: (number from 1, how many parts).
    Raises:
        ConfigError, DataError: As ``prepare_dataset``.
    """
    config = load_config(PrepareConfig, path, overrides=overrides, rules=prepare_problems)
    codec, text, device = build_networks(config)
    with _shown() as show:
        return prepare_part(config, part=part, codec=codec, text=text, device=device, on_progress=show)


def build_networks(config: PrepareConfig) -> tuple[VideoCodec, TextEncoder, torch.device]:
    """Codec and text encoder of a config, and the device that they are on."""
    device = resolve_device(config.device)
    return build_codec(config.codec, device=device), build_text_encoder(config.text, device=device), device


@contextmanager
def _shown() -> Iterator[Callable[[PrepareProgress], None]]:
    """A bar that follows one phase after the other."""
    phase, began_s, first = "", 0.0, 0
    with Bar("preparing", total=None) as bar:

        def show(progress: PrepareProgress) -> None:
            nonlocal phase, began_s, first
            if progress.what != phase:
                phase, began_s, first = progress.what, time.monotonic(), progress.done
            new = progress.done - first
            left_s = (time.monotonic() - began_s) / new * (progress.total - progress.done) if new else None
            eta = f", ETA {format_seconds(left_s)}" if left_s is not None and progress.done < progress.total else ""
            note = f"{phase}: {progress.samples} samples, {progress.dropped} dropped{eta}"
            bar.update(progress.done, total=progress.total, note=note)

        yield show
