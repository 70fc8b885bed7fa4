"""Writes indexes without shards, for tests of what is decided by the index alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from dataset_factory import SPEC

from opensora_dist.core.index import RowChunk, SampleShape, ShardRow, write_index_chunks
from opensora_dist.core.types import Thw
from opensora_dist.data.index import DataSet, Index
from opensora_dist.data.remote import Located
from opensora_dist.data.shards import LocalShards


def write_only_index(folder: Path, samples: Mapping[Thw, int], *, shard_samples: int = 10, seed: int = 0) -> Path:
    """An index of so many samples of each clip shape, in shards of one shape; latents are of a frame per frame, 8 pixels each way."""
    shapes = [SampleShape(clip=clip, latent=Thw(clip.t, clip.h // 8, clip.w // 8), dtype="float16") for clip in samples]
    rng = np.random.default_rng(seed)
    shape = np.repeat(np.arange(len(shapes)), list(samples.values())).astype(np.int16)
    inside = np.concatenate([np.arange(count) for count in samples.values()])
    starts = np.concatenate([[True], (np.diff(shape) != 0) | (inside[1:] % shard_samples == 0)])
    shard = (np.cumsum(starts) - 1).astype(np.int32)
    count = len(shape)
    chunk = RowChunk(
        key=[f"{folder.name}-{i:06d}" for i in range(count)],
        shard=shard,
        shape=shape,
        latents_offset=np.zeros(count, dtype=np.int64),
        text_offset=np.zeros(count, dtype=np.int64),
        text_tokens=rng.integers(1, SPEC.max_tokens + 1, count).astype(np.int32),
        hashes=np.zeros(sum(shapes[s].latent.t + 1 for s in shape), dtype=np.uint64),
        caption=["c"] * count,
        source=["s"] * count,
    )
    shards = [
        ShardRow(name=f"{i}.tar", num_bytes=1 << 40, num_samples=int((shard == i).sum()), xxh3="0") for i in range(shard[-1] + 1)
    ]
    spec = SPEC.model_copy(update={"buckets": tuple(tuple(clip) for clip in samples)})
    folder.mkdir(parents=True, exist_ok=True)
    write_index_chunks(folder, chunks=[chunk], shapes=shapes, shards=shards, spec=spec.model_dump(mode="json"))
    return folder


def open_only_index(folders: Sequence[Path], *, weights: Sequence[float | None] | None = None) -> Index:
    """One or several of them, whose shards nobody looks for."""
    names = [folder.name for folder in folders] if len(folders) > 1 else [""]
    given = weights or [None] * len(folders)
    sets = [
        DataSet(at=Located(folder=f, remote=True, open_shards=lambda _rows: LocalShards([])), name=name, weight=weight)
        for f, name, weight in zip(folders, names, given, strict=True)
    ]
    return Index.join(sets)
