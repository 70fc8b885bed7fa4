"""Runs on data that lies elsewhere: equal to runs on the folder it was copied from, also where a shard can't be had."""

from __future__ import annotations

import shutil
from contextlib import ExitStack
from typing import Any
from unittest import mock

import pytest
from dataset_factory import SPEC, write_dataset
from stores import Store, serving
from training import SAMPLES, curve, events, metrics, overrides, train_here

from opensora_dist.cli.main import main
from opensora_dist.config.load import dump_yaml
from opensora_dist.data import origins, remote
from opensora_dist.data.transport import Patience

RUN = ("run.steps=6", "run.dtype=float64", "checkpoint.every_steps=100")
SP = ("parallel.sp.degree=2",)


def _impatient() -> Any:
    """Of a rank: little time passes before a store is given up."""
    stack = ExitStack()
    stack.enter_context(mock.patch.object(remote, "PATIENCE", Patience(backoff_s=0.01)))
    stack.enter_context(mock.patch.object(origins, "_SILENCE_S", 0.3))
    return stack


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("elsewhere") / "set"
    write_dataset(path, samples=SAMPLES, shard_samples=4)
    return path


@pytest.fixture
def store(folder):
    with serving(Store(files={f"set/{path.name}": path.read_bytes() for path in folder.iterdir()})) as store:
        yield store


def _lacking(folder, tmp_path):
    """The folder without its third shard: what a run elsewhere is compared with."""
    path = tmp_path / "lacking"
    shutil.copytree(folder, path)
    (path / "shard-00002.tar").unlink()
    return path


def test_a_run_on_a_store_is_the_run_on_the_folder(ranks, folder, store, tmp_path):
    ranks.run(train_here, overrides(folder, tmp_path / "here", *RUN, *SP), world=2)
    there = [*RUN, *SP, f"data.cache.path={tmp_path / 'cache'}", "data.cache.patience_s=0.1"]
    ranks.run(train_here, overrides(f"{store.url}/set", tmp_path / "there", *there), _impatient, world=2)
    assert curve(tmp_path / "there") == curve(tmp_path / "here")
    assert all(len(store.downloads(name)) <= 1 for name in store.files), "two ranks fetched the same"


@pytest.mark.parametrize("fault", ["503", "cut", "flip", "hang"])
def test_a_shard_that_can_not_be_had_is_replaced_on_all_ranks_and_nothing_hangs(ranks, folder, store, tmp_path, fault):
    ranks.run(train_here, overrides(_lacking(folder, tmp_path), tmp_path / "here", *RUN, *SP), world=2)
    store.faults["set/shard-00002.tar"] = [fault] * 1000
    there = [*RUN, *SP, f"data.cache.path={tmp_path / 'cache'}", "data.cache.patience_s=0.1"]
    ranks.run(train_here, overrides(f"{store.url}/set", tmp_path / "there", *there), _impatient, world=2)
    assert curve(tmp_path / "there") == curve(tmp_path / "here")
    told = [
        {(e["step"], e["key"], e["substitute"]) for e in events(tmp_path / name, "sample_quarantined")}
        for name in ("here", "there")
    ]
    assert told[0] == told[1] and told[0]
    assert all("can't be fetched, after" in e["reason"] for e in events(tmp_path / "there", "sample_quarantined"))


def test_foreign_tars_of_a_store_train_and_their_ranks_make_one_index(ranks, folder, store, tmp_path):
    store.files = {name: content for name, content in store.files.items() if name.endswith(".tar")}
    store.files["set/dataset.yaml"] = dump_yaml(SPEC).encode()
    given = overrides(f"{store.url}/set", tmp_path / "run", *RUN, f"data.cache.path={tmp_path / 'cache'}")
    ranks.run(train_here, given, _impatient, world=2)
    assert [m["step"] for m in metrics(tmp_path / "run")] == list(range(1, 7))
    assert len(list((tmp_path / "cache").rglob("index.parquet"))) == 1
    assert all(len(store.downloads(name)) == 1 for name in store.files if name.endswith(".tar"))


def test_the_command_takes_a_url_and_its_run_directory_holds_no_secret(store, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("SIGNATURE", "s3cret")
    given = overrides(f"{store.url}/set?sig=$SIGNATURE", tmp_path / "run", *RUN, f"data.cache.path={tmp_path / 'cache'}")
    assert main(["train", *given, "run.steps=2"]) == 0
    said = capsys.readouterr()
    assert "s3cret" not in said.out + said.err
    for path in (p for p in (tmp_path / "run").rglob("*") if p.is_file()):
        assert b"s3cret" not in path.read_bytes(), path
    assert "$SIGNATURE" in (tmp_path / "run" / "config.yaml").read_text()


def test_the_command_refuses_a_secret_in_a_url_and_says_where_it_belongs(tmp_path, capsys):
    given = overrides("https://me:s3cret@host/set", tmp_path / "run", *RUN)
    assert main(["train", *given]) == 2
    said = capsys.readouterr()
    assert "environment variable" in said.err and "s3cret" not in said.out + said.err
    assert not (tmp_path / "run").exists()


def test_the_command_refuses_a_pipe_unless_it_is_allowed(folder, tmp_path, capsys):
    given = overrides(f"pipe:cat {folder}/{{}}", tmp_path / "run", *RUN, f"data.cache.path={tmp_path / 'cache'}", "run.steps=2")
    assert main(["train", *given]) == 2
    assert "data.allow_pipe=true" in capsys.readouterr().err
    assert main(["train", *given, "data.allow_pipe=true"]) == 0
