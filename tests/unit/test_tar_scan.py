"""Real tars, damaged in the ways that other readers pass over."""

from __future__ import annotations

import io
import tarfile

import pytest

from opensora_dist.core.errors import DataError
from opensora_dist.core.tar import Member, scan_tar, split_name


def tar_of(*names: str, size: int = 700, kind: bytes = tarfile.REGTYPE, form: int = tarfile.USTAR_FORMAT) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=form) as tar:
        for i, name in enumerate(names):
            info = tarfile.TarInfo(name)
            info.type, info.size = kind, size if kind == tarfile.REGTYPE else 0
            tar.addfile(info, io.BytesIO(bytes([i]) * size))
    return buffer.getvalue()


def scan(data: bytes) -> list[Member]:
    return list(scan_tar(io.BytesIO(data), label="x.tar"))


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_members_are_told_with_the_place_of_their_bytes(form: int) -> None:
    names = ["a.npy", "folder/größe.txt" if form != tarfile.USTAR_FORMAT else "folder/size.txt", "x/" + "y" * 90 + ".npy"]
    data = tar_of(*names, form=form)
    members = scan(data)
    assert [m.name for m in members] == names
    assert [data[m.offset : m.offset + m.num_bytes] for m in members] == [bytes([i]) * 700 for i in range(3)]
    assert all(m.refused is None for m in members)


def test_a_flipped_bit_in_a_header_is_an_error_rather_than_the_end() -> None:
    data = bytearray(tar_of("a.txt", "b.txt", "c.txt"))
    data[1536 + 10] ^= 1
    with pytest.raises(DataError, match=r"x\.tar: a damaged header at byte 1,536"):
        scan(bytes(data))


@pytest.mark.parametrize(("tail", "what"), [(b"", "ends"), (b"x" * 200, "a damaged header")])
def test_an_end_at_a_members_edge_or_in_a_header_is_an_error(tail: bytes, what: str) -> None:
    with pytest.raises(DataError, match=rf"x\.tar: {what} at byte 3,072"):
        scan(tar_of("a.txt", "b.txt", "c.txt")[: 2 * 1536] + tail)


def test_a_member_that_is_cut_off_is_not_given() -> None:
    members = scan_tar(io.BytesIO(tar_of("a.txt", "b.txt")[: 1536 + 512 + 100]), label="x.tar")
    assert next(members).name == "a.txt"
    with pytest.raises(DataError, match=r"in the middle of 'b\.txt'"):
        next(members)


@pytest.mark.parametrize("data", [b"", b"hello" * 300, bytes(100)])
def test_what_is_no_tar_is_refused(data: bytes) -> None:
    with pytest.raises(DataError, match=r"x\.tar: damaged, or not an uncompressed tar"):
        scan(data)


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE])
def test_links_and_devices_are_refused(kind: bytes) -> None:
    assert [m.refused for m in scan(tar_of("a.txt", kind=kind))] == ["not a plain file"]


@pytest.mark.parametrize("name", ["../a.txt", "b/../../a.txt", "/etc/a.txt"])
def test_names_that_lead_elsewhere_are_refused(name: str) -> None:
    assert [m.refused for m in scan(tar_of(name))] == ["its name leads out of the folder"]


def test_folders_are_left_out() -> None:
    assert scan(tar_of("a", kind=tarfile.DIRTYPE)) == []


def test_a_key_ends_at_the_first_dot_of_the_last_part() -> None:
    assert split_name("d.x/a0.latents.npy") == ("d.x/a0", "latents.npy")
    assert split_name("a.txt") == ("a", "txt")
    assert split_name("noext") is split_name(".hidden") is split_name("d/.hidden.txt") is None
