"""What is known of every sample of a data set, as arrays: read some row groups at a time, and checked on the way."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
from numpy.typing import NDArray

from opensora_dist.config.dataset import DatasetSpec
from opensora_dist.core.errors import DataError
from opensora_dist.core.index import INDEX_NAME, NUMBERS, IndexHeader, SampleShape, damage_named
from opensora_dist.data.strings import Strings, StringsOf

_GROUPS_AT_ONCE = 4


@dataclass(frozen=True, kw_only=True)
class Numbers:
    """The columns that are held in memory, one value per row.

    Args:
        shard: Number of the shard.
        shape: Number of the shape.
        text_tokens: Valid tokens.
        sample_id: Identity for keyed draws.
        latents_offset: Bytes into the shard.
        text_offset: Bytes into the shard.
        first_hash: Where the sample's hashes begin in the file of its data set.
    """

    shard: NDArray[np.int32]
    shape: NDArray[np.int16]
    text_tokens: NDArray[np.int32]
    sample_id: NDArray[np.uint64]
    latents_offset: NDArray[np.int64]
    text_offset: NDArray[np.int64]
    first_hash: NDArray[np.int64]

    @classmethod
    def empty(cls, rows: int) -> Numbers:
        """Columns to be filled."""
        types = {"shard": np.int32, "shape": np.int16, "text_tokens": np.int32, "sample_id": np.uint64}
        names = cls.__dataclass_fields__
        return cls(**{name: np.empty(rows, dtype=types.get(name, np.int64)) for name in names})

    def rows(self, start: int, stop: int) -> Numbers:
        """A view of some."""
        return Numbers(**{name: getattr(self, name)[start:stop] for name in self.__dataclass_fields__})


def read_numbers(folder: Path, header: IndexHeader, spec: DatasetSpec, into: Numbers) -> None:
    """Fills the columns of the data set of ``folder``, some row groups at a time, and checks what a reader relies on.

    Raises:
        DataError: Rows that contradict the index itself, counted by rule.
    """
    path, start, first = folder / INDEX_NAME, 0, 0
    shard_bytes = np.array([s.num_bytes for s in header.shards])
    frames = np.array([s.latent.t for s in header.shapes])
    broken: dict[str, tuple[int, int]] = {}
    with damage_named(path), pq.ParquetFile(path) as file:
        for group in range(0, file.num_row_groups, _GROUPS_AT_ONCE):
            groups = range(group, min(group + _GROUPS_AT_ONCE, file.num_row_groups))
            table = file.read_row_groups(groups, columns=list(NUMBERS))
            rows = into.rows(start, start + len(table))
            for name in NUMBERS:
                at = 0
                for chunk in table.column(name).chunks:
                    getattr(rows, name)[at : at + len(chunk)] = chunk.to_numpy()
                    at += len(chunk)
            ok_shape = (rows.shape >= 0) & (rows.shape < len(header.shapes))
            ok_shard = (rows.shard >= 0) & (rows.shard < len(header.shards))
            rules = {"its shape is not listed": ~ok_shape, "its shard is not listed": ~ok_shard}
            if ok_shape.all() and ok_shard.all():
                counts = frames.take(rows.shape) + 1
                np.cumsum(counts, out=rows.first_hash)
                rows.first_hash[:] += first - counts
                first += int(counts.sum())
                rules = {
                    "it has no text token (an empty caption has one)": rows.text_tokens < 1,
                    "its bytes lie outside its shard": (
                        (np.minimum(rows.latents_offset, rows.text_offset) < 0)
                        | (ends_of(rows, header.shapes, spec) > shard_bytes.take(rows.shard))
                    ),
                }
            for rule, bad in rules.items():
                if bad.any():
                    count, where = broken.get(rule, (0, start + int(bad.argmax())))
                    broken[rule] = count + int(bad.sum()), where
            start += len(table)
    if broken or first != header.num_hashes:
        keys = Strings([StringsOf(path=path, num_samples=header.num_samples)], "key")
        problems = [f"{count} samples, first {keys[where]!r}: {rule}" for rule, (count, where) in broken.items()]
        if not broken:
            problems.append(f"its samples have {first:,} hashes, but {header.num_hashes:,} are listed")
        raise DataError(f"{path}: contradicts itself: {'; '.join(problems)}. Run `opensora-dist data prepare` again")


def ends_of(rows: Numbers, shapes: Sequence[SampleShape], spec: DatasetSpec) -> NDArray[np.int64]:
    """Where the last byte of each sample lies in its shard."""
    latents = np.array([s.latents_bytes(spec.channels) for s in shapes])
    per_token = np.array([spec.text_width * np.dtype(s.dtype).itemsize for s in shapes])
    text_end = rows.text_offset + rows.text_tokens * per_token.take(rows.shape)
    ends: NDArray[np.int64] = np.maximum(rows.latents_offset + latents.take(rows.shape), text_end)
    return ends
