"""The preparation recipe: check the config, build codec and text encoder, prepare."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from opensora_dist.codecs.registry import build_codec, build_text_encoder
from opensora_dist.config.load import load_config
from opensora_dist.config.prepare import PrepareConfig
from opensora_dist.config.rules import prepare_problems
from opensora_dist.observe.progress import Bar
from opensora_dist.parallel.mesh import resolve_device
from opensora_dist.prepare.pipeline import PrepareProgress, PrepareReport, prepare


def prepare_dataset(path: Path | None, *, overrides: Sequence[str] = ()) -> PrepareReport:
    """Prepares what a config says, with a progress bar.

    Raises:
        ConfigError: Every problem of the config.
        DataError: The videos can't be used, or none gives a sample.
    """
    config = load_config(PrepareConfig, path, overrides=overrides, rules=prepare_problems)
    device = resolve_device(config.device)
    with Bar("clips", total=None) as bar:

        def show(progress: PrepareProgress) -> None:
            note = f"{progress.samples} samples, {progress.dropped} dropped"
            bar.update(progress.done, total=progress.total, note=note)

        return prepare(
            config,
            codec=build_codec(config.codec, device=device),
            text=build_text_encoder(config.text, device=device),
            on_progress=show,
        )
