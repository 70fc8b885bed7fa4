"""Writes small prepared data sets with plain tarfile and numpy, independent of the code that prepares real ones."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import xxhash

from opensora_dist.config.codec import DctCodecConfig, HashTextConfig
from opensora_dist.config.dataset import DatasetSpec
from opensora_dist.core.index import SampleRow, ShardRow, write_index
from opensora_dist.core.io import hash_file

SPEC = DatasetSpec(
    codec=DctCodecConfig(channels=4),
    text=HashTextConfig(width=8, max_tokens=6),
    channels=4,
    spatial_factor=8,
    temporal_factor=1,
    text_width=8,
    max_tokens=6,
    latent_mean=(0.5, -1.0, 2.0, 0.0),
    latent_std=(2.0, 0.5, 1.0, 4.0),
    fps=8.0,
    buckets=((1, 32, 32),),
)


@dataclass(frozen=True)
class Written:
    """What was stored for one sample, and where."""

    row: SampleRow
    latents: np.ndarray  # [t, C, h, w]
    text: np.ndarray  # [tokens, width]


def write_dataset(
    folder: Path,
    *,
    samples: Mapping[tuple[int, int, int], int],
    spec: DatasetSpec = SPEC,
    dtype: str = "float16",
    shard_samples: int = 5,
    seed: int = 0,
) -> dict[str, Written]:
    """Writes a data set of random latents and text.

    Args:
        folder: Where to; made if missing.
        samples: Clip shape (frames, height, width) in pixels to how many samples of it; shapes are mixed within shards.
        dtype: Stored precision.
        shard_samples: Samples per tar.
    Returns:
        Key to what was written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    clips = [clip for clip, count in samples.items() for _ in range(count)]
    rng.shuffle(clips)
    written: dict[str, Written] = {}
    spec = spec.model_copy(update={"buckets": tuple(sorted(samples, key=lambda clip: -samples[clip]))})
    shards = []
    for start in range(0, len(clips), shard_samples):
        name = f"shard-{start // shard_samples:05d}.tar"
        arrays = {}
        for i, (t, h, w) in enumerate(clips[start : start + shard_samples], start):
            latent = (t // spec.temporal_factor, spec.channels, h // spec.spatial_factor, w // spec.spatial_factor)
            tokens = int(rng.integers(1, spec.max_tokens + 1))
            mean, std = (np.array(v)[:, None, None] for v in (spec.latent_mean, spec.latent_std))
            arrays[f"clip-{i:05d}"] = (
                (rng.normal(size=latent) * std + mean).astype(dtype),
                rng.normal(size=(tokens, spec.text_width)).astype(dtype),
            )
        _write_tar(folder / name, arrays)
        offsets = _payload_offsets(folder / name)
        for i, (key, (latents, text)) in enumerate(arrays.items(), start):
            row = SampleRow(
                key=key,
                shard=name,
                latents_offset=offsets[f"{key}.latents.npy"],
                latents_bytes=latents.nbytes,
                latents_frame_xxh3=tuple(xxhash.xxh3_64_intdigest(frame.tobytes()) for frame in latents),
                text_offset=offsets[f"{key}.text.npy"],
                text_bytes=text.nbytes,
                text_xxh3=xxhash.xxh3_64_intdigest(text.tobytes()),
                dtype=dtype,
                latent_t=latents.shape[0],
                latent_h=latents.shape[2],
                latent_w=latents.shape[3],
                clip_t=clips[i][0],
                clip_h=clips[i][1],
                clip_w=clips[i][2],
                text_tokens=len(text),
                caption=f"caption of {key}",
                source=f"{key}.mp4",
            )
            written[key] = Written(row=row, latents=latents, text=text)
        path = folder / name
        shards.append(ShardRow(name=name, num_bytes=path.stat().st_size, num_samples=len(arrays), xxh3=hash_file(path)))
    write_index(folder, rows=[w.row for w in written.values()], shards=shards, spec=spec.model_dump(mode="json"))
    return written


def _write_tar(path: Path, arrays: Mapping[str, tuple[np.ndarray, np.ndarray]]) -> None:
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for key, pair in arrays.items():
            for kind, array in zip(("latents", "text"), pair, strict=True):
                buffer = io.BytesIO()
                np.save(buffer, array)
                info = tarfile.TarInfo(f"{key}.{kind}.npy")
                info.size = buffer.tell()
                buffer.seek(0)
                tar.addfile(info, buffer)


def _payload_offsets(path: Path) -> dict[str, int]:
    """Offset of each member's array bytes, past the .npy header."""
    offsets = {}
    with tarfile.open(path) as tar:
        for member in tar:
            handle = tar.extractfile(member)
            assert handle is not None
            np.lib.format.read_magic(handle)
            np.lib.format.read_array_header_1_0(handle)
            offsets[member.name] = member.offset_data + handle.tell()
    return offsets
