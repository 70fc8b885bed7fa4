"""Reading samples: one positioned read per array, into memory that is used again, each frame checked by its hash.

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
    """One sample as stored: latents [t, C, h, w], of the frames asked for, and text [tokens, width], views into the reader's memory."""

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

    def read(self, rows: Sequence[int], *, frames: range | None = None) -> list[RawSample]:
        """Reads and verifies samples. The result is valid until the next call.

        Args:
            frames: The latent frames to read, of every sample; nothing else of the latents is touched. None: all.
        Raises:
            DataError: A shard is missing, can't be read, ends early, or holds other bytes than were written.
        """
        index = self._index
        wanted = [frames if frames is not None else range(index.latent_shape(row).t) for row in rows]
        lengths = [len(f) * _part_bytes(index.latents, row) for row, f in zip(rows, wanted)]
        total = sum(_aligned(n) + _aligned(index.text.num_bytes[row]) for row, n in zip(rows, lengths))
        if self._memory.nbytes < total:
            self._memory = np.empty(total, dtype=np.uint8)
        samples, start = [], 0
        for row, mine in zip(rows, wanted):
            dtype = np.dtype(str(index.dtype[row]))
            _, h, w = index.latent_shape(row)
            latents = self._read_array(row, index.latents, mine, start, name="latents, frame {}")
            start += _aligned(latents.nbytes)
            text = self._read_array(row, index.text, range(1), start, name="text")
            start += _aligned(text.nbytes)
            samples.append(
                RawSample(
                    latents=latents.view(dtype).reshape(len(mine), index.spec.channels, h, w),
                    text=text.view(dtype).reshape(int(index.text_tokens[row]), index.spec.text_width),
                )
            )
        return samples

    def close(self) -> None:
        """Closes the files; a later read opens them again."""
        while self._files:
            os.close(self._files.popitem()[1])

    def _read_array(self, row: int, span: Span, parts: range, start: int, *, name: str) -> NDArray[np.uint8]:
        """Reads consecutive parts of an array with one call, and checks each.

        Args:
            start: Where in the memory they go.
            name: What an error calls a part; ``{}`` stands for its number.
        """
        size = _part_bytes(span, row)
        target = self._memory[start : start + len(parts) * size]
        memory, hashes = target.data, span.xxh3[span.first[row] + parts.start : span.first[row] + parts.stop].tolist()
        wayout = "copy the shard again from where the data set was made, or run `opensora-dist data prepare` again"

        def where(part: int) -> str:
            what = f"{name.format(part)} at offset {int(span.offset[row]) + part * size}"
            return f"{self._index.shard_path(row)}: sample {self._index.key[row]!r}, {what}"

        try:
            done = _read_fully(self._file(row), memory, int(span.offset[row]) + parts.start * size)
        except OSError as error:
            raise DataError(f"{where(parts.start)}: can't be read ({error}); check the disk, or {wayout}") from error
        if done < target.nbytes:
            cut = parts[done // size]
            raise DataError(f"{where(cut)}: the file ends after {done % size:,} of {size:,} bytes; {wayout}")
        for i, expected in enumerate(hashes):
            found = xxhash.xxh3_64_intdigest(memory[i * size : (i + 1) * size])
            if found != expected:
                raise DataError(f"{where(parts[i])}: {size:,} bytes with xxh3 {found:016x}, expected {expected:016x}; {wayout}")
        return target

    def _file(self, row: int) -> int:
        shard = int(self._index.shard[row])
        if shard not in self._files:
            if len(self._files) == _MAX_OPEN_FILES:
                os.close(self._files.popitem(last=False)[1])
            self._files[shard] = os.open(self._index.shard_path(row), os.O_RDONLY | os.O_CLOEXEC)
        self._files.move_to_end(shard)
        return self._files[shard]


def _part_bytes(span: Span, row: int) -> int:
    """Of one latent frame, or of a whole text."""
    return int(span.num_bytes[row]) // int(span.num_parts[row])


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
