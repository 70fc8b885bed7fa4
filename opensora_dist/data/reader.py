"""Reading samples: one positioned read per sample, straight into the place where a batch wants it, each frame checked by its hash.

Why so plain: a tar library reads in small blocks, copies and parses per sample; the index already says where every array lies. Latents
and text lie a few hundred bytes of headers apart, so that one call reads both, with the headers going where nobody looks.
"""

from __future__ import annotations

import os
import time
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import islice, pairwise

import numpy as np
import xxhash
from numpy.typing import NDArray

from opensora_dist.core.errors import DataError
from opensora_dist.data.buffers import Slot
from opensora_dist.data.index import Index

_MAX_OPEN_FILES = 64
_MAX_GAP = 4096
"""Bytes between two arrays that are read rather than jumped over: less than a second call costs."""
_DISK_BYTES_PER_S = 2e9
"""Slower than this, bytes come from a disk or a network, not from memory."""
_SAMPLES_AHEAD, _FOLLOWS_BYTES = 2, 1 << 16


class _DamagedError(Exception):
    """A sample is not what was written; never leaves this file."""


class _UnreadError(_DamagedError):
    """A sample could not be read: what was written may well be there."""


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
        lasting: Whether its bytes are wrong; rather than that reading them failed, which another time it may not.
    """

    shard: str
    reason: str
    lasting: bool = True


@dataclass(frozen=True, kw_only=True)
class Target:
    """Where a sample goes.

    Args:
        row: Which sample.
        frames: Its latent frames that are read; nothing else of the latents is touched.
        latents: Memory of just these frames, as they are stored.
        text: Memory of the text, as it is stored.
    """

    row: int
    frames: range
    latents: memoryview
    text: memoryview


@dataclass(frozen=True, kw_only=True)
class _Piece:
    """Consecutive parts of equal size of an array: where they lie, where they go, what they hash to, what an error calls them."""

    offset: int
    memory: memoryview
    parts: range
    hashes: Sequence[int]
    name: str

    @property
    def end(self) -> int:
        return self.offset + len(self.memory)

    @property
    def size(self) -> int:
        """Of a part."""
        return len(self.memory) // len(self.parts)

    def where(self, i: int) -> str:
        """Of one of its parts, for people."""
        return f"{self.name.format(self.parts[i])} at offset {self.offset + i * self.size}"


_Place = tuple[int, list[list[_Piece]]]
"""Shard and runs of a sample."""


class ShardReader:
    """Reads samples of one data set. For one thread: it owns its file descriptors and its memory.

    Args:
        index: The data set.
    """

    def __init__(self, index: Index) -> None:
        self._index = index
        self._files: OrderedDict[int, int] = OrderedDict()  # shard number -> descriptor, least recently used first
        self._memory = Slot(pinned=False)
        self._gap = memoryview(bytearray(_MAX_GAP))  # takes what lies between two arrays
        self._from_disk = True  # as far as the last batch tells; in memory, telling what comes would only cost

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
        """Reads samples into the reader's own memory.

        Args:
            frames: The latent frames to read, of every sample. None: all.
        Returns:
            One per row, valid until the next call.
        """
        index, targets, samples = self._index, [], []
        wanted = [frames if frames is not None else range(index.latent_shape(row).t) for row in rows]
        sizes = [n for row, mine in zip(rows, wanted) for n in (latents_bytes(index, row, mine), index.text_place(row).num_bytes)]
        arrays = iter(self._memory.arrays(sizes))
        for row, mine in zip(rows, wanted):
            latents, text = next(arrays).numpy(), next(arrays).numpy()
            targets.append(Target(row=row, frames=mine, latents=latents.data, text=text.data))
            dtype, (_, h, w) = index.dtype(row), index.latent_shape(row)
            samples.append(
                RawSample(
                    latents=latents.view(dtype).reshape(len(mine), index.spec.channels, h, w),
                    text=text.view(dtype).reshape(-1, index.spec.text_width),
                )
            )
        found = self.read_into(targets)
        return [sample if damage is None else damage for sample, damage in zip(samples, found, strict=True)]

    def read_into(self, targets: Sequence[Target]) -> list[Damage | None]:
        """Reads and verifies samples, each by itself: one that is damaged does not keep the others from being read.

        A sample is damaged where its shard is missing, can't be read, ends early, or holds other bytes than were written. They are read
        in the order in which they lie.

        Returns:
            One per target: what is wrong with it, or None. The memory of a damaged one may hold anything.
        """
        index = self._index
        runs = [self._runs(target) for target in targets]
        shards = [int(index.shard[target.row]) for target in targets]
        order = sorted(range(len(targets)), key=lambda i: (shards[i], runs[i][0][0].offset))
        coming = pairwise((shards[i], runs[i]) for i in order)
        found: list[Damage | None] = [None] * len(targets)
        began, num_bytes = time.perf_counter(), 0
        for nth, i in enumerate(order):
            if self._from_disk:
                self._advise(islice(coming, 1 if nth else _SAMPLES_AHEAD))
            num_bytes += len(targets[i].latents) + len(targets[i].text)
            found[i] = self._read_sample(shards[i], runs[i])
        self._from_disk = num_bytes < _DISK_BYTES_PER_S * (time.perf_counter() - began)
        return found

    def _read_sample(self, shard: int, runs: Sequence[Sequence[_Piece]]) -> Damage | None:
        """Returns what is wrong with it. Wrong bytes of a copy that its source can make anew are read twice."""
        damage = self._read_runs(shard, runs)
        if damage is None or not damage.lasting or not self._index.shard_source.discard(shard):
            return damage
        if shard in self._files:  # of the copy that was wrong
            os.close(self._files.pop(shard))
        return self._read_runs(shard, runs)

    def _read_runs(self, shard: int, runs: Sequence[Sequence[_Piece]]) -> Damage | None:
        try:
            for run in runs:
                self._read_run(shard, run)
        except _DamagedError as error:
            return Damage(shard=self._index.shards[shard].name, reason=str(error), lasting=not isinstance(error, _UnreadError))
        return None

    def close(self) -> None:
        """Closes the files; a later read opens them again."""
        while self._files:
            os.close(self._files.popitem()[1])

    def _runs(self, target: Target) -> list[list[_Piece]]:
        """What of a sample one call reads, in the order in which it lies: all of it where only headers lie between its arrays."""
        index, row, frames = self._index, target.row, target.frames
        place, num_frames = index.latents_place(row), index.latent_shape(row).t
        latents = _Piece(
            offset=place.offset + frames.start * (place.num_bytes // num_frames),
            memory=target.latents,
            parts=frames,
            hashes=index.frame_hashes(row)[frames.start : frames.stop].tolist(),
            name="latents, frame {}",
        )
        text = _Piece(
            offset=index.text_place(row).offset,
            memory=target.text,
            parts=range(1),
            hashes=(index.text_hash(row),),
            name="text",
        )
        if latents.offset > text.offset:
            return [[text], [latents]]
        to_the_end = frames.stop == num_frames
        return [[latents, text]] if to_the_end and text.offset - latents.end <= _MAX_GAP else [[latents], [text]]

    def _read_run(self, shard: int, run: Sequence[_Piece]) -> None:
        """
        Raises:
            _DamagedError: It is not what was written.
        """
        memories = [run[0].memory]
        for before, piece in pairwise(run):
            memories += [self._gap[: piece.offset - before.end], piece.memory]
        done, error = self._fill(shard, memories, run[0].offset)
        for piece in run:
            _verify(piece, there=run[0].offset + done - piece.offset, error=error)

    def _fill(self, shard: int, memories: list[memoryview], offset: int) -> tuple[int, OSError | None]:
        """Fills memories one after the other from ``offset`` of a shard; one call may bring less than asked for.

        Returns:
            How many bytes there were, and what kept the rest from being read; None: the end of the file.
        """
        done = 0
        try:
            fd = self._file(shard)
            while memories and (count := os.preadv(fd, memories, offset + done)):
                done += count
                while memories and count >= len(memories[0]):
                    count -= len(memories.pop(0))
                if count:
                    memories[0] = memories[0][count:]
        except OSError as error:
            return done, error
        return done, None

    def _advise(self, coming: Iterable[tuple[_Place, _Place]]) -> None:
        """Tells the system of samples that are read soon, so that the disk has something to do while others are copied and hashed.

        Args:
            coming: Each with the sample before it; where it follows that, the system reads ahead by itself, and better.
        """
        for (shard_before, before), (shard, runs) in coming:
            if shard == shard_before and runs[0][0].offset - before[-1][-1].end <= _FOLLOWS_BYTES:
                continue
            with suppress(OSError):  # a file that isn't there: reading says so
                fd = self._file(shard)
                for run in runs:
                    os.posix_fadvise(fd, run[0].offset, run[-1].end - run[0].offset, os.POSIX_FADV_WILLNEED)

    def _file(self, shard: int) -> int:
        if shard not in self._files:
            if len(self._files) == _MAX_OPEN_FILES:
                os.close(self._files.popitem(last=False)[1])
            self._files[shard] = self._index.shard_source.open(shard)
        self._files.move_to_end(shard)
        return self._files[shard]


def latents_bytes(index: Index, row: int, frames: range) -> int:
    """Of some frames of a sample, as they are stored."""
    return len(frames) * (index.latents_place(row).num_bytes // index.latent_shape(row).t)


def _verify(piece: _Piece, *, there: int, error: OSError | None) -> None:
    """
    Args:
        there: How many of its bytes were read.
        error: What ended reading.
    Raises:
        _UnreadError: They could not be read.
        _DamagedError: They are not what was written.
    """
    size = piece.size
    if there < len(piece.memory):
        cut, done = divmod(max(0, there), size)
        if error is not None:
            raise _UnreadError(f"{piece.where(cut)}: can't be read ({error})") from error
        raise _DamagedError(f"{piece.where(cut)}: the file ends after {done:,} of {size:,} bytes")
    for i, expected in enumerate(piece.hashes):
        found = xxhash.xxh3_64_intdigest(piece.memory[i * size : (i + 1) * size])
        if found != expected:
            raise _DamagedError(f"{piece.where(i)}: {size:,} bytes with xxh3 {found:016x}, expected {expected:016x}")
