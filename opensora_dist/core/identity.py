"""What makes a data set and its samples what they are: hashes of content, and keys of which each is one sample's."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import xxhash
from numpy.typing import NDArray

from opensora_dist.core.errors import DataError

if TYPE_CHECKING:
    from _typeshed import DataclassInstance


class IdentityHash:
    """The hash that makes a data set what it is, fed as it is written or verified."""

    def __init__(self) -> None:
        self._keys, self._hashes = xxhash.xxh3_64(), xxhash.xxh3_64()

    def add(self, *, keys: Iterable[str], hashes: NDArray[np.uint64]) -> None:
        """The next samples."""
        self._keys.update("".join(f"{key}\n" for key in keys).encode())
        self._hashes.update(np.ascontiguousarray(hashes, dtype="<u8").data)

    @property
    def hashes_xxh3(self) -> str:
        """Of the file of hashes."""
        return self._hashes.hexdigest()

    def dataset_hash(self, *, spec: dict[str, Any], shards: Sequence[DataclassInstance]) -> str:
        """The identity of the whole."""
        about = {"spec": spec, "shards": [asdict(s) for s in shards], "keys": self._keys.hexdigest(), "hashes": self.hashes_xxh3}
        return xxhash.xxh3_64_hexdigest(json.dumps(about, sort_keys=True).encode())


def check_distinct(ids: NDArray[np.uint64], path: Path) -> None:
    """
    Raises:
        DataError: Two samples have one key, and so one identity.
    """
    ids.sort()
    if (same := np.count_nonzero(ids[1:] == ids[:-1])) > 0:
        raise DataError(f"{path}: {same} samples have the key of another sample; keys must be unique")
