"""WebDataset tar shards whose every byte follows from their samples, and where in them each array lies."""

# t C h w latent frames, channels, height, width; Y text tokens, E text width

from __future__ import annotations

import io
import json
import os
import re
import tarfile
import uuid
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import xxhash
from numpy.typing import NDArray

from opensora_dist.core.index import SampleRow, ShardRow
from opensora_dist.core.io import fsync, hash_bytes, hash_file
from opensora_dist.core.types import Thw

_SLUG_CHARS = 48  # with the hash and the longest extension well below the 100 characters of a USTAR name


def sample_key(name: str, *, span_s: tuple[float, float] | None = None) -> str:
    """The key of a clip: readable, unique, and free of what tar and webdataset give a meaning to ("." ends a key, "/" nests).

    It depends on the clip alone, so a sample keeps its identity (and its noise) when others come and go.

    Args:
        name: Of the source.
        span_s: Where in it the clip begins and ends; None where a source has one clip, from its start.
    """
    slug = re.sub(r"[^A-Za-z0-9_]+", "-", name.rsplit(".", 1)[0])[-_SLUG_CHARS:].strip("-")
    if span_s is None:
        return f"{slug}-{hash_bytes(name.encode())}".lstrip("-")
    identity = f"{name}\0{span_s[0]:.6f}-{span_s[1]:.6f}"
    return f"{slug}-{round(1000 * span_s[0]):07d}-{hash_bytes(identity.encode())}".lstrip("-")


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One sample as it is stored. Both arrays have the same dtype."""

    key: str
    latents_tChw: NDArray[np.floating]
    text_YE: NDArray[np.floating]
    caption: str
    source: str
    clip: Thw
    fps: float


class ShardWriter:
    """Writes one shard under a partial name; ``finish`` puts it under its own, ``discard`` leaves nothing.

    Members of a sample: ``<key>.latents.npy`` [t, C, h, w], ``<key>.text.npy`` [Y, E], ``<key>.json``.

    Args:
        path: Where the finished shard goes.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._partial = path.with_name(f".{path.stem}.partial-{uuid.uuid4().hex[:8]}{path.suffix}")
        self._file = open(self._partial, "wb")  # noqa: SIM115 - open for as long as the shard, closed by finish or discard
        self._tar = tarfile.TarFile(fileobj=self._file, mode="w", format=tarfile.USTAR_FORMAT)
        self.num_samples = 0

    def add(self, sample: Sample) -> SampleRow:
        """Appends a sample, and says where it lies."""
        assert sample.latents_tChw.dtype == sample.text_YE.dtype, (sample.latents_tChw.dtype, sample.text_YE.dtype)
        latents, text = np.ascontiguousarray(sample.latents_tChw), np.ascontiguousarray(sample.text_YE)
        latents_offset = self._add_array(f"{sample.key}.latents.npy", latents)
        text_offset = self._add_array(f"{sample.key}.text.npy", text)
        about: dict[str, Any] = {
            "caption": sample.caption,
            "source": sample.source,
            "fps": sample.fps,
            "clip": list(sample.clip),
            "latents": list(latents.shape),
            "text": list(text.shape),
        }
        self._add_member(f"{sample.key}.json", json.dumps(about, sort_keys=True, ensure_ascii=False).encode())
        self.num_samples += 1
        t, _, h, w = latents.shape
        return SampleRow(
            key=sample.key,
            shard=self.path.name,
            latents_offset=latents_offset,
            latents_bytes=latents.nbytes,
            latents_frame_xxh3=tuple(xxhash.xxh3_64_intdigest(frame.data) for frame in latents),
            text_offset=text_offset,
            text_bytes=text.nbytes,
            text_xxh3=xxhash.xxh3_64_intdigest(text.data),
            dtype=latents.dtype.name,
            latent_t=t,
            latent_h=h,
            latent_w=w,
            clip_t=sample.clip.t,
            clip_h=sample.clip.h,
            clip_w=sample.clip.w,
            text_tokens=len(text),
            caption=sample.caption,
            source=sample.source,
        )

    def finish(self) -> ShardRow:
        """Makes the shard durable under its name."""
        self._tar.close()
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        row = ShardRow(
            name=self.path.name,
            num_bytes=self._partial.stat().st_size,
            num_samples=self.num_samples,
            xxh3=hash_file(self._partial),
        )
        os.replace(self._partial, self.path)
        fsync(self.path.parent)
        return row

    def discard(self) -> None:
        """Removes what was written; nothing happens after ``finish``."""
        self._partial.unlink(missing_ok=True)  # first: closing flushes, which may fail on a full disk
        with suppress(OSError):
            self._file.close()

    def _add_array(self, name: str, array: NDArray[np.floating]) -> int:
        """Appends a .npy file; the offset of its first element, past tar's and .npy's headers."""
        buffer = io.BytesIO()
        np.save(buffer, array, allow_pickle=False)
        header_bytes = buffer.tell() - array.nbytes
        return self._add_member(name, buffer.getvalue()) + header_bytes

    def _add_member(self, name: str, payload: bytes) -> int:
        """Appends a file; the offset of its first byte. TarInfo's defaults have no time, owner or mode of this machine."""
        info = tarfile.TarInfo(name)
        info.size = len(payload)
        offset = self._tar.offset + tarfile.BLOCKSIZE  # USTAR headers are one block
        self._tar.addfile(info, io.BytesIO(payload))
        return offset
