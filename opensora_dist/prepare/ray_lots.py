"""Lots on a Ray cluster: Ray Data maps the stage functions over them, actors record what they find in the output folder.

An actor is what a job of an array is: it has its own segment of the store, and networks of its own. Input and output folders have to be
where every node sees them.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from opensora_dist.config.prepare import PrepareConfig
from opensora_dist.core.extras import require_extra
from opensora_dist.core.protocols import TextEncoder, VideoCodec
from opensora_dist.prepare.book import Work
from opensora_dist.prepare.resume import STATE_DIR, read_finished
from opensora_dist.prepare.run import Run, lots_of
from opensora_dist.prepare.sources import Source
from opensora_dist.prepare.store import StageStore

_BLOCKS_PER_ACTOR = 50


class _Actor:
    """Takes lots by their number."""

    def __init__(
        self,
        *,
        config: str,
        folder: str,
        sources: Sequence[Source],
        build: Callable[[PrepareConfig], tuple[VideoCodec, TextEncoder, torch.device]],
        until: Collection[Work],
    ) -> None:
        settings = PrepareConfig.model_validate_json(config)
        codec, text, device = build(settings)
        self._lots, self._until = lots_of(sources), until
        self._run = Run(
            settings,
            folder=Path(folder),
            finished=read_finished(Path(folder)),
            store=StageStore(Path(folder) / STATE_DIR / "stages", name="ray"),
            codec=codec,
            text=text,
            device=device,
        )
        resolved = bool(until) or self._run.book.resolve_duplicates(sources)
        assert resolved, "clips behind duplicates before all are scored"

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        lots = [self._lots[int(number)] for number in batch["lot"]]
        self._run.advance(lots, until=self._until, on_source=lambda: None, on_lot=lambda sources: None)
        return {"sources": [len(lot) for lot in lots]}


def advance_on_ray(
    config: PrepareConfig,
    *,
    folder: Path,
    sources: Sequence[Source],
    build: Callable[[PrepareConfig], tuple[VideoCodec, TextEncoder, torch.device]],
    until: Collection[Work],
    on_lot: Callable[[int], None],
) -> None:
    """As ``Run.advance``, for all lots, by ``workers`` actors.

    Args:
        build: Makes codec, text encoder and their device in an actor; a function that can be imported there.
        on_lot: Called with the number of a lot's sources, when it is through.
    Raises:
        ConfigError: Ray isn't installed.
    """
    require_extra("ray", extra="ray", wanted_by="executor=ray")
    import ray.data

    inside = config.model_copy(update={"workers": 1, "executor": "local"})
    lots = lots_of(sources)
    with _connected():
        ray.data.DataContext.get_current().enable_progress_bars = False  # there is one bar, and it counts sources
        data = ray.data.from_items(
            [{"lot": number} for number in range(len(lots))],
            override_num_blocks=min(len(lots), _BLOCKS_PER_ACTOR * config.workers),
        )
        worked = data.map_batches(
            _Actor,
            fn_constructor_kwargs={
                "config": inside.model_dump_json(),
                "folder": str(folder),
                "sources": list(sources),
                "build": build,
                "until": tuple(until),
            },
            batch_size=1,
            compute=ray.data.ActorPoolStrategy(size=config.workers),
            num_cpus=1,
            num_gpus=1 if config.device == "cuda" else 0,
        )
        for row in worked.iter_rows():
            on_lot(int(row["sources"]))


@contextmanager
def _connected() -> Iterator[None]:
    """A connection to the cluster that RAY_ADDRESS names, or to one that is started here and ends with the block."""
    import ray

    if ray.is_initialized():
        yield
        return
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    ray.init(log_to_driver=False, include_dashboard=False if "RAY_ADDRESS" not in os.environ else None)
    try:
        yield
    finally:
        ray.shutdown()
