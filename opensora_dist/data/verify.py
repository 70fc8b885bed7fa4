"""Every byte of a shard against what the index says of it. Nothing ends the look at a shard: each problem is told, and the rest is seen."""

# t C h w latent frames, channels, height, width; Y text tokens, E text width

from __future__ import annotations

import json
import os
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import xxhash
from numpy.typing import NDArray

from opensora_dist.config.dataset import DatasetSpec
from opensora_dist.core.errors import DataError
from opensora_dist.core.index import SampleRow, ShardRow
from opensora_dist.core.tar import Member, TarError, scan_tar, split_name
from opensora_dist.data.arrays import UnfitError, npy_place, read_exactly

_CHUNK_BYTES = 1 << 20


@dataclass(frozen=True, kw_only=True)
class Finding:
    """Something that is not as it should be.

    Args:
        shard: "" where it is the data set as a whole.
        sample: Key; "" where it is all of the shard.
        what: In words.
        warning: It can be trained on all the same.
    """

    shard: str
    sample: str
    what: str
    warning: bool = False

    def __str__(self) -> str:
        return ": ".join(part for part in (self.shard, self.sample, self.what) if part)


def verify_shard(
    fd: int,
    shard: ShardRow,
    rows: Sequence[SampleRow],
    *,
    spec: DatasetSpec,
    on_latents: Callable[[NDArray[np.floating]], None] = lambda latents_tChw: None,
) -> list[Finding]:
    """Reads a shard from end to end, twice: for its own hash, and array by array.

    Args:
        fd: Its file.
        rows: All samples that the index has in it.
        on_latents: Called with the latents, [t, C, h, w], of each sample that is whole.
    Returns:
        What is wrong, in the order of the rows; what the tar as a whole has comes first.
    """
    return _Shard(fd, shard, rows, spec=spec).verify(on_latents)


class _Shard:
    """One shard under verification."""

    def __init__(self, fd: int, shard: ShardRow, rows: Sequence[SampleRow], *, spec: DatasetSpec) -> None:
        self._fd, self._shard, self._rows, self._spec = fd, shard, rows, spec
        self._found: list[Finding] = []
        self._members: list[Member] = []
        self._scanned_bytes = os.fstat(fd).st_size  # up to where the tar could be read

    def verify(self, on_latents: Callable[[NDArray[np.floating]], None]) -> list[Finding]:
        self._whole()
        self._scan()
        self._layout()
        texts = {member.name: member for member in self._members if member.name.endswith(".json")}
        for row in self._rows:
            shape = (row.latent_t, self._spec.channels, row.latent_h, row.latent_w)
            latents = self._array(row, "latents", row.latents_offset, shape, row.latents_frame_xxh3)
            self._array(row, "text vectors", row.text_offset, (row.text_tokens, self._spec.text_width), (row.text_xxh3,))
            if latents is not None:
                on_latents(latents)
            if not row.caption.strip():
                self._tell(row, "its caption is empty", warning=True)
            if (member := texts.get(f"{row.key}.json")) is not None:
                self._json(row, member)
        return self._found

    def _tell(self, row: SampleRow | None, what: str, *, warning: bool = False) -> None:
        self._found.append(Finding(shard=self._shard.name, sample=row.key if row else "", what=what, warning=warning))

    def _whole(self) -> None:
        """Size, hash and number of samples."""
        shard, size = self._shard, os.fstat(self._fd).st_size
        if size != shard.num_bytes:
            self._tell(None, f"{size:,} bytes, expected {shard.num_bytes:,}")
        digest, at = xxhash.xxh3_64(), 0
        while chunk := os.pread(self._fd, _CHUNK_BYTES, at):
            digest.update(chunk)
            at += len(chunk)
        if digest.hexdigest() != shard.xxh3:
            self._tell(None, f"xxh3 {digest.hexdigest()} over the whole file, expected {shard.xxh3}")
        if len(self._rows) != shard.num_samples:
            self._tell(None, f"the index has {len(self._rows):,} samples in it, and says that it holds {shard.num_samples:,}")

    def _scan(self) -> None:
        try:
            for member in scan_tar(self._fd, shown=self._shard.name):
                self._members.append(member)
        except TarError as error:
            self._scanned_bytes = error.offset
            self._tell(None, f"no whole tar: {str(error).removeprefix(f'{self._shard.name}: ')}; other readers end there")

    def _layout(self) -> None:
        """What readers that go through the tar from its start rely on."""
        names = Counter(member.name for member in self._members)
        for name, count in names.items():
            if count > 1:
                self._tell(None, f"{count} members are called {name!r}")
        left: set[str] = set()
        last = ""
        apart: set[str] = set()
        for member in self._members:
            key = (split_name(member.name) or (member.name, ""))[0]
            if key != last and key in left:
                apart.add(key)
            left.add(last)
            last = key
        for key in sorted(apart):
            self._tell(None, f"the members of {key!r} do not follow each other, so webdataset takes them for two samples")
        listed = {row.key for row in self._rows}
        keys = dict.fromkeys((split_name(member.name) or (member.name, ""))[0] for member in self._members)
        if unknown := [key for key in keys if not _is_listed(key, listed, self._shard.name)]:
            shown = ", ".join(map(repr, unknown[:3])) + (", ..." if len(unknown) > 3 else "")
            # What others pack may hold samples that can't be trained on: they were told of when it was indexed.
            foreign = bool(self._rows) and all(
                row.key.startswith(f"{self._shard.name.removesuffix('.tar')}/") for row in self._rows
            )
            self._tell(None, f"holds {len(unknown):,} samples that the index does not list ({shown})", warning=foreign)

    def _array(
        self, row: SampleRow, kind: str, offset: int, shape: tuple[int, ...], hashes: Sequence[int]
    ) -> NDArray[np.floating] | None:
        """An array as the index describes it, or None where something is wrong with it, which is told."""
        num_bytes = int(np.prod(shape)) * np.dtype(row.dtype).itemsize
        if said := self._misplaced(row, kind, offset, num_bytes, shape):
            self._tell(row, said)
        try:
            data = read_exactly(self._fd, offset, num_bytes)
        except DataError:
            self._tell(row, f"its {kind} end beyond the end of the file: {num_bytes:,} bytes from {offset:,}")
            return None
        part = num_bytes // len(hashes)
        parts = [memoryview(data)[i * part : (i + 1) * part] for i in range(len(hashes))]
        if bad := [i for i, (p, h) in enumerate(zip(parts, hashes, strict=True)) if xxhash.xxh3_64_intdigest(p) != h]:
            where = (
                f"its {kind}, frame{'s' if len(bad) > 1 else ''} {', '.join(map(str, bad))},"
                if kind == "latents"
                else f"its {kind}"
            )
            self._tell(row, f"{where} have another xxh3 than the index says, from byte {offset + bad[0] * part:,} on")
            return None
        array = np.frombuffer(data, dtype=row.dtype).reshape(shape)
        if not np.isfinite(array).all():
            self._tell(row, f"its {kind} hold NaN or infinity")
            return None
        return array

    def _misplaced(self, row: SampleRow, kind: str, offset: int, num_bytes: int, shape: tuple[int, ...]) -> str | None:
        """What is wrong with the member that an array lies in, or None."""
        if offset + num_bytes > self._scanned_bytes:
            return None  # nothing is known of what lies there; the tar's damage is told already
        number = bisect_right(self._members, offset, key=lambda member: member.offset) - 1
        member = self._members[number] if number >= 0 else None
        if member is None or offset + num_bytes > member.offset + member.size:
            return f"its {kind} lie in no member of the tar, by the index: {num_bytes:,} bytes from {offset:,}"
        key = (split_name(member.name) or (member.name, ""))[0]
        if not _is_listed(key, {row.key}, self._shard.name):
            return f"its {kind} lie in {member.name!r}, by the index, which is of another sample"
        if not member.name.endswith(".npy"):
            return None
        try:
            place = npy_place(self._fd, member, shown=self._shard.name)
        except (UnfitError, DataError) as error:
            return f"its {kind}, {member.name}: {error}"
        ours = key == row.key  # others pad text, and leave axes of one out
        same = place.shape == shape if ours else _without_ones(place.shape)[-1:] == _without_ones(shape)[-1:]
        if place.dtype != row.dtype or not same:
            return f"its {kind} are {place.dtype} {list(place.shape)} in {member.name}, {row.dtype} {list(shape)} in the index"
        if place.offset != offset:
            return f"its {kind} begin at byte {place.offset:,} in {member.name}, at {offset:,} in the index"
        return None

    def _json(self, row: SampleRow, member: Member) -> None:
        """What a sample says of itself, where it is one of ours."""
        try:
            about = json.loads(os.pread(self._fd, member.size, member.offset))
        except ValueError:
            self._tell(row, f"{member.name} is no JSON")
            return
        said = {"caption": row.caption, "source": row.source, "clip": [row.clip_t, row.clip_h, row.clip_w]}
        for name, value in said.items():
            if isinstance(about, dict) and about.get(name, value) != value:
                self._tell(row, f"its {name} is {about[name]!r} in {member.name}, {value!r} in the index")


def _is_listed(key: str, listed: set[str], shard: str) -> bool:
    """Whether a tar's key is among the index's; those of tars that others made begin with the tar's name there."""
    return key in listed or f"{shard.removesuffix('.tar')}/{key}" in listed


def _without_ones(shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(size for size in shape if size != 1)
