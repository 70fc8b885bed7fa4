"""The manifest finds every kind of damage."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from opensora_dist.checkpoint.manifest import MANIFEST_NAME, describe_files, list_files, read_manifest, verify, write_manifest
from opensora_dist.core.errors import CheckpointError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "a.safetensors").write_bytes(bytes(range(200)))
    (tmp_path / "state.json").write_text("{}")
    write_manifest(
        tmp_path,
        step=12,
        metadata={"config_hash": "ab", "layout": {"world": 2}},
        files=describe_files(tmp_path, list_files(tmp_path)),
    )
    return tmp_path


def test_a_whole_folder_verifies_and_the_manifest_says_what_it_was_told(folder: Path) -> None:
    assert verify(folder) == []
    manifest = read_manifest(folder)
    assert (manifest.step, manifest.schema_version) == (12, 2)
    assert manifest.metadata == {"config_hash": "ab", "layout": {"world": 2}}
    assert set(manifest.files) == {"model/a.safetensors", "state.json"}
    assert manifest.files["model/a.safetensors"].num_bytes == 200


def test_one_flipped_bit_is_found(folder: Path) -> None:
    file = folder / "model" / "a.safetensors"
    data = bytearray(file.read_bytes())
    data[77] ^= 1
    file.write_bytes(data)
    (problem,) = verify(folder)
    assert "model/a.safetensors: content hash" in problem


def test_one_flipped_bit_in_the_manifest_itself_is_found_wherever_it_is(folder: Path) -> None:
    path = folder / MANIFEST_NAME
    whole = path.read_bytes()
    for place in range(len(whole)):
        data = bytearray(whole)
        data[place] ^= 1 << place % 8
        path.write_bytes(data)
        assert verify(folder), (place, whole[place : place + 1], data[place : place + 1])
    path.write_bytes(whole)
    assert verify(folder) == []


def test_truncation_missing_and_extra_files_are_all_reported(folder: Path) -> None:
    (folder / "model" / "a.safetensors").write_bytes(bytes(10))
    (folder / "state.json").unlink()
    (folder / "model" / "b.safetensors").touch()
    assert verify(folder) == [
        "model/a.safetensors: 10 bytes, the manifest says 200",
        "state.json: missing",
        "model/b.safetensors: not in the manifest",
    ]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "missing"),
        ("{", "damaged"),
        ("[]", "schema version None"),
        ('{"schema_version": 1}', "schema version 1, this release reads 2"),
        ('{"schema_version": 2}', "damaged"),
        ('{"schema_version": 2, "files": {"a": {"size": 1}}, "xxh3": "0"}', "damaged"),
    ],
)
def test_a_bad_manifest_is_a_problem_not_a_crash(folder: Path, content: str | None, said: str) -> None:
    path = folder / MANIFEST_NAME
    path.unlink() if content is None else path.write_text(content)
    (problem,) = verify(folder)
    assert said in problem


def test_a_file_that_would_need_unpickling_is_refused(folder: Path) -> None:
    (folder / "optimizer.pt").touch()
    with pytest.raises(CheckpointError, match="nothing in it is pickled"):
        describe_files(folder, list_files(folder))


def test_the_manifest_is_plain_json(folder: Path) -> None:
    assert json.loads((folder / MANIFEST_NAME).read_text())["files"]["state.json"]["num_bytes"] == 2
