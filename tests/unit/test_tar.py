"""The scan of tars: every form that writers use is read; damage and what could reach outside is an error with file and offset."""

from __future__ import annotations

import contextlib
import io
import os
import shutil
import subprocess
import tarfile
import time

import numpy as np
import pytest

from opensora_dist.core.tar import TarError, scan_tar

NAMES = ["a.npy", "folder/b.json", "ä€😀.txt", f"{'long/' * 40}c.npy"]


def _pack(path, names=NAMES, *, form=tarfile.PAX_FORMAT, edit=lambda info: info):
    with tarfile.open(path, "w", format=form) as tar:
        for i, name in enumerate(names):
            content = bytes([i]) * (100 + 700 * i)
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(edit(info), io.BytesIO(content))
    return path


def _scan(path):
    with open(path, "rb") as file:
        return list(scan_tar(file.fileno(), shown=str(path)))


@pytest.mark.parametrize("form", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT], ids=["pax", "gnu"])
def test_names_offsets_and_sizes_are_those_that_tarfile_finds(tmp_path, form):
    path = _pack(tmp_path / "a.tar", form=form)
    with tarfile.open(path) as tar:
        assert [(m.name, m.offset, m.size) for m in _scan(path)] == [(m.name, m.offset_data, m.size) for m in tar]


def test_names_of_ustar_with_a_prefix_are_joined(tmp_path):
    name = f"{'p' * 90}/{'n' * 90}.npy"
    assert [m.name for m in _scan(_pack(tmp_path / "a.tar", [name], form=tarfile.USTAR_FORMAT))] == [name]


@pytest.mark.skipif(shutil.which("tar") is None, reason="no tar program here: install tar")
@pytest.mark.parametrize("form", ["ustar", "gnu", "posix", "v7"])
def test_what_the_tar_program_packs_is_read(tmp_path, form):
    (tmp_path / "d" / "e").mkdir(parents=True)
    (tmp_path / "d" / "a.npy").write_bytes(b"x" * 1000)
    (tmp_path / "d" / "e" / "b.txt").write_bytes(b"y" * 10)
    subprocess.run(["tar", f"--format={form}", "-cf", "t.tar", "./d"], cwd=tmp_path, check=True)
    found = {m.name: m for m in _scan(tmp_path / "t.tar")}
    content = (tmp_path / "t.tar").read_bytes()
    assert sorted(found) == ["d/a.npy", "d/e/b.txt"]
    assert content[found["d/a.npy"].offset :][:1000] == b"x" * 1000


def test_a_pax_size_counts_and_large_numbers_are_binary(tmp_path):
    path = tmp_path / "sparse.tar"  # of the file system, so that nine gigabytes cost nothing
    info = tarfile.TarInfo("big.npy")
    info.size = 9 << 30
    header = info.tobuf(format=tarfile.GNU_FORMAT)
    with open(path, "wb") as file:
        file.write(header)
        file.truncate(len(header) + info.size + 1024)
    assert [(m.offset, m.size) for m in _scan(path)] == [(512, 9 << 30)]
    info.pax_headers = {"size": str(info.size)}
    with open(path, "wb") as file:
        file.write(info.tobuf(format=tarfile.PAX_FORMAT))
        start = file.tell()
        file.truncate(start + info.size + 1024)
    assert [(m.offset, m.size) for m in _scan(path)] == [(start, 9 << 30)]


def test_every_damaged_header_is_found_wherever_the_bit_flips(tmp_path):
    path = _pack(tmp_path / "a.tar", ["a.npy", "b.npy", "c.npy"], form=tarfile.USTAR_FORMAT)
    content, headers = path.read_bytes(), [m.offset - 512 for m in _scan(path)]
    rng = np.random.default_rng(0)
    for at in headers:
        for byte in rng.choice(512, 40, replace=False):
            broken = bytearray(content)
            broken[at + byte] ^= 1 << int(rng.integers(8))
            path.write_bytes(broken)
            if byte in (154, 155):
                continue  # what ends the checksum's own digits says nothing
            with pytest.raises(TarError, match=f"at offset {at}:"):
                _scan(path)


def test_every_cut_is_found(tmp_path):
    path = _pack(tmp_path / "a.tar", ["a.npy", "b.npy"], form=tarfile.USTAR_FORMAT)
    content, last = path.read_bytes(), _scan(path)[-1]
    end = (last.offset + last.size + 511) // 512 * 512
    for length in [*range(0, end + 1, 64), end + 512, end + 1023]:
        path.write_bytes(content[:length])
        with pytest.raises(TarError):
            _scan(path)
    path.write_bytes(content[: end + 1024])
    assert len(_scan(path)) == 2


def test_what_follows_the_end_mark_is_said_rather_than_lost(tmp_path):
    path = _pack(tmp_path / "a.tar")
    path.write_bytes(path.read_bytes() * 2)
    with pytest.raises(TarError, match="joined with cat"):
        _scan(path)


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        (tarfile.SYMTYPE, "symbolic link"),
        (tarfile.LNKTYPE, "hard link"),
        (tarfile.CHRTYPE, "character device"),
        (tarfile.BLKTYPE, "block device"),
        (tarfile.FIFOTYPE, "a pipe"),
        (tarfile.GNUTYPE_SPARSE, "sparse"),
        (b"Q", "unknown kind"),
    ],
)
def test_what_is_no_plain_file_is_refused_by_name(tmp_path, kind, said):
    def edit(info):
        info.type, info.linkname, info.size = kind, "/etc/passwd", 0
        return info

    with pytest.raises(TarError, match=f"'a.npy' is .*{said}"):
        _scan(_pack(tmp_path / "a.tar", ["a.npy"], edit=edit))


@pytest.mark.parametrize("name", ["/etc/passwd.npy", "../a.npy", "a/../../b.npy", ".."])
@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.PAX_FORMAT], ids=["ustar", "pax"])
def test_names_that_point_out_of_the_tar_are_refused(tmp_path, name, form):
    def edit(info):
        if form == tarfile.PAX_FORMAT:  # the long name counts, not the harmless short one
            info.pax_headers, info.name = {"path": name}, "harmless.npy"
        return info

    with pytest.raises(TarError, match="points out of the tar"):
        _scan(_pack(tmp_path / "a.tar", [name], form=form, edit=edit))


@pytest.mark.skipif(shutil.which("tar") is None, reason="no tar program here: install tar")
@pytest.mark.parametrize("form", ["gnu", "posix"])
def test_sparse_files_are_refused(tmp_path, form):
    with open(tmp_path / "hole.npy", "wb") as file:
        file.truncate(1 << 20)
        file.seek(1 << 19)
        file.write(b"x")
    subprocess.run(["tar", f"--format={form}", "--sparse", "-cf", "t.tar", "hole.npy"], cwd=tmp_path, check=True)
    with pytest.raises(TarError, match="sparse"):
        _scan(tmp_path / "t.tar")


def test_a_compressed_tar_is_called_that(tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w:gz") as tar:
        tar.addfile(tarfile.TarInfo("a.npy"))
    with pytest.raises(TarError, match="compressed"):
        _scan(tmp_path / "a.tar")


def test_payloads_are_not_read_and_thousands_of_members_are_quick(tmp_path):
    path = tmp_path / "many.tar"
    header = tarfile.TarInfo("0.npy")
    header.size = 1 << 20
    block = header.tobuf(format=tarfile.USTAR_FORMAT)
    with open(path, "wb") as file:
        for i in range(4000):
            os.pwrite(file.fileno(), block, i * ((1 << 20) + 512))
        file.truncate(4000 * ((1 << 20) + 512) + 1024)
    start = time.perf_counter()
    assert len(_scan(path)) == 4000
    assert time.perf_counter() - start < 3, "of which a quiet machine needs a thirtieth"


@pytest.mark.parametrize("form", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT], ids=["pax", "gnu"])
@pytest.mark.parametrize("seed", range(20))
def test_whatever_bytes_a_tar_holds_nothing_but_members_or_the_error_comes_out(tmp_path, form, seed):
    path = _pack(tmp_path / "a.tar", form=form)
    rng = np.random.default_rng(seed)
    content = bytearray(path.read_bytes())
    for at in rng.integers(0, len(content), 30):
        content[at] ^= 1 << int(rng.integers(8))
    path.write_bytes(content)
    with contextlib.suppress(TarError):
        for member in _scan(path):
            assert member.offset >= 0 and member.offset + member.size <= len(content)
