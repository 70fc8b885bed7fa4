"""The benchmark of reading: every way reads every sample, what is missing is said, a bar that is not met is the exit code."""

from __future__ import annotations

import io
import json
import os
import sys
from pathlib import Path

import pytest
from rich.console import Console

from opensora_dist.cli.main import main
from opensora_dist.core.types import Thw
from opensora_dist.recipes.bench import data, data_ways
from opensora_dist.recipes.bench.data import Bar, DataOptions, bench_data
from opensora_dist.recipes.bench.data_ways import DataCase, our_ways, write_samples
from opensora_dist.recipes.bench.page import BEGIN, END


@pytest.fixture
def small(monkeypatch):
    """Samples of some hundred bytes, two to a shard."""
    monkeypatch.setattr(data_ways, "TEXT_TOKENS", 3)
    monkeypatch.setattr(data_ways, "TEXT_WIDTH", 64)
    monkeypatch.setattr(data, "CLIPS", (Thw(2, 32, 32),))
    monkeypatch.setattr(data_ways, "_SHARD_BYTES", 1400)
    monkeypatch.setattr(data, "_LEAST_S", 1e-9)


def test_samples_have_the_sizes_that_were_asked_for():
    sizes = [DataCase(clip=clip, folder=None, batch=8, threads=2).sample_bytes / 1e6 for clip in data.CLIPS]
    assert sizes == pytest.approx([1.1, 3.1], abs=0.05)


def test_all_of_our_ways_read_all_samples_of_whole_batches(small, tmp_path):
    case = DataCase(clip=Thw(2, 32, 32), folder=tmp_path, batch=2, threads=2)
    index = write_samples(case, num_bytes=9 * case.sample_bytes)
    assert len(index) % 2 == 0 and len(index.shards) > 1
    before = len(os.listdir("/proc/self/fd"))
    with our_ways(index, case, epochs=3) as ways:
        for name, way in ways.items():
            timed = way()
            assert timed.samples == len(index) * (3 if "loader" in name else 1) and timed.seconds > 0
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_file_system_that_is_memory_is_told_from_others():
    assert not data.in_memory(Path("/proc"))
    mounts = [line.split() for line in Path("/proc/mounts").read_text().splitlines()]
    memory = [mount[1] for mount in mounts if mount[2] == "tmpfs" and os.access(mount[1], os.X_OK)]
    assert all(data.in_memory(Path(folder)) for folder in memory)


def test_cold_figures_of_a_disk_that_is_memory_are_left_out_and_that_is_said(small, tmp_path, monkeypatch):
    shown, out = io.StringIO(), tmp_path / "data.json"
    monkeypatch.setattr(data, "in_memory", lambda folder: True)
    options = DataOptions(num_bytes=10_000, rounds=2, batch=2, threads=2, disk_threads=3, python=sys.executable, work=tmp_path)
    monkeypatch.setattr(data.Others, "open", lambda self, *_args, **_more: [])
    bench_data(options, out=out, page=None, console=Console(file=shown))
    (found,) = json.loads(out.read_text())["cases"]
    assert found["cold"] == {} and {bar["met"] for bar in found["bars"] if bar["cold"]} == {None}
    assert "from the disk: left out" in shown.getvalue() and "--work" in shown.getvalue()
    assert data.markdown([found])


def test_a_run_writes_what_it_measured_and_says_what_it_left_out(small, tmp_path):
    pytest.importorskip("webdataset")
    shown, out = io.StringIO(), tmp_path / "data.json"
    options = DataOptions(num_bytes=10_000, rounds=2, batch=2, threads=2, disk_threads=3, python=sys.executable, work=tmp_path)
    page = tmp_path / "page.md"
    page.write_text(f"above\n{BEGIN}{END}\nbelow\n")
    bench_data(options, out=out, page=page, console=Console(file=shown))
    (found,) = json.loads(out.read_text())["cases"]
    assert {len(rates) for kind in ("warm", "cold") for rates in found[kind].values()} == {2}
    ways = set(found["warm"]) | set(found["missing"])
    assert {"webdataset", "webdataset, DataLoader"} <= set(found["warm"]) and {"wids", "MosaicML streaming"} <= ways
    for name, why in found["missing"].items():
        assert "can't be imported" in why and f"{name}: left out: {why}" in " ".join(shown.getvalue().split())
    assert {bar["met"] for bar in found["bars"]} <= {True, False}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data.json", "page.md"]
    rows = [line.split(" | ")[0].strip("| ") for line in page.read_text().splitlines() if line.startswith("| ")]
    assert set(found["warm"]) | set(found["cold"]) <= set(rows) and len(rows) == len(set(rows)) + 1  # two heads


def test_a_bar_is_the_median_of_ratios_of_one_round():
    bar = Bar(name="a over b", of="a", to="b", cold=False, least=1.0)
    assert bar.found({"a": [1.0, 8.0, 3.0], "b": [2.0, 2.0, 1.0]}) == 3.0
    assert bar.found({"b": [1.0]}) is None


def test_options_that_make_no_sense_are_refused_together(tmp_path, capsys):
    assert main(["bench", "data", "--rounds", "0", "--work", str(tmp_path / "none"), "--python", "no-such-python"]) == 2
    said = capsys.readouterr().err
    assert "--rounds must be 1 or more" in said and "is no folder" in said and "is no program" in said
