"""The index of a prepared data set, opened for training: checked against the shards on disk, columns as arrays."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray
from pydantic import ValidationError

from opensora_dist.config.dataset import DatasetSpec
from opensora_dist.core.errors import DataError
from opensora_dist.core.index import INDEX_NAME, IndexFile, ShardRow, read_index
from opensora_dist.core.logging import get_logger
from opensora_dist.core.types import Thw
from opensora_dist.parallel import keys

_log = get_logger(__name__)
_DTYPES = ("float16", "float32")


@dataclass(frozen=True, kw_only=True)
class Span:
    """Where the arrays of one kind lie, and what their parts, of equal size, hash to.

    Args:
        offset: Byte offset in the shard, [N].
        num_bytes: Length, [N].
        num_parts: Parts, [N]: of latents the frames, of text the whole.
        first: Where the parts of each sample begin in ``xxh3``, [N].
        xxh3: xxh3-64 of each part's bytes, sample by sample.
    """

    offset: NDArray[np.int64]
    num_bytes: NDArray[np.int64]
    num_parts: NDArray[np.int64]
    first: NDArray[np.int64]
    xxh3: NDArray[np.uint64]


@dataclass(frozen=True, kw_only=True)
class Index:
    """A data set: what its samples are and where their bytes lie. A *row* is a sample's number in it.

    Args:
        folder: Where the shards are.
        spec: Codec, text encoder and latent statistics.
        dataset_hash: Identity of the data set, kept in checkpoints.
        shards: One entry per tar shard.
        key: Sample keys, [N].
        shard: Number of each sample's shard in ``shards``, [N].
        latents: Where the latents lie, each stored [t, C, h, w].
        text: Where the text vectors lie, each stored [tokens, width].
        dtype: numpy's name of the stored precision, [N].
        latent: Latent (t, h, w), [N, 3].
        clip: Clip (T, H, W) in pixels, [N, 3].
        text_tokens: Valid tokens, [N].
        buckets: Clip shape in pixels to the rows of that shape, ascending.
    """

    folder: Path
    spec: DatasetSpec
    dataset_hash: str
    shards: tuple[ShardRow, ...]
    key: NDArray[np.object_]
    shard: NDArray[np.int64]
    latents: Span
    text: Span
    dtype: NDArray[np.object_]
    latent: NDArray[np.int64]
    clip: NDArray[np.int64]
    text_tokens: NDArray[np.int64]
    buckets: dict[Thw, NDArray[np.int64]]

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
        file = read_index(folder)
        try:
            spec = DatasetSpec.model_validate(file.spec)
        except ValidationError as error:
            raise DataError(
                f"{folder / INDEX_NAME}: its data set description does not fit this release ({error}); "
                "run `opensora-dist data prepare` again"
            ) from error
        _check_shards(folder, file, max_lost=max_lost)
        names = pa.array([s.name for s in file.shards])
        shard = pc.index_in(file.table.column("shard"), value_set=names).to_numpy().astype(np.float64)
        clip = _triples(file.table, "clip")
        shapes, bucket_of = np.unique(clip, axis=0, return_inverse=True)
        index = cls(
            folder=folder,
            spec=spec,
            dataset_hash=file.dataset_hash,
            shards=file.shards,
            key=file.table.column("key").to_numpy(),
            shard=np.where(np.isnan(shard), -1, shard).astype(np.int64),  # a shard that isn't listed is null, refused below
            latents=_span(file.table, "latents", file.table.column("latents_frame_xxh3")),
            text=_span(file.table, "text", file.table.column("text_xxh3")),
            dtype=file.table.column("dtype").to_numpy(),
            latent=_triples(file.table, "latent"),
            clip=clip,
            text_tokens=file.table.column("text_tokens").to_numpy().astype(np.int64),
            buckets={Thw(*map(int, s)): np.flatnonzero(bucket_of.ravel() == i) for i, s in enumerate(shapes)},
        )
        index._check_samples()
        return index

    def __len__(self) -> int:
        return len(self.key)

    def sample_id(self, row: int) -> int:
        """The identity of a sample for keyed draws."""
        return keys.sample_id(self.key[row])

    def latent_shape(self, row: int) -> Thw:
        """Latent (t, h, w) of a sample."""
        return Thw(*map(int, self.latent[row]))

    def clip_shape(self, row: int) -> Thw:
        """Clip (T, H, W) of a sample, in pixels: its bucket."""
        return Thw(*map(int, self.clip[row]))

    def shard_path(self, row: int) -> Path:
        """The tar file a sample lies in."""
        return self.folder / self.shards[int(self.shard[row])].name

    def _check_samples(self) -> None:
        """Everything a reader relies on, for all rows at once, so that no damage shows as a wrong tensor later."""
        spec, itemsize = self.spec, np.where(self.dtype == "float16", 2, 4)
        shard_bytes = np.array([s.num_bytes for s in self.shards])[self.shard]
        _, first, counts = np.unique(self.key, return_index=True, return_counts=True)
        duplicate = np.zeros(len(self), dtype=bool)
        duplicate[first[counts > 1]] = True
        mixed = np.zeros(len(self), dtype=bool)
        for rows in self.buckets.values():
            mixed[rows] = (self.latent[rows] != self.latent[rows[0]]).any(axis=1)
        rules = {
            "its shard is not listed": self.shard < 0,
            f"its precision is none of {', '.join(_DTYPES)}": ~np.isin(self.dtype.astype(str), _DTYPES),
            "it has no text token (an empty caption has one)": self.text_tokens < 1,
            "its latents' bytes do not match their shape": (
                self.latents.num_bytes != self.latent.prod(axis=1) * spec.channels * itemsize
            ),
            "its latents have not one hash per frame": self.latents.num_parts != self.latent[:, 0],
            "its text's bytes do not match their tokens": self.text.num_bytes != self.text_tokens * spec.text_width * itemsize,
            "its bytes lie outside its shard": (
                (np.minimum(self.latents.offset, self.text.offset) < 0)
                | (self.latents.offset + self.latents.num_bytes > shard_bytes)
                | (self.text.offset + self.text.num_bytes > shard_bytes)
            ),
            "another sample has the same key": duplicate,
            "its latents have another shape than those of its clip shape": mixed,
        }
        problems = [f"{bad.sum()} samples, first {self.key[bad.argmax()]!r}: {rule}" for rule, bad in rules.items() if bad.any()]
        if not (len(spec.latent_mean) == len(spec.latent_std) == spec.channels and min(spec.latent_std) > 0):
            problems.append(f"latent_mean and latent_std must hold {spec.channels} values each, all of latent_std positive")
        if problems:
            raise DataError(
                f"{self.folder / INDEX_NAME}: contradicts itself: {'; '.join(problems)}. Run `opensora-dist data prepare` again"
            )


def _triples(table: pa.Table, name: str) -> NDArray[np.int64]:
    return np.stack([table.column(f"{name}_{axis}").to_numpy() for axis in "thw"], axis=1).astype(np.int64)


def _span(table: pa.Table, name: str, hashes: pa.ChunkedArray) -> Span:
    num_parts = np.ones(len(table), dtype=np.int64)
    if pa.types.is_list(hashes.type):
        num_parts = pc.list_value_length(hashes).to_numpy().astype(np.int64)
        hashes = pc.list_flatten(hashes)
    offset, num_bytes = (table.column(f"{name}_{part}").to_numpy() for part in ("offset", "bytes"))
    first = np.cumsum(num_parts) - num_parts
    return Span(offset=offset, num_bytes=num_bytes, num_parts=num_parts, first=first, xxh3=hashes.to_numpy())


def _check_shards(folder: Path, file: IndexFile, *, max_lost: int) -> None:
    """Sizes only: hashing whole shards at start would read the data set twice. Every read is checked by its own hash."""
    problems, there = [] if file.shards else ["none is listed"], {}
    for shard in file.shards:
        path = folder / shard.name
        if path.name != shard.name:
            problems.append(f"{shard.name!r}: not a plain file name")
        elif not path.is_file():
            problems.append(f"{shard.name}: missing")
        else:
            there[shard.name] = path.stat().st_size
            if there[shard.name] != shard.num_bytes:
                problems.append(f"{shard.name}: {there[shard.name]:,} bytes, expected {shard.num_bytes:,}")
    if not problems:
        return
    lost = _lost(file.table, there)
    said = f"{folder}: {len(problems)} of {len(file.shards)} shards are not as the index says: {'; '.join(problems)}"
    if max_lost == 0 or lost > max_lost:
        limit = f", more than resilience.max_bad_samples={max_lost}" if max_lost else ""
        raise DataError(
            f"{said}. {lost:,} samples are lost with them{limit}. Copy them again from where the data set was made, or run "
            "`opensora-dist data prepare` again"
        )
    _log.warning("%s. %d samples are lost with them; others will take their places", said, lost)


def _lost(table: pa.Table, there: Mapping[str, int]) -> int:
    """Samples that end beyond what is there of their shard, in bytes."""
    ends = np.maximum(
        *((table.column(f"{name}_offset").to_numpy() + table.column(f"{name}_bytes").to_numpy()) for name in ("latents", "text"))
    )
    have = np.array([there.get(name, 0) for name in table.column("shard").to_pylist()])
    return int((ends > have).sum())
