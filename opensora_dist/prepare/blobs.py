"""Encoded arrays between encoding and their shard: a content-addressed safetensors file each, or their place in a finished shard.

Disk holds an array once: its file is removed as soon as a finished shard holds it, and from there it is read back when another choice of
clips needs other shards. So a changed threshold encodes nothing again.
"""

# t C h w latents; Y E text vectors

from __future__ import annotations

import os
import uuid
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import xxhash
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load, save

Array = NDArray[np.floating]


def hash_array(array: Array) -> str:
    """xxh3-64 of an array's bytes, as 16 hex digits."""
    return xxhash.xxh3_64_hexdigest(np.ascontiguousarray(array).data)


@dataclass(frozen=True, kw_only=True)
class InShard:
    """Where in a finished shard an array's bytes are."""

    path: Path
    offset: int
    shape: tuple[int, ...]
    dtype: str


class Blobs:
    """The arrays of an output folder, by key.

    Files are renamed into place, so that a kill leaves no half of one. They are not synced: an array is checked against its hash as it is
    read, and encoded again where a power cut took it.

    Args:
        folder: ``.prepare/encoded``.
        in_shards: The arrays of finished shards.
    """

    def __init__(self, folder: Path, *, in_shards: dict[str, InShard]) -> None:
        self._folder, self._in_shards = folder, in_shards
        self._files = {path.stem for path in folder.glob("*/*.safetensors")}

    def __contains__(self, key: str) -> bool:
        return key in self._files or key in self._in_shards

    def put(self, key: str, array: Array) -> None:
        """Writes a file, atomically."""
        path = self._path(key)
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f".{key}.partial-{uuid.uuid4().hex[:8]}")
        try:
            partial.write_bytes(save({"array": np.ascontiguousarray(array)}))
            os.replace(partial, path)
        finally:
            partial.unlink(missing_ok=True)
        self._files.add(key)

    def read(self, key: str, *, xxh3: str) -> Array | None:
        """The array, or None where it is gone or not what was written."""
        for array in (self._from_file(key), self._from_shard(key)):
            if array is not None and hash_array(array) == xxh3:
                return array
        return None

    def now_in_shard(self, places: dict[str, InShard]) -> None:
        """Arrays are in a finished shard: their files go."""
        self._in_shards |= places
        self.discard(places)

    def put_aside(self, key: str) -> None:
        """An array's shard is about to go: it gets a file again. One that can't be read is encoded again when it is needed."""
        array = self._from_shard(key)
        if array is not None and key not in self._files:
            self.put(key, array)
        self._in_shards.pop(key, None)

    def forget(self, key: str) -> None:
        """An array can't be read: it is to be encoded again."""
        self._in_shards.pop(key, None)
        self.discard([key])

    def discard(self, keys: Iterable[str]) -> None:
        """Removes the files of these keys."""
        for key in [key for key in keys if key in self._files]:
            self._path(key).unlink(missing_ok=True)
            self._files.remove(key)

    def files(self) -> frozenset[str]:
        """Keys of the arrays that have a file."""
        return frozenset(self._files)

    def _path(self, key: str) -> Path:
        return self._folder / key[:2] / f"{key}.safetensors"

    def _from_file(self, key: str) -> Array | None:
        if key not in self._files:
            return None
        try:
            array: Array = load(self._path(key).read_bytes())["array"]
        except (OSError, SafetensorError, KeyError):
            return None
        return array

    def _from_shard(self, key: str) -> Array | None:
        place = self._in_shards.get(key)
        if place is None:
            return None
        num_values = int(np.prod(place.shape))
        try:
            with open(place.path, "rb") as handle:
                handle.seek(place.offset)
                array = np.fromfile(handle, dtype=place.dtype, count=num_values)
        except OSError:
            return None
        return array.reshape(place.shape) if len(array) == num_values else None
