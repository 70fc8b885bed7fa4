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


class _DamagedError(Exception):
    """A sample is not what was written; never leaves this file."""


@dataclass(frozen=True, kw_only=True)
class RawSample:
    """One sample as stored: latents [t, C, h, w], of the frames asked for, and text [tokens, width], views into the reader's memory."""

    latents: NDArray[np.floating]
    text: NDArray[np.floating]


@dataclass(frozen=True, kw_only=True)
class Damage:
    """Why a sample can't be read.

    Args:
        shard: The file it lies in, relative to the data set's folder.
        reason: What is wrong where.
    """

    shard: str
    reason: str


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
        """``try_read`` for callers who need every sample.

        Raises:
            DataError: Of the first sample that can't be read.
        """
        samples = []
        for row, sample in zip(rows, self.try_read(rows, frames=frames), strict=True):
            if isinstance(sample, Damage):
                raise DataError(
                    f"{self._index.shard_path(row)}: sample {self._index.key[row]!r}, {sample.reason}; copy the shard again from "
                    "where the data set was made, or run `opensora-dist data prepare` again"
                )
            samples.append(sample)
        return samples

    def try_read(self, rows: Sequence[int], *, frames: range | None = None) -> list[RawSample | Damage]:
        """Reads and verifies samples, each by itself: one that is damaged does not keep the others from being read.

        A sample is damaged where its shard is missing, can't be read, ends early, or holds other bytes than were written.

        Args:
            frames: The latent frames to read, of every sample; nothing else of the latents is touched. None: all.
        Returns:
            One per row, valid until the next call.
        """
        index = self._index
        wanted = [frames if frames is not None else range(index.latent_shape(row).t) for row in rows]
        lengths = [len(f) * _part_bytes(index.latents, row) for row, f in zip(rows, wanted)]
        total = sum(_aligned(n) + _aligned(index.text.num_bytes[row]) for row, n in zip(rows, lengths))
        if self._memory.nbytes < total:
            self._memory = np.empty(total, dtype=np.uint8)
        samples: list[RawSample | Damage] = []
        start = 0
        for row, mine, length in zip(rows, wanted, lengths):
            try:
                samples.append(self._read_sample(row, mine, start, start + _aligned(length)))
            except _DamagedError as error:
                samples.append(Damage(shard=index.shards[int(index.shard[row])].name, reason=str(error)))
            start += _aligned(length) + _aligned(index.text.num_bytes[row])
        return samples

    def close(self) -> None:
        """Closes the files; a later read opens them again."""
        while self._files:
            os.close(self._files.popitem()[1])

    def _read_sample(self, row: int, frames: range, latents_start: int, text_start: int) -> RawSample:
        """Into the memory, from the two places given."""
        index, dtype = self._index, np.dtype(str(self._index.dtype[row]))
        _, h, w = index.latent_shape(row)
        latents = self._read_array(row, index.latents, frames, latents_start, name="latents, frame {}")
        text = self._read_array(row, index.text, range(1), text_start, name="text")
        return RawSample(
            latents=latents.view(dtype).reshape(len(frames), index.spec.channels, h, w),
            text=text.view(dtype).reshape(int(index.text_tokens[row]), index.spec.text_width),
        )

    def _read_array(self, row: int, span: Span, parts: range, start: int, *, name: str) -> NDArray[np.uint8]:
        """Reads consecutive parts of an array with one call, and checks each.

        Args:
            start: Where in the memory they go.
            name: What an error calls a part; ``{}`` stands for its number.
        """
        size = _part_bytes(span, row)
        target = self._memory[start : start + len(parts) * size]
        memory, hashes = target.data, span.xxh3[span.first[row] + parts.start : span.first[row] + parts.stop].tolist()

        def where(part: int) -> str:
            return f"{name.format(part)} at offset {int(span.offset[row]) + part * size}"

        try:
            done = _read_fully(self._file(row), memory, int(span.offset[row]) + parts.start * size)
        except OSError as error:
            raise _DamagedError(f"{where(parts.start)}: can't be read ({error})") from error
        if done < target.nbytes:
            cut = parts[done // size]
            raise _DamagedError(f"{where(cut)}: the file ends after {done % size:,} of {size:,} bytes")
        for i, expected in enumerate(hashes):
            found = xxhash.xxh3_64_intdigest(memory[i * size : (i + 1) * size])
            if found != expected:
                raise _DamagedError(f"{where(parts[i])}: {size:,} bytes with xxh3 {found:016x}, expected {expected:016x}")
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
