"""Reading samples: one positioned read per array, into memory that is used again, each checked by its hash.

Why so plain: a tar library reads in small blocks, copies and parses per sample; the index already says where every array lies.
"""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import xxhash
from numpy.typing import NDArray

from opensora_dist.core.errors import DataError
from opensora_dist.data.index import Index, Span

_MAX_OPEN_FILES = 64


@dataclass(frozen=True, kw_only=True)
class RawSample:
    """One sample as stored: latents [t, C, h, w] and text [tokens, width], views into the reader's memory."""

    latents: NDArray[np.floating]
    text: NDArray[np.floating]


class ShardReader:
    """Reads samples of one data set. For one thread: it owns its file descriptors and its memory.

    Args:
        index: The data set.
    """

    def __init__(self, index: Index) -> None:
        self._index = index
        self._files: OrderedDict[int, int] = OrderedDict()  # shard number -> descriptor, least recently used first
        self._memory = np.empty(0, dtype=np.uint8)

    def read(self, rows: Sequence[int]) -> list[RawSample]:
        """Reads and verifies samples. The result is valid until the next call.

        Raises:
            DataError: A shard is missing, can't be read, ends early, or holds other bytes than were written.
        """
        index = self._index
        lengths = [_aligned(span.num_bytes[row]) for row in rows for span in (index.latents, index.text)]
        if self._memory.nbytes < sum(lengths):
            self._memory = np.empty(sum(lengths), dtype=np.uint8)
        samples, start = [], 0
        for row in rows:
            dtype = np.dtype(str(index.dtype[row]))
            t, h, w = index.latent_shape(row)
            latents = self._read_array(row, index.latents, "latents", start)
            start += _aligned(latents.nbytes)
            text = self._read_array(row, index.text, "text", start)
            start += _aligned(text.nbytes)
            samples.append(
                RawSample(
                    latents=latents.view(dtype).reshape(t, index.spec.channels, h, w),
                    text=text.view(dtype).reshape(int(index.text_tokens[row]), index.spec.text_width),
                )
            )
        return samples

    def close(self) -> None:
        """Closes the files; a later read opens them again."""
        while self._files:
            os.close(self._files.popitem()[1])

    def _read_array(self, row: int, span: Span, kind: str, start: int) -> NDArray[np.uint8]:
        offset, length = int(span.offset[row]), int(span.num_bytes[row])
        target = self._memory[start : start + length]
        where = f"{self._index.shard_path(row)}: sample {self._index.key[row]!r}, {kind} at offset {offset}"
        wayout = "copy the shard again from where the data set was made, or run `opensora-dist data prepare` again"
        try:
            done = _read_fully(self._file(row), target.data, offset)
        except OSError as error:
            raise DataError(f"{where}: can't be read ({error}); check the disk, or {wayout}") from error
        if done < length:
            raise DataError(f"{where}: the file ends after {done:,} of {length:,} bytes; {wayout}")
        found = xxhash.xxh3_64_intdigest(target.data)
        if found != int(span.xxh3[row]):
            raise DataError(f"{where}: {length:,} bytes with xxh3 {found:016x}, expected {int(span.xxh3[row]):016x}; {wayout}")
        return target

    def _file(self, row: int) -> int:
        shard = int(self._index.shard[row])
        if shard not in self._files:
            if len(self._files) == _MAX_OPEN_FILES:
                os.close(self._files.popitem(last=False)[1])
            self._files[shard] = os.open(self._index.shard_path(row), os.O_RDONLY | os.O_CLOEXEC)
        self._files.move_to_end(shard)
        return self._files[shard]


def _aligned(num_bytes: int) -> int:
    """The next multiple of 64, so that every array in the memory starts aligned."""
    return (int(num_bytes) + 63) // 64 * 64


def _read_fully(fd: int, target: memoryview, offset: int) -> int:
    """Fills ``target`` from ``offset``; one call may return less than asked for. Returns how many bytes there were."""
    done = 0
    while done < len(target):
        count = os.preadv(fd, [target[done:]], offset + done)
        if count == 0:
            break
        done += count
    return done
