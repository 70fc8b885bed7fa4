"""The index of a data set: which samples there are, and where in which tar shard each one's bytes lie.

The writer (preparation) and the reader (training) share this format and nothing else. Offsets point at raw array bytes, past tar
and .npy headers, so a reader needs one ``pread`` per array and no parser. Latents have one hash per latent frame, so that a reader of
some frames checks exactly these.

Two files, so that ten million samples open in a second: ``index.parquet`` holds one row per sample, and in its footer all that samples
have in common; the hashes lie in a flat file beside it, which is looked into and never read whole. What follows from a sample's shape
(how many bytes it has) is not stored.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from opensora_dist.core.errors import DataError
from opensora_dist.core.identity import IdentityHash, check_distinct
from opensora_dist.core.io import atomic_path, sample_id
from opensora_dist.core.types import Thw

INDEX_NAME = "index.parquet"
SCHEMA_VERSION = 3
DTYPES = ("float16", "float32")
GROUP_ROWS = 1 << 15
"""Samples per row group: what is decoded to look up one sample's strings."""
_META = b"opensora_dist"
COLUMNS = pa.schema(
    [
        ("key", pa.string()),
        ("sample_id", pa.uint64()),
        ("shard", pa.int32()),
        ("shape", pa.int16()),
        ("latents_offset", pa.int64()),
        ("text_offset", pa.int64()),
        ("text_tokens", pa.int32()),
        ("caption", pa.string()),
        ("source", pa.string()),
    ]
)
NUMBERS = ("sample_id", "shard", "shape", "latents_offset", "text_offset", "text_tokens")
"""The columns that are held in memory."""
STRINGS = ("key", "caption", "source")


@dataclass(frozen=True, kw_only=True)
class SampleShape:
    """What samples of one kind have in common.

    Args:
        clip: Frames, height and width in pixels: the bucket.
        latent: Latent frames, height and width.
        dtype: numpy's name of the stored precision of latents and text.
    """

    clip: Thw
    latent: Thw
    dtype: str

    def latents_bytes(self, channels: int) -> int:
        """Of the latents of one sample."""
        return self.latent.volume * channels * np.dtype(self.dtype).itemsize


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

    @property
    def shape(self) -> SampleShape:
        """What it has in common with others."""
        clip, latent = Thw(self.clip_t, self.clip_h, self.clip_w), Thw(self.latent_t, self.latent_h, self.latent_w)
        return SampleShape(clip=clip, latent=latent, dtype=self.dtype)


@dataclass(frozen=True, kw_only=True)
class ShardRow:
    """One tar shard: its file name, size, number of samples and xxh3-64 (hex) of the whole file."""

    name: str
    num_bytes: int
    num_samples: int
    xxh3: str


@dataclass(frozen=True, kw_only=True)
class RowChunk:
    """Some samples as columns, for writers of millions; ``SampleRow`` says what they mean.

    Args:
        shard: Numbers of shards.
        shape: Numbers of shapes.
        hashes: uint64, sample by sample: of each latent frame, then of the text.
    """

    key: Sequence[str]
    shard: NDArray[np.int32]
    shape: NDArray[np.int16]
    latents_offset: NDArray[np.int64]
    text_offset: NDArray[np.int64]
    text_tokens: NDArray[np.int32]
    hashes: NDArray[np.uint64]
    caption: Sequence[str]
    source: Sequence[str]


@dataclass(frozen=True, kw_only=True)
class IndexHeader:
    """What the footer of an index says.

    Args:
        shards: One entry per tar shard.
        shapes: The shapes that samples have.
        spec: ``DatasetSpec`` as plain JSON values.
        hashes_name: Name of the file of hashes, beside the index.
        hashes_xxh3: xxh3-64 (hex) of that file.
        num_hashes: How many it holds.
        num_samples: Rows of the index.
        dataset_hash: xxh3-64 (hex) over spec, shards, keys and hashes: the identity of the data set.
    """

    shards: tuple[ShardRow, ...]
    shapes: tuple[SampleShape, ...]
    spec: dict[str, Any]
    hashes_name: str
    hashes_xxh3: str
    num_hashes: int
    num_samples: int
    dataset_hash: str


def write_index(folder: Path, *, rows: Iterable[SampleRow], shards: Sequence[ShardRow], spec: dict[str, Any]) -> Path:
    """Writes the index of a data set. Its last file is written last and atomically, so a folder with an index is whole.

    Args:
        folder: The data set's folder, next to its shards.
        rows: One per sample, in shard order; may be an iterator.
        shards: One per tar file.
        spec: ``DatasetSpec.model_dump(mode="json")``.
    Raises:
        DataError: Samples contradict their own shapes, lie in no shard, or share a key; the first of each rule is named.
    """
    numbers = {s.name: i for i, s in enumerate(shards)}
    shapes: dict[SampleShape, int] = {}

    def chunks() -> Iterator[RowChunk]:
        todo = iter(rows)
        while some := tuple(islice(todo, GROUP_ROWS)):
            for row in some:
                _check_row(row, spec=spec, shards=numbers)
            yield RowChunk(
                key=[r.key for r in some],
                shard=np.array([numbers[r.shard] for r in some], dtype=np.int32),
                shape=np.array([shapes.setdefault(r.shape, len(shapes)) for r in some], dtype=np.int16),
                latents_offset=np.array([r.latents_offset for r in some], dtype=np.int64),
                text_offset=np.array([r.text_offset for r in some], dtype=np.int64),
                text_tokens=np.array([r.text_tokens for r in some], dtype=np.int32),
                hashes=np.array([h for r in some for h in (*r.latents_frame_xxh3, r.text_xxh3)], dtype=np.uint64),
                caption=[r.caption for r in some],
                source=[r.source for r in some],
            )

    return write_index_chunks(folder, chunks=chunks(), shapes=shapes, shards=shards, spec=spec)


def write_index_chunks(
    folder: Path, *, chunks: Iterable[RowChunk], shapes: Iterable[SampleShape], shards: Sequence[ShardRow], spec: dict[str, Any]
) -> Path:
    """``write_index`` for writers of millions: in as much memory as a chunk takes, and 8 bytes per sample.

    Args:
        shapes: What ``RowChunk.shape`` counts; asked for after the last chunk.
    """
    folder = Path(folder)
    path, identity, ids = folder / INDEX_NAME, IdentityHash(), []
    num_hashes = 0
    with atomic_path(path) as partial:
        pending = folder / f"{partial.stem}.xxh3"  # gets its name, which is its content's, once that is known
        try:
            with open(pending, "wb") as flat, _parquet(partial) as writer:
                for chunk in chunks:
                    ids.append(np.fromiter((sample_id(k) for k in chunk.key), dtype=np.uint64, count=len(chunk.key)))
                    writer.write_table(_table(chunk, ids[-1]), row_group_size=GROUP_ROWS)
                    identity.add(keys=chunk.key, hashes=chunk.hashes)
                    num_hashes += _append(flat, chunk.hashes)
                assert ids, "an index without samples"
                check_distinct(np.concatenate(ids), path)
                _check_clips(shapes)
                header = {
                    "schema_version": SCHEMA_VERSION,
                    "spec": spec,
                    "shards": [asdict(s) for s in shards],
                    "shapes": [asdict(s) for s in shapes],
                    "hashes": {"name": f"index-{identity.hashes_xxh3}.xxh3", "xxh3": identity.hashes_xxh3, "count": num_hashes},
                    "dataset_hash": identity.dataset_hash(spec=spec, shards=shards),
                }
                writer.add_key_value_metadata({_META: json.dumps(header, sort_keys=True)})
            name = folder / f"index-{identity.hashes_xxh3}.xxh3"
            with atomic_path(name) as there:
                pending.rename(there)
        finally:
            pending.unlink(missing_ok=True)
    for other in folder.glob("index-*.xxh3"):  # of the index that was replaced
        if other != name:
            other.unlink()
    return path


def read_header(folder: Path) -> IndexHeader:
    """Reads what the footer of ``index.parquet`` says.

    Raises:
        DataError: No index, not an index of ours, another schema, or no samples.
    """
    path = Path(folder) / INDEX_NAME
    if not path.is_file():
        raise DataError(
            f"{path}: no such index; data.path must be a folder made by `opensora-dist data prepare` "
            "(an unfinished preparation has no index yet: run it again, it resumes)"
        )
    with damage_named(path):
        footer = pq.read_metadata(path)
    raw = (footer.metadata or {}).get(_META)
    foreign = DataError(f"{path}: not an index of opensora_dist; make one with `opensora-dist data prepare`")
    if raw is None:
        raise foreign
    with damage_named(path):
        header = json.loads(raw)
    if header["schema_version"] != SCHEMA_VERSION:
        raise DataError(f"{path}: schema version {header['schema_version']}, this release reads {SCHEMA_VERSION}; prepare again")
    if footer.schema.names != COLUMNS.names:
        raise foreign
    if footer.num_rows == 0:
        raise DataError(f"{path}: the index lists no sample; see the preparation's report for why each clip was dropped")
    with damage_named(path):
        return IndexHeader(
            shards=tuple(ShardRow(**s) for s in header["shards"]),
            shapes=tuple(SampleShape(clip=Thw(*s["clip"]), latent=Thw(*s["latent"]), dtype=s["dtype"]) for s in header["shapes"]),
            spec=header["spec"],
            hashes_name=header["hashes"]["name"],
            hashes_xxh3=header["hashes"]["xxh3"],
            num_hashes=header["hashes"]["count"],
            num_samples=footer.num_rows,
            dataset_hash=header["dataset_hash"],
        )


@contextmanager
def damage_named(path: Path) -> Iterator[None]:
    """What reading an index raises where its bytes are damaged, as advice.

    Raises:
        DataError: In place of errors of Parquet, JSON and the file system.
    """
    try:
        yield
    except (pa.ArrowException, OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path}: damaged or not a Parquet file ({error}); run `opensora-dist data prepare` again") from error


def open_hashes(folder: Path, header: IndexHeader) -> NDArray[np.uint64]:
    """The flat file of hashes, mapped: what is looked at is read, and no more.

    Raises:
        DataError: It is missing, or not as long as the index says.
    """
    path = Path(folder) / header.hashes_name
    if path.name != header.hashes_name:
        raise DataError(f"{folder}: the index names its hashes {header.hashes_name!r}, which is not a plain file name")
    have = path.stat().st_size if path.is_file() else None
    if have != 8 * header.num_hashes:
        found = "missing" if have is None else f"{have:,} bytes"
        raise DataError(
            f"{path}: {found}, expected {8 * header.num_hashes:,} bytes of hashes; copy it again from where the data set was made (it "
            f"belongs to {INDEX_NAME}), or run `opensora-dist data prepare` again"
        )
    return np.asarray(np.memmap(path, dtype="<u8", mode="r"))  # a slice of a memmap costs five of an array


def read_rows(folder: Path) -> Iterator[SampleRow]:
    """Every sample of an index, in order: for tools that look at all of it, a row group in memory at a time."""
    header = read_header(folder)
    hashes = open_hashes(folder, header)
    channels, width = int(header.spec["channels"]), int(header.spec["text_width"])
    first = 0
    with pq.ParquetFile(Path(folder) / INDEX_NAME) as file:
        for batch in file.iter_batches(batch_size=GROUP_ROWS):
            for row in batch.to_pylist():
                shape = header.shapes[row["shape"]]
                frames = tuple(hashes[first : first + shape.latent.t].tolist())
                text_xxh3 = int(hashes[first + shape.latent.t])
                first += shape.latent.t + 1
                yield SampleRow(
                    key=row["key"],
                    shard=header.shards[row["shard"]].name,
                    latents_offset=row["latents_offset"],
                    latents_bytes=shape.latents_bytes(channels),
                    latents_frame_xxh3=frames,
                    text_offset=row["text_offset"],
                    text_bytes=row["text_tokens"] * width * np.dtype(shape.dtype).itemsize,
                    text_xxh3=text_xxh3,
                    dtype=shape.dtype,
                    latent_t=shape.latent.t,
                    latent_h=shape.latent.h,
                    latent_w=shape.latent.w,
                    clip_t=shape.clip.t,
                    clip_h=shape.clip.h,
                    clip_w=shape.clip.w,
                    text_tokens=row["text_tokens"],
                    caption=row["caption"],
                    source=row["source"],
                )


def _parquet(path: Path) -> pq.ParquetWriter:
    """Numbers plain, so that they are copied rather than decoded; strings compressed."""
    compression = {name: "ZSTD" if name in STRINGS else "NONE" for name in COLUMNS.names}
    plain = {"use_dictionary": False, "write_statistics": False}
    return pq.ParquetWriter(path, COLUMNS, compression=compression, write_page_checksum=True, **plain)


def _table(chunk: RowChunk, ids: NDArray[np.uint64]) -> pa.Table:
    values = {name: getattr(chunk, name) for name in COLUMNS.names if name != "sample_id"} | {"sample_id": ids}
    return pa.table([pa.array(values[name], type=COLUMNS.field(name).type) for name in COLUMNS.names], schema=COLUMNS)


def _append(file: BinaryIO, hashes: NDArray[np.uint64]) -> int:
    file.write(np.ascontiguousarray(hashes, dtype="<u8").data)
    return len(hashes)


def _check_row(row: SampleRow, *, spec: dict[str, Any], shards: dict[str, int]) -> None:
    """What a reader takes for granted of one sample.

    Raises:
        DataError: The sample and the rule it breaks.
    """
    itemsize = np.dtype(row.dtype).itemsize if row.dtype in DTYPES else 0
    rules = {
        "its shard is not listed": row.shard not in shards,
        f"its precision is none of {', '.join(DTYPES)}": row.dtype not in DTYPES,
        "its latents' bytes do not match their shape": (
            row.latents_bytes != row.latent_t * row.latent_h * row.latent_w * int(spec["channels"]) * itemsize
        ),
        "its latents have not one hash per frame": len(row.latents_frame_xxh3) != row.latent_t,
        "its text's bytes do not match their tokens": row.text_bytes != row.text_tokens * int(spec["text_width"]) * itemsize,
    }
    for rule, broken in rules.items():
        if broken:
            raise DataError(f"sample {row.key!r}: {rule}; whoever writes this index must correct that")


def _check_clips(shapes: Iterable[SampleShape]) -> None:
    """
    Raises:
        DataError: Samples of one clip shape have latents of different shapes, so that they would not fit into one batch.
    """
    latents: dict[Thw, Thw] = {}
    for shape in shapes:
        if (other := latents.setdefault(shape.clip, shape.latent)) != shape.latent:
            raise DataError(
                f"clips of {shape.clip} have latents of {other} and of {shape.latent}; whoever writes this index must name clips that "
                "differ where their latents do"
            )
