"""Where an array lies in a .npy or .safetensors that is a tar's member: headers are read, arrays are not, and nothing is run."""

from __future__ import annotations

import io
import json
import os
import tokenize
from dataclasses import dataclass
from math import prod

import numpy as np

from opensora_dist.core.errors import DataError
from opensora_dist.core.tar import Member

_NPY_HEADER_BYTES = 16384
_LONGEST_HEADER = 16 << 20
_UNREADABLE = (ValueError, KeyError, TypeError, EOFError, SyntaxError, tokenize.TokenError, RecursionError, MemoryError)
"""What numpy's parser of .npy headers raises, which reads them as Python literals."""
_SAFETENSORS = {
    "F16": "float16",
    "F32": "float32",
    "F64": "float64",
    "I64": "int64",
    "I32": "int32",
    "I16": "int16",
    "I8": "int8",
    "U8": "uint8",
    "BOOL": "bool",
}


class UnfitError(Exception):
    """One sample can't be used, though its tar is whole; the message says why, without naming the sample."""


@dataclass(frozen=True)
class ArrayPlace:
    """An array: byte offset in the file, size, numpy's name of its type, shape."""

    offset: int
    num_bytes: int
    dtype: str
    shape: tuple[int, ...]


def npy_place(fd: int, member: Member, *, shown: str) -> ArrayPlace:
    """Where a .npy's array lies.

    Raises:
        UnfitError: Not a .npy, of another size than it says, big-endian, or its last axis is not the fastest.
        DataError: It holds objects, which only unpickling reads: that is code.
    """
    head = io.BytesIO(os.pread(fd, min(member.size, _NPY_HEADER_BYTES), member.offset))
    try:
        version = np.lib.format.read_magic(head)
        read = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}[version]
        shape, fortran, dtype = read(head)
    except _UNREADABLE as error:
        raise UnfitError("a .npy of it has no header that can be read") from error
    if dtype.hasobject:
        raise DataError(
            f"{shown}: {member.name} holds Python objects, which are code to whoever loads them, so this tar is not read; store plain "
            "arrays and pack it again"
        )
    num_bytes = prod(shape) * dtype.itemsize
    if head.tell() + num_bytes != member.size:
        raise UnfitError(f"a .npy of it says shape {list(shape)} and has another size")
    if fortran and sum(n > 1 for n in shape) > 1:
        raise UnfitError("a .npy of it is stored column first (Fortran order)")
    if dtype.byteorder == ">":
        raise UnfitError("a .npy of it is big-endian")
    return ArrayPlace(member.offset + head.tell(), num_bytes, dtype.name, tuple(shape))


def safetensors_places(fd: int, member: Member) -> dict[str, ArrayPlace]:
    """Where the tensors of a .safetensors lie, by name.

    Raises:
        UnfitError: Its header can't be read, or tensors lie outside the file.
    """
    broken = UnfitError("a .safetensors of it has no header that can be read")
    length = int.from_bytes(os.pread(fd, 8, member.offset), "little")
    if member.size < 8 or length > min(_LONGEST_HEADER, member.size - 8):
        raise broken
    try:
        header = json.loads(os.pread(fd, length, member.offset + 8))
        entries = {name: about for name, about in header.items() if name != "__metadata__"}
        found = {}
        for name, about in entries.items():
            (start, stop), shape = about["data_offsets"], tuple(map(int, about["shape"]))
            dtype = _SAFETENSORS.get(about["dtype"], about["dtype"].lower())
            if not 0 <= start <= stop <= member.size - 8 - length:
                raise broken
            if about["dtype"] in _SAFETENSORS and prod(shape) * np.dtype(dtype).itemsize != stop - start:
                raise broken
            found[name] = ArrayPlace(member.offset + 8 + length + start, stop - start, dtype, shape)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise broken from error
    return found


def read_exactly(fd: int, offset: int, size: int) -> bytes:
    """Bytes of an open file.

    Raises:
        DataError: The file ends before.
    """
    pieces, done = [], 0
    while done < size:
        piece = os.pread(fd, size - done, offset + done)
        if not piece:
            raise DataError(f"a file ended at offset {offset + done} while it was read; something writes to it")
        pieces.append(piece)
        done += len(piece)
    return b"".join(pieces)
