"""The index of a data set: one Parquet file that says where in which tar shard each sample's bytes lie.

The writer (preparation) and the reader (training) share this format and nothing else. Offsets point at raw array bytes, past tar
and .npy headers, so a reader needs one ``pread`` per array and no parser. Latents have one hash per latent frame, so that a reader of
some frames checks exactly these.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import xxhash

from opensora_dist.core.errors import DataError
from opensora_dist.core.io import atomic_path

INDEX_NAME = "index.parquet"
SCHEMA_VERSION = 2

_COLUMNS = pa.schema(
    [
        ("key", pa.string()),
        ("shard", pa.string()),
        ("latents_offset", pa.int64()),
        ("latents_bytes", pa.int64()),
        ("latents_frame_xxh3", pa.list_(pa.uint64())),
        ("text_offset", pa.int64()),
        ("text_bytes", pa.int64()),
        ("text_xxh3", pa.uint64()),
        ("dtype", pa.string()),
        ("latent_t", pa.int32()),
        ("latent_h", pa.int32()),
        ("latent_w", pa.int32()),
        ("clip_t", pa.int32()),
        ("clip_h", pa.int32()),
        ("clip_w", pa.int32()),
        ("text_tokens", pa.int32()),
        ("caption", pa.string()),
        ("source", pa.string()),
    ]
)


@dataclass(frozen=True, kw_only=True)
class SampleRow:
    """Where one sample is and what it is.

    Latents are stored [t, C, h, w], frames outermost, so that a rank which owns some frames reads one range, and hashed frame by
    frame. Text is stored [text_tokens, width], valid tokens only. ``*_xxh3`` are xxh3-64 of the array bytes. ``dtype`` is numpy's
    name of both arrays.
    """

    key: str
    shard: str
    latents_offset: int
    latents_bytes: int
    latents_frame_xxh3: tuple[int, ...]
    text_offset: int
    text_bytes: int
    text_xxh3: int
    dtype: str
    latent_t: int
    latent_h: int
    latent_w: int
    clip_t: int
    clip_h: int
    clip_w: int
    text_tokens: int
    caption: str
    source: str


@dataclass(frozen=True, kw_only=True)
class ShardRow:
    """One tar shard: its file name, size, number of samples and xxh3-64 (hex) of the whole file."""

    name: str
    num_bytes: int
    num_samples: int
    xxh3: str


@dataclass(frozen=True, kw_only=True)
class IndexFile:
    """An index in memory.

    Args:
        table: One row per sample, columns as ``SampleRow``.
        shards: One entry per tar shard.
        spec: ``DatasetSpec`` as plain JSON values.
        dataset_hash: xxh3-64 (hex) over spec, shards and samples: the identity of the data set.
    """

    table: pa.Table
    shards: tuple[ShardRow, ...]
    spec: dict[str, Any]
    dataset_hash: str


def write_index(folder: Path, *, rows: Sequence[SampleRow], shards: Sequence[ShardRow], spec: dict[str, Any]) -> Path:
    """Writes ``index.parquet`` atomically. It is written last, so a folder with an index is whole.

    Args:
        folder: The data set's folder, next to its shards.
        rows: One per sample, in shard order.
        shards: One per tar file.
        spec: ``DatasetSpec.model_dump(mode="json")``.
    """
    assert rows, "an index without samples"
    table = pa.Table.from_pylist([asdict(r) for r in rows], schema=_COLUMNS)
    header = {"schema_version": SCHEMA_VERSION, "spec": spec, "shards": [asdict(s) for s in shards]}
    table = table.replace_schema_metadata({"opensora_dist": json.dumps(header, sort_keys=True)})
    path = Path(folder) / INDEX_NAME
    with atomic_path(path) as partial:
        pq.write_table(table, partial, compression="zstd")
    return path


def read_index(folder: Path) -> IndexFile:
    """Reads ``index.parquet`` of a prepared data set.

    Raises:
        DataError: No index, not an index of ours, a newer schema, or no samples.
    """
    path = Path(folder) / INDEX_NAME
    if not path.is_file():
        raise DataError(
            f"{path}: no such index; data.path must be a folder made by `opensora-dist data prepare` "
            "(an unfinished preparation has no index yet: run it again, it resumes)"
        )
    try:
        table = pq.read_table(path)
    except (pa.ArrowInvalid, OSError) as error:
        raise DataError(f"{path}: damaged or not a Parquet file ({error}); run `opensora-dist data prepare` again") from error
    raw = (table.schema.metadata or {}).get(b"opensora_dist")
    foreign = DataError(f"{path}: not an index of opensora_dist; make one with `opensora-dist data prepare`")
    if raw is None:
        raise foreign
    header = json.loads(raw)
    if header["schema_version"] != SCHEMA_VERSION:
        raise DataError(f"{path}: schema version {header['schema_version']}, this release reads {SCHEMA_VERSION}; prepare again")
    if table.schema.names != _COLUMNS.names:
        raise foreign
    if table.num_rows == 0:
        raise DataError(f"{path}: the index lists no sample; see the preparation's report for why each clip was dropped")
    digest = xxhash.xxh3_64(raw)
    for name in ("key", "latents_frame_xxh3", "text_xxh3"):
        digest.update("\n".join(map(str, table.column(name).to_pylist())).encode())
    shards = tuple(ShardRow(**s) for s in header["shards"])
    return IndexFile(table=table, shards=shards, spec=header["spec"], dataset_hash=digest.hexdigest())
