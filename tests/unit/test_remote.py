"""Shards that lie elsewhere: fetched whole or not at all, once for all ranks of a machine, within the space given; failures say all."""

from __future__ import annotations

import errno
import fcntl
import os
import subprocess
import sys
import threading
import time
from dataclasses import replace
from itertools import pairwise

import fsspec
import pytest
from dataset_factory import SPEC, write_dataset
from stores import Store, serving

from opensora_dist.config.data_rules import data_problems
from opensora_dist.config.load import dump_yaml
from opensora_dist.config.train import CacheConfig, DataConfig, TrainConfig
from opensora_dist.core.errors import ConfigError, DataError
from opensora_dist.core.index import ShardRow, read_header, read_rows, write_index
from opensora_dist.core.io import hash_bytes
from opensora_dist.core.urls import pipe_arguments, plain_name, secret_in
from opensora_dist.data import cache as cache_module
from opensora_dist.data import remote, transport
from opensora_dist.data.cache import ShardCache, Wanted
from opensora_dist.data.index import DataSet, Index
from opensora_dist.data.reader import Damage, ShardReader
from opensora_dist.data.remote import localise
from opensora_dist.data.transport import FetchError, Patience

QUICK = Patience(total_s=0.1, backoff_s=0.01, stall_s=1.0)
CONTENT = bytes(range(256)) * 1000


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(remote, "PATIENCE", QUICK)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    folder = tmp_path_factory.mktemp("remote") / "set"
    written = write_dataset(folder, samples={(3, 32, 48): 8, (1, 48, 32): 6})
    return folder, written


@pytest.fixture
def store(dataset):
    folder = dataset[0]
    with serving(Store(files={f"set/{path.name}": path.read_bytes() for path in folder.iterdir()})) as store:
        yield store


@pytest.fixture
def config(tmp_path):
    return CacheConfig(path=str(tmp_path / "cache"), prefetch_shards=0, patience_s=QUICK.total_s)


def _open(url, config, **kwargs):
    at = localise(url, cache=config, allow_pipe=kwargs.pop("allow_pipe", False), **kwargs)
    return at, at.open_shards(read_header(at.folder).shards)


def _content(source, number):
    fd = source.open(number)
    try:
        return os.pread(fd, 1 << 30, 0)
    finally:
        os.close(fd)


def _wanted(tmp_path, read, *, name="a.tar", num_bytes=len(CONTENT), xxh3=hash_bytes(CONTENT)):
    path = tmp_path / "cache" / name
    return Wanted(path=path, shown=f"store://{name}", read=read, num_bytes=num_bytes, xxh3=xxh3)


def _cache(tmp_path, *, max_bytes=1 << 30, patience=QUICK):
    return ShardCache(tmp_path / "cache", max_bytes=max_bytes, patience=patience)


def _whole(start):
    yield CONTENT[start:]


def _left(tmp_path):
    return sorted(p.name for p in (tmp_path / "cache").rglob("*") if p.is_file() and not p.name.endswith(".lock"))


def test_a_data_set_behind_a_url_reads_as_the_folder_it_was_copied_from(store, dataset, config):
    folder, written = dataset
    at, source = _open(f"{store.url}/set", config)
    assert list(read_rows(at.folder)) == list(read_rows(folder))
    shards = read_header(folder).shards
    assert [_content(source, n) for n in range(len(shards))] == [(folder / s.name).read_bytes() for s in shards]
    assert [_content(source, 0), store.downloads("set/shard-00000.tar")] == [(folder / shards[0].name).read_bytes(), [None]]
    again = _open(f"{store.url}/set", config)[1]
    _content(again, 0)
    assert store.downloads("set/index.parquet") == store.downloads("set/shard-00000.tar") == [None], "fetched twice"
    assert written


def test_fsspecs_other_stores_are_read_alike(dataset, config):
    folder, _ = dataset
    memory = fsspec.filesystem("memory")
    for path in folder.iterdir():
        memory.pipe(f"/bucket/set/{path.name}", path.read_bytes())
    at, source = _open("memory://bucket/set", config)
    assert list(read_rows(at.folder)) == list(read_rows(folder))
    assert _content(source, 1) == (folder / read_header(folder).shards[1].name).read_bytes()
    memory.rm("/bucket", recursive=True)


@pytest.mark.parametrize("ranges", [True, False], ids=["ranges", "no-ranges"])
@pytest.mark.parametrize("fault", ["503", "cut", "short", "flip"])
def test_a_transfer_that_fails_once_is_made_again(store, dataset, config, fault, ranges):
    store.ranges = ranges
    _, source = _open(f"{store.url}/set", config)
    store.faults["set/shard-00000.tar"] = [fault]
    assert _content(source, 0) == (dataset[0] / "shard-00000.tar").read_bytes()
    assert len(store.downloads("set/shard-00000.tar")) == 2


def test_a_cut_transfer_goes_on_where_it_ended(store, dataset, config):
    content = (dataset[0] / "shard-00000.tar").read_bytes()
    _, source = _open(f"{store.url}/set", config)
    store.faults["set/shard-00000.tar"] = ["short"]
    assert _content(source, 0) == content
    assert store.downloads("set/shard-00000.tar") == [None, f"bytes={len(content) // 2}-"]


def test_the_index_and_the_question_whether_there_is_one_survive_failures(store, config):
    store.faults["set/index.parquet"] = ["503", "cut"]
    at, _ = _open(f"{store.url}/set", config)
    assert read_header(at.folder).num_samples == 14


def test_giving_up_names_url_attempts_reason_and_way_out_and_leaves_nothing(store, config, tmp_path):
    _, source = _open(f"{store.url}/set", config)
    before = _left(tmp_path)
    store.faults["set/shard-00001.tar"] = ["503"] * 99
    with pytest.raises(FetchError) as caught:
        source.open(1)
    for part in (
        f"{store.url}/set/shard-00001.tar",
        "attempts (",
        "503",
        "credentials in the environment",
        "docs/remote.md",
    ):
        assert part in str(caught.value)
    assert _left(tmp_path) == before
    asked = len(store.asked)
    with pytest.raises(FetchError):
        source.open(1)
    assert len(store.asked) == asked, "each sample of a shard that is gone would wait through all attempts"


@pytest.mark.parametrize("status", ["403", "404"])
def test_what_is_forbidden_or_not_there_is_not_asked_for_again(store, config, status):
    _, source = _open(f"{store.url}/set", config)
    if status == "404":
        del store.files["set/shard-00001.tar"]
    store.faults["set/shard-00001.tar"] = ["403"] if status == "403" else []
    with pytest.raises(FetchError, match="after 1 attempt "):
        source.open(1)


def test_a_store_that_does_not_answer_is_an_error_that_says_so(config):
    with serving(Store(files={})) as store:
        url = store.url
    with pytest.raises(DataError, match=r"after \d+ attempts .*[Cc]onnect"):
        localise(f"{url}/set", cache=config, allow_pipe=False)


def test_a_shard_that_can_not_be_had_is_damage_of_its_samples_alone(store, config):
    at = localise(f"{store.url}/set", cache=config, allow_pipe=False)
    store.faults["set/shard-00001.tar"] = ["503"] * 99
    index = Index.join([DataSet(at=at)])
    samples = ShardReader(index).try_read(range(len(index)))
    damaged = [row for row, sample in enumerate(samples) if isinstance(sample, Damage)]
    assert damaged == [row for row in range(len(index)) if index.shard[row] == 1]
    assert " attempts (" in samples[damaged[0]].reason


def test_a_data_set_that_was_prepared_anew_is_not_read_with_the_old_shards(store, dataset, config, tmp_path):
    _, source = _open(f"{store.url}/set", config)
    old = _content(source, 0)
    folder = tmp_path / "new"
    write_dataset(folder, samples={(3, 32, 48): 8, (1, 48, 32): 6}, seed=1)
    store.files = {f"set/{path.name}": path.read_bytes() for path in folder.iterdir()}
    at, source = _open(f"{store.url}/set", config)
    assert len(_content(source, 0)) == len(old) and _content(source, 0) == (folder / "shard-00000.tar").read_bytes()
    assert list(read_rows(at.folder)) == list(read_rows(folder))


def test_a_copy_that_rotted_is_given_up_and_fetched_anew_and_a_whole_one_is_kept(store, dataset, config):
    at, source = _open(f"{store.url}/set", config)
    right = _content(source, 0)
    (copy,) = at.folder.parent.glob("shard-00000.*.tar")
    assert source.discard(0)
    assert [_content(source, 0), len(store.downloads("set/shard-00000.tar"))] == [right, 1], "a whole copy was fetched again"
    copy.write_bytes(right[:600] + bytes(len(right) - 600))
    assert source.discard(0)
    assert [_content(source, 0), len(store.downloads("set/shard-00000.tar"))] == [right, 2]
    assert not localise(str(dataset[0]), cache=config, allow_pipe=False).open_shards(read_header(dataset[0]).shards).discard(0)


def test_shards_are_fetched_ahead_in_the_order_they_are_read(store, config):
    at = localise(f"{store.url}/set", cache=config.model_copy(update={"prefetch_shards": 1}), allow_pipe=False)
    source = at.open_shards(read_header(at.folder).shards)
    source.prefetch([2, 1])
    _wait_for(lambda: store.downloads("set/shard-00002.tar"))
    source.prefetch([1, 2])
    _wait_for(lambda: store.downloads("set/shard-00001.tar"))
    source.close()
    assert not store.downloads("set/shard-00000.tar")
    os.close(source.open(2))
    assert store.downloads("set/shard-00002.tar") == [None]


def test_closing_ends_a_prefetch_and_the_source_can_be_used_again(store, config):
    at = localise(f"{store.url}/set", cache=config.model_copy(update={"prefetch_shards": 2}), allow_pipe=False)
    source = at.open_shards(read_header(at.folder).shards)
    source.prefetch([0, 1])
    source.close()
    assert not [t for t in threading.enumerate() if t.name == "prefetch-shards"]
    os.close(source.open(0))
    source.prefetch([1])
    _wait_for(lambda: store.downloads("set/shard-00001.tar"))
    source.close()


def _wait_for(done):
    end = time.monotonic() + 20
    while not done():
        assert time.monotonic() < end
        time.sleep(0.005)


FETCHER = """
import os, sys, time
from pathlib import Path
from opensora_dist.data.cache import ShardCache, Wanted
from opensora_dist.data.transport import Patience
root, log, mode = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]
def read(start):
    with open(log, "a") as handle:
        handle.write("fetched\\n")
    yield b"x" * 1000
    if mode == "hang":
        time.sleep(60)
    time.sleep(0.3)
    yield b"x" * 1000
cache = ShardCache(root, max_bytes=1 << 20, patience=Patience(stall_s=20))
fd = cache.open(Wanted(path=root / "a.tar", shown="store://a.tar", read=read, num_bytes=2000))
assert os.pread(fd, 3000, 0) == b"x" * 2000
"""


def _fetcher(tmp_path, mode):
    return subprocess.Popen([sys.executable, "-c", FETCHER, str(tmp_path / "cache"), str(tmp_path / "log"), mode])


def test_of_the_processes_of_a_machine_one_fetches_and_the_others_wait(tmp_path):
    processes = [_fetcher(tmp_path, "go") for _ in range(3)]
    assert [p.wait(60) for p in processes] == [0, 0, 0]
    assert (tmp_path / "log").read_text() == "fetched\n"
    assert _left(tmp_path) == ["a.tar"]


def test_the_lock_of_a_fetcher_that_was_killed_blocks_nobody_and_its_part_is_removed(tmp_path):
    dead = _fetcher(tmp_path, "hang")
    _wait_for(lambda: any((tmp_path / "cache").glob(".a.tar.partial-*")) if (tmp_path / "cache").exists() else False)
    dead.kill()
    dead.wait()
    os.close(_cache(tmp_path).open(_wanted(tmp_path, _whole)))
    assert _left(tmp_path) == ["a.tar"]


def test_who_waits_for_a_fetcher_that_gets_nothing_gives_up(tmp_path):
    cache = _cache(tmp_path, patience=Patience(stall_s=0.1))
    (tmp_path / "cache").mkdir()
    with open(tmp_path / "cache" / ".a.tar.lock", "w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        with pytest.raises(FetchError, match="another process of this machine fetches it"):
            cache.open(_wanted(tmp_path, _whole))


def test_the_shards_used_least_recently_go_first_and_the_cache_stays_in_its_bounds(tmp_path):
    cache = _cache(tmp_path, max_bytes=3 * len(CONTENT))
    for number, name in enumerate("abc"):
        os.close(cache.open(_wanted(tmp_path, _whole, name=f"{name}.tar")))
        os.utime(tmp_path / "cache" / f"{name}.tar", (number, number))
    os.close(cache.open(_wanted(tmp_path, _whole, name="a.tar")))
    os.close(cache.open(_wanted(tmp_path, _whole, name="d.tar")))
    assert _left(tmp_path) == ["a.tar", "c.tar", "d.tar"]


def test_a_shard_that_is_open_is_not_removed_while_another_can_be(tmp_path):
    cache = _cache(tmp_path, max_bytes=2 * len(CONTENT))
    held = cache.open(_wanted(tmp_path, _whole, name="a.tar"))
    os.utime(tmp_path / "cache" / "a.tar", (0, 0))
    for name in "bc":
        os.close(cache.open(_wanted(tmp_path, _whole, name=f"{name}.tar")))
    assert _left(tmp_path) == ["a.tar", "c.tar"]
    os.close(held)


def test_descriptors_stay_valid_where_everything_is_open_and_the_bound_is_kept(tmp_path, caplog):
    cache = _cache(tmp_path, max_bytes=len(CONTENT))
    held = cache.open(_wanted(tmp_path, _whole, name="a.tar"))
    os.close(cache.open(_wanted(tmp_path, _whole, name="b.tar")))
    assert _left(tmp_path) == ["b.tar"]
    assert os.pread(held, 1 << 30, 0) == CONTENT
    assert "less than the shards that readers hold open" in caplog.text
    os.close(held)


def test_a_data_set_larger_than_the_cache_is_told_of_with_the_way_out(store, config, caplog):
    caplog.set_level("INFO", logger="opensora_dist")
    _, source = _open(f"{store.url}/set", config.model_copy(update={"max_gib": 40000 / 2**30}))
    (said,) = [r.getMessage() for r in caplog.records if "more than once" in r.getMessage()]
    assert "shard-00000.tar and 2 more shards" in said and "data.shuffle_shards" in said
    for number in (0, 1, 2, 0):
        os.close(source.open(number))
    assert len(store.downloads("set/shard-00000.tar")) == 2


def test_a_shard_larger_than_the_cache_is_an_error_with_the_field(tmp_path):
    with pytest.raises(FetchError, match=r"data\.cache\.max_gib"):
        _cache(tmp_path, max_bytes=10).open(_wanted(tmp_path, _whole))


def test_a_full_disk_is_a_clear_error_and_leaves_no_part(tmp_path, monkeypatch):
    def full(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(cache_module.os, "pwrite", full)
    with pytest.raises(FetchError, match=r"no space left in .*cache; free some there, name another disk with data\.cache\.path"):
        _cache(tmp_path).open(_wanted(tmp_path, _whole))
    assert _left(tmp_path) == []


def test_a_folder_that_can_not_be_made_names_the_field(tmp_path):
    (tmp_path / "cache").write_text("a file")
    with pytest.raises(FetchError, match=r"data\.cache\.path"):
        _cache(tmp_path).open(_wanted(tmp_path, _whole, name="d/a.tar"))


def test_a_folder_that_can_not_be_written_names_the_field(tmp_path, monkeypatch):
    def denied(*args):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(ShardCache, "_make_room", denied)
    with pytest.raises(FetchError, match=r"Permission denied\); name a folder that can be written with data\.cache\.path"):
        _cache(tmp_path).open(_wanted(tmp_path, _whole))


def test_a_prepared_folder_of_this_machine_touches_no_cache(dataset, config, tmp_path):
    localise(str(dataset[0]), cache=config, allow_pipe=False)
    assert not (tmp_path / "cache").exists()


def test_a_foreign_tar_that_came_damaged_is_fetched_again_by_the_next_start(store, config):
    store.files = {name: content for name, content in store.files.items() if name.endswith(".tar")}
    store.files["set/dataset.yaml"] = dump_yaml(SPEC).encode()
    store.faults["set/shard-00001.tar"] = ["short"]
    with pytest.raises(DataError, match=r"1 of 3 tars can't be used.*\n.*shard-00001\.tar: at offset"):
        localise(f"{store.url}/set", cache=config, allow_pipe=False)
    assert read_header(localise(f"{store.url}/set", cache=config, allow_pipe=False).folder).num_samples == 14
    assert [len(store.downloads(f"set/shard-0000{n}.tar")) for n in range(3)] == [1, 2, 1]


@pytest.fixture
def clock(monkeypatch):
    """Seconds that pass as they are slept, and no others."""
    now = [0.0]
    monkeypatch.setattr(transport.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(transport.time, "sleep", lambda seconds: now.__setitem__(0, now[0] + seconds))
    return now


def test_a_store_may_fail_for_minutes_and_is_asked_less_and_less_often(tmp_path, clock):
    asked = []

    def broken(start):
        asked.append(clock[0])
        if clock[0] < 240:
            raise ConnectionResetError("gone")
        yield CONTENT[start:]

    os.close(_cache(tmp_path, patience=Patience()).open(_wanted(tmp_path, broken)))
    pauses = [after - before for before, after in pairwise(asked)]
    assert pauses[:7] == pytest.approx([0.5, 1, 2, 4, 8, 16, 30], abs=1e-6) and max(pauses) == pytest.approx(30)


def test_a_store_that_fails_for_longer_is_given_up_and_one_that_gets_on_is_not(tmp_path, clock):
    def broken(start):
        if clock[0] < 400:
            raise ConnectionResetError("gone")
        yield CONTENT

    def slow(start):
        clock[0] += 100
        yield CONTENT[start : start + len(CONTENT) // 8]

    with pytest.raises(FetchError, match=r"after \d+ attempts \(ConnectionResetError: gone\)"):
        _cache(tmp_path, patience=Patience()).open(_wanted(tmp_path, broken))
    os.close(_cache(tmp_path, patience=Patience()).open(_wanted(tmp_path, slow, name="b.tar")))
    assert clock[0] > 800


def test_a_pause_ends_when_reading_does(tmp_path):
    stop, cache = threading.Event(), _cache(tmp_path, patience=Patience(backoff_s=60, longest_s=60))

    def broken(start):
        threading.Timer(0.05, stop.set).start()
        raise ConnectionResetError("gone")
        yield b""

    began = time.monotonic()
    with pytest.raises(FetchError, match="reading ended"):
        cache.open(_wanted(tmp_path, broken), stopped=stop.is_set)
    assert time.monotonic() - began < 20


def test_a_store_that_sends_without_end_is_cut_off_at_the_size_of_the_shard(tmp_path):
    largest = 0

    def endless(start):
        nonlocal largest
        while True:
            yield bytes(100_000)
            largest = max(largest, *(part.stat().st_size for part in (tmp_path / "cache").glob(".a.tar.partial-*")))

    with pytest.raises(FetchError, match=r"after 4 attempts \(WrongContentError: more than 256,000 bytes came"):
        _cache(tmp_path).open(_wanted(tmp_path, endless))
    assert largest == len(CONTENT) and _left(tmp_path) == []


def test_an_index_or_its_hashes_that_rotted_in_the_cache_are_fetched_anew(store, dataset, config):
    at, _ = _open(f"{store.url}/set", config)
    hashes = read_header(at.folder).hashes_name
    for name in ("index.parquet", hashes):
        content = bytearray((at.folder / name).read_bytes())
        content[len(content) // 2] ^= 1
        (at.folder / name).write_bytes(content)
    again, _ = _open(f"{store.url}/set", config)
    assert again.folder == at.folder and list(read_rows(at.folder)) == list(read_rows(dataset[0]))
    assert [len(store.downloads(f"set/{name}")) for name in ("index.parquet", hashes)] == [2, 2]


def test_versions_of_an_index_that_nobody_opened_for_a_month_are_removed(store, config):
    at, _ = _open(f"{store.url}/set", config)
    for name, age in (("index-a", 40), ("index-b", 10)):
        (at.folder.parent / name).mkdir()
        (at.folder.parent / name / "index.parquet").write_bytes(b"x")
        os.utime(at.folder.parent / name / "index.parquet", times=(time.time() - age * 86400,) * 2)
    os.utime(at.folder / "index.parquet", times=(time.time() - 40 * 86400,) * 2)
    _open(f"{store.url}/set", config)
    assert sorted(path.name for path in at.folder.parent.glob("index-*")) == sorted(["index-b", at.folder.name])


def test_a_shard_that_is_not_had_is_told_of_by_a_new_error_each_time(store, config):
    _, source = _open(f"{store.url}/set", config)
    store.faults["set/shard-00001.tar"] = ["403"]
    errors = []
    for _ in range(3):
        with pytest.raises(FetchError) as caught:
            source.open(1)
        errors.append(caught.value)
    assert len({id(error) for error in errors}) == 3 and len({str(error) for error in errors}) == 1


def test_a_command_is_run_only_where_the_config_allows_it(dataset, config, tmp_path):
    flag = tmp_path / "flag"
    with pytest.raises(ConfigError, match=r"data\.allow_pipe=true"):
        localise(f"pipe:touch {flag} {{}}", cache=config, allow_pipe=False)
    assert not flag.exists()


@pytest.mark.parametrize("allow_pipe", [False, True])
def test_a_layout_is_never_a_command(dataset, config, tmp_path, allow_pipe):
    flag, tars = tmp_path / "flag", f"{dataset[0]}/shard-{{00000..00001}}.tar"
    with pytest.raises(ConfigError, match=r"data\.layout=.* is a command"):
        localise(tars, cache=config, allow_pipe=allow_pipe, layout=f"pipe:touch {flag}")
    assert not flag.exists()


def test_the_rules_refuse_a_layout_that_is_a_command_or_holds_a_secret(dataset):
    for layout, said in (("pipe:cat x", "is a command"), ("https://me:pw@host/x.yaml", "environment variable")):
        for allow_pipe in (False, True):
            one = DataConfig(path=str(dataset[0]), layout=layout, allow_pipe=allow_pipe)
            mixed = DataConfig(mixture=({"path": str(dataset[0]), "layout": layout},), allow_pipe=allow_pipe)
            for data, field in ((one, "data.layout"), (mixed, "data.mixture[0].layout")):
                (problem,) = data_problems(TrainConfig(data=data), world=1)
                assert problem.fields == (field,) and said in problem.message and "pw" not in problem.message


def test_a_prepared_data_set_is_read_through_a_command(dataset, config):
    folder, _ = dataset
    at, source = _open(f"pipe:cat {folder}/{{}}", config, allow_pipe=True)
    assert list(read_rows(at.folder)) == list(read_rows(folder))
    assert _content(source, 1) == (folder / "shard-00001.tar").read_bytes()
    assert _open(f"pipe:cat {folder}/{{}}", config, allow_pipe=True)[0].folder == at.folder


def test_webdatasets_form_of_a_pipe_names_a_tar_per_command(dataset, config, tmp_path):
    folder, written = dataset
    layout = tmp_path / "layout.yaml"
    layout.write_text(dump_yaml(SPEC))
    url = f"pipe:cat {folder}/shard-{{00000..00001}}.tar"
    with pytest.raises(ConfigError, match=r"data\.layout="):
        localise(url, cache=config, allow_pipe=True)
    at, source = _open(url, config, allow_pipe=True, layout=str(layout))
    rows = list(read_rows(at.folder))
    assert [r.key.rpartition("/")[2] for r in rows] == list(written)[:10]
    assert _content(source, 0) == (folder / "shard-00000.tar").read_bytes()


def test_a_command_that_fails_says_its_code_and_last_words(config):
    with pytest.raises(DataError, match=r"pipe:cat .*code 1: cat: /nowhere/index\.parquet: No such file"):
        localise("pipe:cat /nowhere/{}", cache=config, allow_pipe=True)


def test_a_shard_behind_a_command_that_breaks_off_is_not_taken_for_whole(dataset, config, tmp_path):
    folder, _ = dataset
    script = tmp_path / "half.py"
    script.write_text("import sys\ndata = open(sys.argv[1], 'rb').read()\nsys.stdout.buffer.write(data[: len(data) // 2])\n")
    at, _ = _open(f"pipe:cat {folder}/{{}}", config, allow_pipe=True)
    name = read_header(folder).shards[0].name
    wanted = remote._wanted(
        tmp_path / "cache" / "x.tar", remote.origin_of(f"pipe:{sys.executable} {script} {folder}/{name}"), num_bytes=10, xxh3="0"
    )
    with pytest.raises(FetchError, match="attempts"):
        _cache(tmp_path).open(wanted)
    assert at.remote


def test_credentials_of_the_environment_are_used_and_shown_nowhere(store, config, monkeypatch, caplog):
    monkeypatch.setenv("SIGNATURE", "s3cret")
    url = f"{store.url}/set?sig=$SIGNATURE"
    store.faults["set/shard-00000.tar"] = ["503"] * 9
    at, source = _open(url, config)
    with pytest.raises(FetchError) as caught:
        source.open(0)
    shown = f"{caught.value!r} {caught.value.__cause__!r} {caplog.text} {source.path_of(0)} {at}"
    assert "s3cret" not in shown
    assert "/set/shard-00000.tar?..." in source.path_of(0)


@pytest.mark.parametrize("url", ["https://me:pw@host/set", "s3://KEY@bucket/set", "https://host/set?X-Amz-Signature=abc"])
def test_a_secret_in_a_url_is_refused_as_every_dump_of_the_config_would_show_it(url, config):
    with pytest.raises(ConfigError, match="environment variable") as caught:
        localise(url, cache=config, allow_pipe=False)
    assert not any(secret in str(caught.value) for secret in ("pw", "KEY", "abc"))
    with pytest.raises(ConfigError, match=r"data\.layout=.*environment variable"):
        localise("memory://set", cache=config, allow_pipe=False, layout=url)


NAMES = [
    "../../etc/x.tar",
    "/etc/x.tar",
    "a/../x.tar",
    "./x.tar",
    "$HOME.tar",
    "${HOME}.tar",
    "a b.tar",
    "x?.tar",
    "x#.tar",
    "x%2e.tar",
]
NAMES += [
    "'x'.tar",
    '"x".tar',
    "-x.tar",
    "a/-x.tar",
    "x{}.tar",
    "x\n.tar",
    "x\\.tar",
    "http://host/x.tar",
    "x;y.tar",
    "",
    "a//x.tar",
    "ü.tar",
]


@pytest.mark.parametrize("name", NAMES)
def test_shard_names_of_an_index_made_elsewhere_stay_in_the_cache(name):
    with pytest.raises(DataError, match="stays in the data set's folder"):
        remote._kept_as(ShardRow(name=name, num_bytes=1, num_samples=1, xxh3="0"), where="https://host/set")
    for folder in ("https://host/set", "pipe:cat {}"):
        with pytest.raises(DataError, match="stays in the data set's folder"):
            remote.origin_in(folder, name)
    with pytest.raises(DataError, match="stays in the data set's folder"):
        remote._kept_as(ShardRow(name="x.tar", num_bytes=1, num_samples=1, xxh3=name), where="https://host/set")


def test_shard_names_that_are_made_here_are_plain():
    for name in ("16x256x256-000000-0123456789abcdef.tar", "shard-00000.tar", "a/b_c/x=1+2.tar"):
        assert plain_name(name, where="it") == name
    with pytest.raises(DataError, match=r"ends in \.tar"):
        remote._kept_as(ShardRow(name="a.txt", num_bytes=1, num_samples=1, xxh3="0"), where="https://host/set")


def test_an_index_made_elsewhere_reads_nothing_of_the_environment(dataset, config, monkeypatch, tmp_path):
    monkeypatch.setenv("MY_SECRET_KEY", "hunter2")
    written = list(dataset[1].values())[:5]
    folder = tmp_path / "theirs"
    (shard,) = (s for s in read_header(dataset[0]).shards if s.name == written[0].row.shard)
    rows = [replace(w.row, shard="$MY_SECRET_KEY x.tar") for w in written]
    folder.mkdir()
    write_index(folder, rows=rows, shards=[replace(shard, name="$MY_SECRET_KEY x.tar")], spec=SPEC.model_dump(mode="json"))
    with serving(Store(files={f"set/{path.name}": path.read_bytes() for path in folder.iterdir()})) as store:
        with pytest.raises(DataError, match="names a file"):
            _open(f"{store.url}/set", config)
        assert "hunter2" not in str(store.asked)


def test_a_name_is_put_into_the_words_of_a_command_after_variables_and_splitting(monkeypatch):
    monkeypatch.setenv("PRE", "a {} b")
    monkeypatch.setenv("PRE_KEY", "hunter2")
    assert pipe_arguments("pipe:cat $PRE{} 'x y/{}'", name="_KEY") == ["cat", "a {} b_KEY", "x y/_KEY"]


COMMANDS = [
    "pipe:env AWS_SECRET_ACCESS_KEY=abc aws s3 cp s3://b/{} -",
    "pipe:curl -u user:hunter2 https://h/{}",
    "pipe:curl --user=user:hunter2 https://h/{}",
    "pipe:curl -H 'X-Api-Key: abc' https://h/{}",
    "pipe:curl -H 'Authorization: Basic dXNlcjpwYXNz' https://h/{}",
    "pipe:curl https://h/{}#sig=abcdef",
    "https://host/set#sig=abcdef",
]


@pytest.mark.parametrize("url", COMMANDS)
def test_words_that_announce_a_secret_are_refused_in_commands_and_fragments(url):
    assert (said := secret_in(url)) is not None
    assert not any(secret in said for secret in ("hunter2", "abc", "dXNl"))


@pytest.mark.parametrize(
    "url",
    [
        "pipe:env AWS_SECRET_ACCESS_KEY=$KEY aws s3 cp s3://b/{} -",
        "pipe:curl -u $USER:$PASSWORD https://h/{}",
        "pipe:curl -H 'Authorization: Bearer $TOKEN' https://h/{}?sig=$SIG",
        "pipe:aws s3 cp s3://tokens/monkeys/{} -",
        "data/set#1",
        "https://host/set#$SIG",
    ],
)
def test_commands_that_name_variables_are_allowed(url):
    assert secret_in(url) is None


def test_what_can_not_be_mended_by_trying_again_is_final():
    assert transport.is_final(FileNotFoundError()) and transport.is_final(PermissionError())
    assert not transport.is_final(ConnectionResetError()) and not transport.is_final(TimeoutError())


S3_LIST = (
    '<?xml version="1.0"?><ListBucketResult xmlns="http://s3.amazonaws.com/doc/2006-03-01/"><Name>b</Name><KeyCount>0</KeyCount>'
    "<IsTruncated>false</IsTruncated></ListBucketResult>"
)


def test_s3_is_read_with_the_credentials_of_the_environment(dataset, config, monkeypatch):
    pytest.importorskip("s3fs")
    folder, _ = dataset
    files = {f"bucket/set/{path.name}": path.read_bytes() for path in folder.iterdir()}
    with serving(Store(files=files)) as store:
        for name, value in {
            "AWS_ENDPOINT_URL": store.url,
            "AWS_ACCESS_KEY_ID": "theid",
            "AWS_SECRET_ACCESS_KEY": "thesecret",
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_CONFIG_FILE": "/dev/null",
        }.items():
            monkeypatch.setenv(name, value)
        at, source = _open("s3://bucket/set", config)
        assert list(read_rows(at.folder)) == list(read_rows(folder))
        assert _content(source, 1) == (folder / "shard-00001.tar").read_bytes()
        assert any("theid" in headers.get("Authorization", "") for headers in store.headers)
