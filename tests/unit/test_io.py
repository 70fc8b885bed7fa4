from __future__ import annotations

import errno
import fcntl
import os
import signal
import subprocess
import sys

import pytest

from opensora_dist.core.errors import DataError
from opensora_dist.core.io import (
    atomic_file,
    atomic_path,
    exclusive_lock,
    hash_bytes,
    hash_file,
    read_json,
    write_json,
    write_text,
)


def test_a_written_file_stands_alone_under_its_name(tmp_path):
    write_text(tmp_path / "new" / "a.txt", "grüß")
    assert (tmp_path / "new" / "a.txt").read_text() == "grüß"
    assert os.listdir(tmp_path / "new") == ["a.txt"]


def test_an_error_in_the_block_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "a.txt"
    write_text(path, "old")

    def fail():
        with atomic_file(path) as handle:
            handle.write(b"half")
            handle.flush()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["a.txt"]


def test_a_block_that_writes_nothing_is_an_error_and_makes_no_file(tmp_path):
    with pytest.raises(FileNotFoundError):
        with atomic_path(tmp_path / "a.mp4"):
            pass
    assert os.listdir(tmp_path) == []


def test_a_temporary_name_keeps_the_suffix_and_the_folder(tmp_path):
    with atomic_path(tmp_path / "a.mp4") as partial:
        assert partial.suffix == ".mp4" and partial.parent == tmp_path and partial.name.startswith(".a.partial-")
        partial.write_bytes(b"x")


def test_a_process_killed_while_writing_leaves_the_old_file_in_place(tmp_path):
    path = tmp_path / "a.txt"
    write_text(path, "old")
    code = (
        "import os, signal, sys\nfrom pathlib import Path\nfrom opensora_dist.core.io import atomic_file\n"
        "with atomic_file(Path(sys.argv[1])) as handle:\n"
        "    handle.write(b'half'); handle.flush(); os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    assert subprocess.run([sys.executable, "-c", code, str(path)], timeout=30, check=False).returncode == -signal.SIGKILL
    assert path.read_text() == "old"
    write_text(path, "new")
    assert path.read_text() == "new"


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_json_with_a_number_that_json_has_not_is_refused_and_not_written(tmp_path, value):
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(tmp_path / "a.json", {"x": value})
    assert os.listdir(tmp_path) == []


def test_json_comes_back(tmp_path):
    value = {"b": [1, 2.5, None], "a": {"ü": "x"}}
    write_json(tmp_path / "a.json", value)
    assert read_json(tmp_path / "a.json") == value


def test_a_file_and_its_bytes_have_one_hash(tmp_path):
    data = bytes(range(256)) * 9000  # more than one chunk
    (tmp_path / "a").write_bytes(data)
    assert hash_file(tmp_path / "a") == hash_bytes(data) == hash_bytes(memoryview(data))
    assert hash_bytes(data) != hash_bytes(data[:-1])


def test_a_lock_keeps_others_out_for_as_long_as_it_is_held(tmp_path):
    path, busy = tmp_path / "new" / "lock", DataError("taken")
    with exclusive_lock(path, busy=busy):
        with pytest.raises(DataError, match="taken"), exclusive_lock(path, busy=busy):
            pytest.fail("held twice")
    with exclusive_lock(path, busy=busy):
        pass


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_costs_a_warning(tmp_path, monkeypatch, caplog, number):
    def refuse(handle, operation):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", refuse)
    with exclusive_lock(tmp_path / "lock", busy=DataError("taken")):
        (said,) = [r.getMessage() for r in caplog.records]
    assert "can't be locked" in said and str(tmp_path) in said


def test_a_lock_that_fails_for_another_reason_is_an_error(tmp_path, monkeypatch):
    def fail(handle, operation):
        raise OSError(errno.EIO, "broken")

    monkeypatch.setattr(fcntl, "flock", fail)
    with pytest.raises(OSError, match="broken"), exclusive_lock(tmp_path / "lock", busy=DataError("taken")):
        pytest.fail("went on")
