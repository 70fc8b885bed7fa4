"""A prepared data set, or several as one, opened for training: checked against the shards on disk, columns as arrays."""

from __future__ import annotations

import os
import stat
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import accumulate
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import xxhash
from numpy.typing import NDArray
from pydantic import ValidationError

from opensora_dist.config.dataset import DatasetSpec
from opensora_dist.core.errors import DataError
from opensora_dist.core.identity import IdentityHash
from opensora_dist.core.index import (
    DTYPES,
    INDEX_NAME,
    IndexHeader,
    SampleShape,
    ShardRow,
    damage_named,
    open_hashes,
    read_header,
)
from opensora_dist.core.io import sample_id
from opensora_dist.core.logging import get_logger
from opensora_dist.core.types import Thw
from opensora_dist.data.numbers import Numbers, ends_of, read_numbers
from opensora_dist.data.remote import Located
from opensora_dist.data.shards import JoinedShards, LocalShards, ShardSource
from opensora_dist.data.strings import Strings, StringsOf

_log = get_logger(__name__)


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where the bytes of an array lie in a shard."""

    offset: int
    num_bytes: int


@dataclass(frozen=True, kw_only=True)
class DataSet:
    """One data set of an index.

    Args:
        at: Where its index and its shards are.
        name: What its samples' keys begin with, where there are several.
        weight: Its share of the samples that are trained on, relative to others; None: how many it has.
    """

    at: Located
    name: str = ""
    weight: float | None = None

    @property
    def folder(self) -> Path:
        """Of its index."""
        return self.at.folder

    @property
    def prefix(self) -> str:
        """Of its keys."""
        return f"{self.name}/" if self.name else ""


@dataclass(frozen=True, kw_only=True)
class Index:
    """What the samples are and where their bytes lie. A *row* is a sample's number in it.

    Args:
        sets: The data sets, in the order of their rows.
        set_starts: At which row each begins; one more at the end.
        spec: Codec, text encoder and latent statistics.
        dataset_hash: Identity of all of it, kept in checkpoints.
        shards: One entry per tar shard, of all data sets.
        shapes: The shapes samples have.
        numbers: What is known of each row.
        hashes: Of the parts of samples, one file per data set.
        key: Sample keys, read from the file when asked.
        captions: What each sample says, likewise.
        sources: The video each sample is from, likewise.
        shard_source: Opens shards by number.
        shard_sets: The data set of each shard.
        buckets: Clip shape in pixels to the rows of that shape, ascending.
    """

    sets: tuple[DataSet, ...]
    set_starts: tuple[int, ...]
    spec: DatasetSpec
    dataset_hash: str
    shards: tuple[ShardRow, ...]
    shapes: tuple[SampleShape, ...]
    numbers: Numbers
    hashes: tuple[NDArray[np.uint64], ...]
    key: Strings
    captions: Strings
    sources: Strings
    shard_source: ShardSource
    shard_sets: NDArray[np.int32]
    buckets: dict[Thw, NDArray[np.int32]]

    @classmethod
    def open(cls, folder: Path | str, *, max_lost: int = 0) -> Index:
        """Reads the index of ``folder`` and checks that the shards it names are there, whole by size, and hold what it says.

        Args:
            max_lost: Shards may be missing or of another size where no more samples than this lie in what is gone; they are warned of.
        Raises:
            DataError: No index, not one of ours, shards missing or of another size (all of them named), or samples that
                contradict the index's own spec.
        """
        folder = Path(folder)
        at = Located(folder=folder, remote=False, open_shards=partial(LocalShards.beside, folder))
        return cls.join([DataSet(at=at)], max_lost=max_lost)

    @classmethod
    def join(cls, sets: Sequence[DataSet], *, spec: DatasetSpec | None = None, max_lost: int = 0) -> Index:
        """Several data sets as one, row after row.

        Args:
            spec: What they have in common; default: the spec of the first.
            max_lost: As in ``open``, over all of them.
        Raises:
            DataError: As in ``open``, of the first that can't be used.
        """
        headers = [read_header(s.folder) for s in sets]
        specs = [read_spec(s.folder, h) for s, h in zip(sets, headers)]
        starts = list(accumulate((h.num_samples for h in headers), initial=0))
        shard_starts = list(accumulate((len(h.shards) for h in headers), initial=0))
        shapes = tuple(dict.fromkeys(shape for h in headers for shape in h.shapes))
        numbers = Numbers.empty(starts[-1])
        for i, (one, header) in enumerate(zip(sets, headers)):
            mine = numbers.rows(starts[i], starts[i + 1])
            read_numbers(one.folder, header, specs[i], mine)
            mine.shard[:] += shard_starts[i]
            mine.shape[:] = np.array([shapes.index(s) for s in header.shapes], dtype=np.int16)[mine.shape]
            if one.name:
                mine.sample_id[:] = _renamed(mine.sample_id, one.name)
        identity = "/".join(f"{s.prefix}{h.dataset_hash}" for s, h in zip(sets, headers))
        parts = [StringsOf(path=s.folder / INDEX_NAME, num_samples=h.num_samples) for s, h in zip(sets, headers)]
        keyed = [replace(p, prefix=s.prefix) for p, s in zip(parts, sets)]
        index = cls(
            sets=tuple(sets),
            set_starts=tuple(starts),
            spec=specs[0] if spec is None else spec,
            dataset_hash=headers[0].dataset_hash if len(sets) == 1 else xxhash.xxh3_64_hexdigest(identity.encode()),
            shards=tuple(shard for h in headers for shard in h.shards),
            shapes=shapes,
            numbers=numbers,
            hashes=tuple(open_hashes(s.folder, h) for s, h in zip(sets, headers)),
            key=Strings(keyed, "key"),
            captions=Strings(parts, "caption"),
            sources=Strings(parts, "source"),
            shard_source=JoinedShards([s.at.open_shards(h.shards) for s, h in zip(sets, headers)], shard_starts),
            shard_sets=np.repeat(np.arange(len(sets), dtype=np.int32), [len(h.shards) for h in headers]),
            buckets=_buckets(numbers.shape, shapes),
        )
        index._check_shards(max_lost=max_lost)
        return index

    def with_spec(self, spec: DatasetSpec) -> Index:
        """The same samples, described by another spec."""
        return replace(self, spec=spec)

    def __len__(self) -> int:
        return self.set_starts[-1]

    @property
    def folder(self) -> Path:
        """Where the first data set's index is."""
        return self.sets[0].folder

    @property
    def where(self) -> str:
        """What errors call it."""
        return ", ".join(str(s.folder) for s in self.sets)

    @property
    def shard(self) -> NDArray[np.int32]:
        """Number of each row's shard in ``shards``, [N]."""
        return self.numbers.shard

    @property
    def text_tokens(self) -> NDArray[np.int32]:
        """Valid tokens, [N]."""
        return self.numbers.text_tokens

    @property
    def sample_ids(self) -> NDArray[np.uint64]:
        """The identity of each row for keyed draws, [N]: a hash of its key (of several data sets, of key and name)."""
        return self.numbers.sample_id

    def sample_id(self, row: int) -> int:
        """The identity of a sample for keyed draws."""
        return int(self.numbers.sample_id[row])

    def caption(self, row: int) -> str:
        """What a sample says; read from the file."""
        return self.captions[row]

    def source(self, row: int) -> str:
        """The video a sample is from; read from the file."""
        return self.sources[row]

    def latent_shape(self, row: int) -> Thw:
        """Latent (t, h, w) of a sample."""
        return self.shapes[int(self.numbers.shape[row])].latent

    def clip_shape(self, row: int) -> Thw:
        """Clip (T, H, W) of a sample, in pixels: its bucket."""
        return self.shapes[int(self.numbers.shape[row])].clip

    def latent_of(self, bucket: Thw) -> Thw:
        """Latent (t, h, w) of the samples of a bucket."""
        return self.latent_shape(int(self.buckets[bucket][0]))

    def dtype(self, row: int) -> np.dtype[np.floating]:
        """Stored precision of a sample's latents and text."""
        return np.dtype(self.shapes[int(self.numbers.shape[row])].dtype)

    def shard_path(self, row: int) -> Path:
        """The tar file a sample lies in; for people (of a remote one it may be a URL), and for tests."""
        return Path(self.shard_source.path_of(int(self.numbers.shard[row])))

    def latents_place(self, row: int) -> Place:
        """Where a sample's latents lie, stored [t, C, h, w]."""
        num_bytes = self.shapes[int(self.numbers.shape[row])].latents_bytes(self.spec.channels)
        return Place(offset=int(self.numbers.latents_offset[row]), num_bytes=num_bytes)

    def text_place(self, row: int) -> Place:
        """Where a sample's text vectors lie, stored [tokens, width]."""
        num_bytes = int(self.numbers.text_tokens[row]) * self.spec.text_width * self.dtype(row).itemsize
        return Place(offset=int(self.numbers.text_offset[row]), num_bytes=num_bytes)

    def frame_hashes(self, row: int) -> NDArray[np.uint64]:
        """xxh3-64 of each latent frame's bytes, [t]."""
        return self._hashes(row)[:-1]

    def text_hash(self, row: int) -> int:
        """xxh3-64 of the text's bytes."""
        return int(self._hashes(row)[-1])

    def _hashes(self, row: int) -> NDArray[np.uint64]:
        first, frames = int(self.numbers.first_hash[row]), self.latent_shape(row).t
        return self.hashes[int(self.shard_sets[self.numbers.shard[row]])][first : first + frames + 1]

    def _check_shards(self, *, max_lost: int) -> None:
        """Sizes only: hashing whole shards at start would read the data set twice. Every read is checked by its own hash."""
        problems, there = [], np.array([s.num_bytes for s in self.shards])
        for number, shard in enumerate(self.shards):
            one = self.sets[self.shard_sets[number]]
            if one.at.remote:
                continue
            size = _size(self.shard_source.path_of(number))
            if size != shard.num_bytes:
                there[number] = size or 0
                found = "missing" if size is None else f"{size:,} bytes, expected {shard.num_bytes:,}"
                problems.append(f"{one.prefix}{shard.name}: {found}")
        if not problems:
            return
        lost = int((self._ends() > there[self.numbers.shard]).sum())
        said = f"{self.where}: {len(problems)} of {len(self.shards)} shards are not as the index says: {'; '.join(problems)}"
        if max_lost == 0 or lost > max_lost:
            limit = f", more than resilience.max_bad_samples={max_lost}" if max_lost else ""
            raise DataError(
                f"{said}. {lost:,} samples are lost with them{limit}. Copy them again from where the data set was made, or run "
                "`opensora-dist data prepare` again"
            )
        _log.warning("%s. %d samples are lost with them; others will take their places", said, lost)

    def _ends(self) -> NDArray[np.int64]:
        return ends_of(self.numbers, self.shapes, self.spec)


def read_spec(folder: Path, header: IndexHeader) -> DatasetSpec:
    """What a data set is made of.

    Raises:
        DataError: It is described as this release does not, or latent statistics make no sense.
    """
    path = Path(folder) / INDEX_NAME
    try:
        spec = DatasetSpec.model_validate(header.spec)
    except ValidationError as error:
        raise DataError(
            f"{path}: its data set description does not fit this release ({error}); run `opensora-dist data prepare` again"
        ) from error
    problems = []
    if not (len(spec.latent_mean) == len(spec.latent_std) == spec.channels and min(spec.latent_std) > 0):
        problems.append(f"latent_mean and latent_std must hold {spec.channels} values each, all of latent_std positive")
    problems += [
        f"{s.name!r}: not a plain file name" for s in header.shards if s.name.startswith("/") or ".." in s.name.split("/")
    ]
    if not header.shards:
        problems.append("no shard is listed")
    problems += [
        f"precision {s.dtype!r} of {s.clip} is none of {', '.join(DTYPES)}" for s in header.shapes if s.dtype not in DTYPES
    ]
    latents: dict[Thw, Thw] = {}
    for shape in header.shapes:
        if latents.setdefault(shape.clip, shape.latent) != shape.latent:
            problems.append(f"clips of {shape.clip} have latents of {latents[shape.clip]} and of {shape.latent}")
    if problems:
        raise DataError(f"{path}: contradicts itself: {'; '.join(problems)}. Run `opensora-dist data prepare` again")
    return spec


def verify_index(folder: Path) -> list[str]:
    """Checks what opening takes on trust, by reading all of an index: keys, identities, hashes. Shards are not looked at.

    Returns:
        What is wrong with it.
    Raises:
        DataError: It can't be opened.
    """
    header = read_header(folder)
    hashes, identity, first, wrong = open_hashes(folder, header), IdentityHash(), 0, 0
    frames = np.array([shape.latent.t for shape in header.shapes])
    ids = []
    path = Path(folder) / INDEX_NAME
    with damage_named(path), pq.ParquetFile(path, page_checksum_verification=True) as file:
        for batch in file.iter_batches():  # of all columns, for their checksums
            keys = batch.column("key").to_pylist()
            ids.append(batch.column("sample_id").to_numpy())
            wrong += sum(sample_id(key) != found for key, found in zip(keys, ids[-1].tolist(), strict=True))
            count = int((frames[batch.column("shape").to_numpy()] + 1).sum())
            identity.add(keys=keys, hashes=hashes[first : first + count])
            first += count
    problems = []
    all_ids = np.concatenate([np.empty(0, np.uint64), *ids])
    if same := len(all_ids) - len(np.unique(all_ids)):
        problems.append(f"{same} samples have the key of another sample")
    if wrong:
        problems.append(f"{wrong} samples have another identity than the hash of their key")
    if first != header.num_hashes:
        problems.append(f"its samples have {first:,} hashes, {header.hashes_name} holds {header.num_hashes:,}")
    if identity.hashes_xxh3 != header.hashes_xxh3:
        problems.append(f"{header.hashes_name} has xxh3 {identity.hashes_xxh3}, expected {header.hashes_xxh3}")
    elif identity.dataset_hash(spec=header.spec, shards=header.shards) != header.dataset_hash:
        problems.append(f"its content is not that of the data set hash {header.dataset_hash}")
    return problems


def _size(path: str) -> int | None:
    """Of a file; None where none is."""
    try:
        status = os.stat(path)
    except OSError:
        return None
    return status.st_size if stat.S_ISREG(status.st_mode) else None


def _buckets(shape: NDArray[np.int16], shapes: Sequence[SampleShape]) -> dict[Thw, NDArray[np.int32]]:
    """The rows of each clip shape, ascending."""
    clips = sorted({s.clip for s in shapes})
    bucket = np.array([clips.index(s.clip) for s in shapes], dtype=np.int16)[shape]
    by_bucket = np.argsort(bucket, kind="stable").astype(np.int32)
    ends = np.cumsum(np.bincount(bucket, minlength=len(clips)))
    parts = np.split(by_bucket, ends[:-1])
    return {clip: rows for clip, rows in zip(clips, parts, strict=True) if len(rows)}


def _renamed(ids: NDArray[np.uint64], name: str) -> NDArray[np.uint64]:
    """Identities of the samples of one data set of several: of two that name a sample alike, each has its own."""
    mixed = ids ^ np.uint64(sample_id(name))
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):  # splitmix64
        mixed = (mixed ^ (mixed >> np.uint64(shift))) * np.uint64(factor)
    return (mixed ^ (mixed >> np.uint64(31))) >> np.uint64(1)
