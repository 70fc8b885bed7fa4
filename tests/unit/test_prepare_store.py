from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from opensora_dist.prepare.blobs import Blobs, InShard, hash_array
from opensora_dist.prepare.store import StageStore, address


def test_what_one_process_put_another_finds(tmp_path: Path) -> None:
    with StageStore(tmp_path, name="a") as a, StageStore(tmp_path, name="b") as b:
        a.put("cut", "1", {"x": 1})
        b.put("cut", "2", [0.1, "é"])
    with StageStore(tmp_path) as both:
        assert both.get("cut", "1") == {"x": 1}
        assert both.get("cut", "2") == [0.1, "é"]
        assert both.get("score", "1") is None
    assert len(list(tmp_path.iterdir())) == 2  # a process that has nothing to say leaves no file


def test_a_torn_last_line_costs_what_it_held_and_nothing_else(tmp_path: Path) -> None:
    with StageStore(tmp_path) as store:
        store.put("cut", "1", 1)
        store.put_all([("cut", "2", 2), ("cut", "3", 3)])
    (segment,) = tmp_path.iterdir()
    whole = segment.read_bytes()
    lines = whole.splitlines(keepends=True)
    for cut in range(1, len(lines[1])):
        segment.write_bytes(lines[0] + lines[1][:-cut])
        torn = StageStore(tmp_path)
        assert torn.get("cut", "1") == 1
        # What was put together is found together or not at all; without its line's end a line may be whole.
        assert (torn.get("cut", "2"), torn.get("cut", "3")) == ((None, None) if cut > 1 else (2, 3))


def test_a_killed_process_loses_nothing_that_it_put(tmp_path: Path) -> None:
    script = (
        "import os, signal, sys\n"
        "from pathlib import Path\n"
        "from opensora_dist.prepare.store import StageStore\n"
        "store = StageStore(Path(sys.argv[1]))\n"
        "for i in range(1000):\n"
        "    store.put('cut', str(i), i)\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    done = subprocess.run([sys.executable, "-c", script, str(tmp_path)], timeout=60)
    assert done.returncode == -signal.SIGKILL
    store = StageStore(tmp_path)
    assert all(store.get("cut", str(i)) == i for i in range(1000))


def test_the_last_record_counts_and_none_forgets(tmp_path: Path) -> None:
    with StageStore(tmp_path) as store:
        store.put("cut", "1", 1)
        store.put("cut", "1", 2)
        store.put("cut", "2", 1)
        store.put("cut", "2", None)
    with StageStore(tmp_path) as store:
        assert (store.get("cut", "1"), store.get("cut", "2")) == (2, None)


def test_many_segments_become_one_with_all_they_held(tmp_path: Path) -> None:
    for i in range(20):
        with StageStore(tmp_path, name=f"part-{i}") as store:
            store.put("cut", str(i), i)
            store.put("score", "same", i)
    with StageStore(tmp_path) as store:
        last = store.get("score", "same")
        store.put("cut", "20", 20)
        store.compact()
    assert [path.name for path in tmp_path.iterdir()] == ["base.jsonl"]
    with StageStore(tmp_path) as store:
        assert all(store.get("cut", str(i)) == i for i in range(21))
        assert store.get("score", "same") == last


def test_a_segment_is_lines_of_json(tmp_path: Path) -> None:
    with StageStore(tmp_path) as store:
        store.put_all([("cut", "1", 1), ("cut", "2", {"a": [1.5]})])
    (segment,) = tmp_path.glob("*.jsonl")
    assert [json.loads(line) for line in segment.read_text().splitlines()] == [[["cut", "1", 1], ["cut", "2", {"a": [1.5]}]]]


def test_addresses_differ_where_any_part_does() -> None:
    parts = [
        ("cut", 1, {"a": 1}),
        ("cut", 1, {"a": 2}),
        ("cut", 2, {"a": 1}),
        ("cut", "1", {"a": 1}),
        ("cut", 1),
        ("cut", [1, {"a": 1}]),
    ]
    assert len({address(*some) for some in parts}) == len(parts)
    assert address("x", {"a": 1, "b": 2}) == address("x", {"b": 2, "a": 1})


@pytest.mark.parametrize("damage", ["gone", "flipped", "cut", "empty"])
def test_a_damaged_array_is_not_read_as_if_it_were_whole(tmp_path: Path, damage: str) -> None:
    array = np.random.default_rng(0).normal(size=(2, 3, 4, 4)).astype(np.float16)
    blobs = Blobs(tmp_path, in_shards={})
    blobs.put("ab12", array)
    read = Blobs(tmp_path, in_shards={}).read("ab12", xxh3=hash_array(array))
    assert read is not None
    assert np.array_equal(read, array)
    (path,) = tmp_path.glob("ab/*.safetensors")
    whole = path.read_bytes()
    match damage:
        case "gone":
            path.unlink()
        case "flipped":
            path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
        case "cut":
            path.write_bytes(whole[:-7])
        case "empty":
            path.write_bytes(b"")
    assert blobs.read("ab12", xxh3=hash_array(array)) is None


def test_an_array_is_read_back_from_its_shard_and_put_aside_when_that_goes(tmp_path: Path) -> None:
    array = np.arange(24, dtype=np.float32).reshape(2, 3, 2, 2)
    shard = tmp_path / "a.tar"
    shard.write_bytes(b"header" + array.tobytes())
    place = InShard(path=shard, offset=6, shape=array.shape, dtype="float32")
    blobs = Blobs(tmp_path / "encoded", in_shards={})
    blobs.put("ab12", array)
    blobs.now_in_shard({"ab12": place})
    assert not list(tmp_path.rglob("*.safetensors"))  # disk holds it once
    assert "ab12" in blobs
    assert np.array_equal(blobs.read("ab12", xxh3=hash_array(array)), array)
    blobs.put_aside("ab12")
    shard.unlink()
    assert np.array_equal(blobs.read("ab12", xxh3=hash_array(array)), array)


def test_a_full_disk_leaves_no_half_array(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(source: object, target: object) -> None:
        raise OSError(28, "No space left on device")

    blobs = Blobs(tmp_path, in_shards={})
    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match="No space"):
        blobs.put("ab12", np.zeros(3, np.float32))
    assert "ab12" not in blobs
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]
