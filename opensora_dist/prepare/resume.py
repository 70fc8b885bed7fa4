"""Who may prepare into a folder, and what of it is finished.

``.prepare/`` beside the shards holds ``format.json``, the records of the stages in ``stages/``, encoded arrays that no shard holds yet in
``encoded/``, and a record per finished shard in ``shards/``, written after the shard has its name. A shard without one is written again.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from opensora_dist.core.errors import DataError
from opensora_dist.core.index import INDEX_NAME, SampleRow, ShardRow
from opensora_dist.core.io import exclusive_lock, read_json, shared_lock, write_json
from opensora_dist.prepare.blobs import InShard
from opensora_dist.prepare.stats import ChannelSums

STATE_DIR = ".prepare"
FORMAT = 3  # of the shards and records; a release that writes other bytes for the same input raises it


@dataclass(frozen=True, kw_only=True)
class Finished:
    """The record of one finished shard.

    Args:
        arrays: Per sample, the keys of its latents and text vectors.
    """

    shard: ShardRow
    rows: tuple[SampleRow, ...]
    sums: ChannelSums
    arrays: tuple[tuple[str, str], ...]

    def places(self, folder: Path) -> dict[str, InShard]:
        """Where its arrays are, by key."""
        found = {}
        for row, (latents, text) in zip(self.rows, self.arrays, strict=True):
            path, itemsize = folder / self.shard.name, 2 if row.dtype == "float16" else 4
            channels = row.latents_bytes // (row.latent_t * row.latent_h * row.latent_w * itemsize)
            shape = (row.latent_t, channels, row.latent_h, row.latent_w)
            found[latents] = InShard(path=path, offset=row.latents_offset, shape=shape, dtype=row.dtype)
            shape_YE = (row.text_tokens, row.text_bytes // (row.text_tokens * itemsize))
            found[text] = InShard(path=path, offset=row.text_offset, shape=shape_YE, dtype=row.dtype)
        return found


def write_finished(folder: Path, finished: Finished) -> None:
    """Records a shard, atomically."""
    write_json(_record_path(folder, finished.shard.name), asdict(finished))


def read_finished(folder: Path) -> dict[str, Finished]:
    """Shard name to record, of every finished shard that is still there as it was written."""
    records = {}
    for path in sorted((folder / STATE_DIR / "shards").glob("*.tar.json")):
        raw = read_json(path)
        shard = ShardRow(**raw["shard"])
        tar = folder / shard.name
        if tar.is_file() and tar.stat().st_size == shard.num_bytes:
            sums = raw["sums"]
            records[shard.name] = Finished(
                shard=shard,
                rows=tuple(SampleRow(**row | {"latents_frame_xxh3": tuple(row["latents_frame_xxh3"])}) for row in raw["rows"]),
                sums=ChannelSums(count=sums["count"], total=tuple(sums["total"]), squares=tuple(sums["squares"])),
                arrays=tuple((latents, text) for latents, text in raw["arrays"]),
            )
    return records


def remove_finished(folder: Path, name: str) -> None:
    """Removes a shard, then its record."""
    (folder / name).unlink(missing_ok=True)
    _record_path(folder, name).unlink(missing_ok=True)


def _record_path(folder: Path, shard: str) -> Path:
    return folder / STATE_DIR / "shards" / f"{shard}.json"


@contextmanager
def exclusive(folder: Path) -> Iterator[None]:
    """Holds the output folder for this process, and clears what a killed one left half-written.

    Raises:
        DataError: Another process prepares into it, or it isn't a preparation's.
    """
    with exclusive_lock(folder / STATE_DIR / "lock", busy=_busy(folder)):
        _claim(folder)
        state = folder / STATE_DIR
        for partial in (*folder.glob(".*.partial-*"), *state.rglob(".*.partial-*")):
            partial.unlink()
        yield


@contextmanager
def shared(folder: Path, part: tuple[int, int]) -> Iterator[None]:
    """Holds one part of the work for this process; others may hold other parts.

    Raises:
        DataError: Another process holds the part or the whole, or the folder isn't a preparation's.
    """
    number, parts = part
    mine = folder / STATE_DIR / f"lock-{number}-of-{parts}"
    with shared_lock(folder / STATE_DIR / "lock", busy=_busy(folder)), exclusive_lock(mine, busy=_busy(folder)):
        _claim(folder)
        yield


def _busy(folder: Path) -> DataError:
    return DataError(f"output.path={str(folder)!r}: another process is preparing into it; wait, or choose another")


def _claim(folder: Path) -> None:
    """Makes the folder a preparation's, or checks that it already is.

    Raises:
        DataError: It holds a data set that wasn't prepared here, or by a release that kept other records.
    """
    path = folder / STATE_DIR / "format.json"
    if path.exists():
        found = read_json(path)["format"]
    elif (folder / INDEX_NAME).exists() or (folder / STATE_DIR / "run.json").exists():
        found = None
    else:
        write_json(path, {"format": FORMAT})
        return
    if found != FORMAT:
        origin = "that was not prepared here" if found is None else f"of another release (format {found}, this one's is {FORMAT})"
        raise DataError(
            f"output.path={str(folder)!r} already holds a data set {origin}; choose another output.path, or delete the folder"
        )
