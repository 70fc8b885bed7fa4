"""What a preparation has finished, so that one that was killed goes on, and never mixes with another.

Beside the shards, ``.prepare/`` holds ``run.json`` (what is being prepared) and one ``<shard>.json`` per finished shard, written
after the shard has its name. A shard without that record is written again.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from opensora_dist.config.prepare import PrepareConfig
from opensora_dist.core.errors import DataError
from opensora_dist.core.index import INDEX_NAME, SampleRow, ShardRow
from opensora_dist.core.io import exclusive_lock, hash_bytes, read_json, write_json
from opensora_dist.prepare.decode import Drop
from opensora_dist.prepare.sources import Source
from opensora_dist.prepare.stats import ChannelSums

STATE_DIR = ".prepare"
_FORMAT = 2  # of the shards and records; a release that writes other bytes for the same input raises it


@dataclass(frozen=True, kw_only=True)
class Finished:
    """The record of one finished shard.

    Args:
        drops: Sources that gave no sample and need not be looked at again: those found undecodable since the last record, and
            those of this shard's batches that could not be stored.
        cut_captions: How many of its captions were longer than the text encoder takes.
    """

    shard: ShardRow
    rows: tuple[SampleRow, ...]
    sums: ChannelSums
    drops: tuple[Drop, ...]
    cut_captions: int


def write_finished(folder: Path, finished: Finished) -> None:
    """Records a shard, atomically."""
    write_json(_record_path(folder, finished.shard.name), asdict(finished))


def read_finished(folder: Path) -> dict[str, Finished]:
    """Shard name to record, of every finished shard that is still there as it was written."""
    records = {}
    for path in sorted((folder / STATE_DIR).glob("*.tar.json")):
        raw = read_json(path)
        shard = ShardRow(**raw["shard"])
        tar = folder / shard.name
        if tar.is_file() and tar.stat().st_size == shard.num_bytes:
            records[shard.name] = Finished(
                shard=shard,
                rows=tuple(SampleRow(**row | {"latents_frame_xxh3": tuple(row["latents_frame_xxh3"])}) for row in raw["rows"]),
                sums=ChannelSums(
                    count=raw["sums"]["count"], total=tuple(raw["sums"]["total"]), squares=tuple(raw["sums"]["squares"])
                ),
                drops=tuple(Drop(**drop) for drop in raw["drops"]),
                cut_captions=raw["cut_captions"],
            )
    return records


def _record_path(folder: Path, shard: str) -> Path:
    return folder / STATE_DIR / f"{shard}.json"


@contextmanager
def exclusive(folder: Path) -> Iterator[None]:
    """Holds the output folder for this process, and clears what a killed one left half-written.

    Raises:
        DataError: Another process prepares into it.
    """
    state = folder / STATE_DIR
    busy = DataError(f"output.path={str(folder)!r}: another process is preparing into it; wait, or choose another")
    with exclusive_lock(state / "lock", busy=busy):
        for partial in (*folder.glob(".*.partial-*"), *state.glob(".*.partial-*")):
            partial.unlink()
        yield


def claim(folder: Path, config: PrepareConfig, sources: Sequence[Source]) -> None:
    """Makes the folder this preparation's, or checks that it already is.

    What doesn't change the shards (where folders are, workers, device) may differ between a run and its resumption.

    Raises:
        DataError: It holds another preparation's shards, or a data set that wasn't prepared here.
    """
    listing = [[s.name, s.caption, s.num_bytes, s.mtime_ns] for s in sources]
    mine: dict[str, Any] = {
        "format": _FORMAT,
        "config": config.model_dump(
            mode="json", exclude={"input": {"path"}, "output": {"path"}, "workers": True, "device": True}
        ),
        "num_sources": len(sources),
        "sources": hash_bytes(json.dumps(listing).encode()),
    }
    path = folder / STATE_DIR / "run.json"
    if not path.exists():
        if (folder / INDEX_NAME).exists():
            raise DataError(f"output.path={str(folder)!r} already holds a data set; choose another output.path, or delete it")
        write_json(path, mine)
        return
    theirs = _flatten(read_json(path))
    changed = [f"{key}: {theirs.get(key)!r} -> {value!r}" for key, value in _flatten(mine).items() if theirs.get(key) != value]
    changed += [f"{key}: {theirs[key]!r} -> not there" for key in theirs.keys() - _flatten(mine).keys()]
    if changed:
        raise DataError(
            f"output.path={str(folder)!r} holds a preparation of something else ({'; '.join(sorted(changed))}), and shards of two "
            "preparations must not mix; choose another output.path, or delete the folder to start again "
            "(`sources` covers paths, sizes, modification times and captions)"
        )


def _flatten(value: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"a": {"b": 1}} to {"a.b": 1}."""
    flat: dict[str, Any] = {}
    for key, item in value.items():
        flat |= _flatten(item, f"{prefix}{key}.") if isinstance(item, dict) else {prefix + key: item}
    return flat
