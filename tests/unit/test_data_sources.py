"""Loading from sources of shards that are slow, that fail for a while, or whose copies rot."""

from __future__ import annotations

import os
import shutil
import threading
import time
from dataclasses import replace

import pytest
import torch
from dataset_factory import write_dataset

from opensora_dist.config.data_rules import data_problems
from opensora_dist.config.train import DataConfig, TrainConfig
from opensora_dist.core.types import Region, Share, Thw
from opensora_dist.data import ahead
from opensora_dist.data.index import Index
from opensora_dist.data.loader import Loader
from opensora_dist.data.order import build_order
from opensora_dist.data.reader import ShardReader
from opensora_dist.parallel.keys import Keys

SHAPE = Thw(2, 16, 24)


class Source:
    """Shards of a folder; what a test changes, it overrides."""

    def __init__(self, index):
        self.whole = index.shard_source

    def open(self, number):
        return self.whole.open(number)

    def path_of(self, number):
        return self.whole.path_of(number)

    def prefetch(self, numbers):
        pass

    def discard(self, number):
        return False

    def close(self):
        pass


class Slow(Source):
    """Brings no shard but the first few until it is closed, as one that is fetched; it can be used again after that."""

    def __init__(self, index, *, quick):
        super().__init__(index)
        self.quick, self.asked, self.waits = quick, 0, threading.Event()
        self._stop = threading.Event()

    def open(self, number):
        self.asked += 1
        if self.asked <= self.quick:
            return super().open(number)
        self.waits.set()
        if self._stop.wait(30):
            raise OSError("reading ended")
        raise AssertionError("nobody closed the source")

    def close(self):
        stop, self._stop = self._stop, threading.Event()
        stop.set()


class Rotted(Source):
    """Its copies are damaged; the originals, which it fetches anew, are not (unless ``lost``)."""

    def __init__(self, index, copies, *, lost=False):
        super().__init__(index)
        self.copies, self.lost, self.discarded = copies, lost, []
        for shard in index.shards:
            shutil.copy(index.folder / shard.name, copies / shard.name)
        self._paths = [copies / shard.name for shard in index.shards]

    def open(self, number):
        return os.open(self._paths[number], os.O_RDONLY)

    def discard(self, number):
        self.discarded.append(number)
        if not self.lost:
            self._paths[number].unlink()
            shutil.copy(self.whole.path_of(number), self._paths[number])
        return True


@pytest.fixture
def index(tmp_path):
    folder = tmp_path / "data"
    write_dataset(folder, samples={SHAPE: 24}, shard_samples=2)
    return Index.open(folder)


def loader(index, **changes):
    arguments = {
        "share": lambda latent: Share(0, 1, Region.whole(latent)),
        "accum": 1,
        "start_step": 0,
        "num_steps": 12,
        "loss_weight": "sample",
        "reader_threads": 1,
        "prefetch_batches": 3,
        "dtype": torch.float32,
        "device": torch.device("cpu"),
    } | changes
    return Loader(index, build_order(index, DataConfig(global_batch=6), keys=Keys(0)), **arguments)


def flip_a_bit(path, offset):
    data = bytearray(path.read_bytes())
    data[offset] ^= 1
    path.write_bytes(data)


def test_a_clean_stop_does_not_wait_for_the_shards_that_are_being_fetched(index):
    source = Slow(index, quick=6)  # shards of the first batch at most
    with loader(replace(index, shard_source=source)) as data:
        steps = iter(data)
        next(steps)
        assert source.waits.wait(10)
        began = time.monotonic()
    assert time.monotonic() - began < 5
    assert not [t for t in threading.enumerate() if t.name.startswith("shard-reader")]


def test_a_store_that_fails_for_a_while_is_no_damage_for_ever(index):
    source = Source(index)
    down = replace(index, shard_source=source)
    with loader(down, num_steps=8, prefetch_batches=1) as data:  # two epochs
        bad = []
        for step in data:
            bad.append(sum(why is not None for why in step.micros[0].bad))
            source.open = failing if not bad[1:] else source.whole.open
    assert sum(bad[:3]) > 0 and bad[3:] == [0] * 5


def failing(number):
    raise OSError(f"503 for {number}")


def test_bytes_that_are_wrong_are_known_from_then_on_and_not_read_again(index, monkeypatch):
    row, asked = 5, []
    flip_a_bit(index.shard_path(row), index.text_place(row).offset)
    read_into = ShardReader.read_into
    monkeypatch.setattr(
        ShardReader, "read_into", lambda self, targets: asked.extend(t.row for t in targets) or read_into(self, targets)
    )
    with loader(index, num_steps=12) as data:
        bad = [key for step in data for key, why in zip(step.micros[0].keys, step.micros[0].bad) if why is not None]
    assert bad == [index.key[row]] * 3 and asked.count(row) == 1


def test_a_copy_that_rotted_is_fetched_again_and_the_sample_is_whole(index, tmp_path):
    (tmp_path / "copies").mkdir()
    source = Rotted(index, tmp_path / "copies")
    flip_a_bit(source.copies / index.shard_path(5).name, index.latents_place(5).offset + 3)
    copied = ShardReader(replace(index, shard_source=source))
    (sample,), (original,) = copied.read([5]), ShardReader(index).read([5])
    assert (sample.latents == original.latents).all() and (sample.text == original.text).all()
    copied.read(range(24))
    assert source.discarded == [int(index.shard[5])]


def test_where_the_store_has_the_same_wrong_bytes_it_is_damage_after_one_more_read(index, tmp_path):
    (tmp_path / "copies").mkdir()
    source = Rotted(index, tmp_path / "copies", lost=True)
    flip_a_bit(source.copies / index.shard_path(5).name, index.latents_place(5).offset + 3)
    found = ShardReader(replace(index, shard_source=source)).try_read(range(24))
    assert [row for row, sample in enumerate(found) if getattr(sample, "lasting", False)] == [5]
    assert source.discarded == [int(index.shard[5])]


def test_weights_and_order_are_worked_out_once_a_step_and_not_in_the_consumers_thread(index, monkeypatch):
    threads, weigh = [], ahead.position_weights
    monkeypatch.setattr(ahead, "position_weights", lambda *args: threads.append(threading.current_thread().name) or weigh(*args))
    with loader(index, accum=3, num_steps=8) as data:
        planner, asked = data._planner, []
        batch = planner._order.batch
        planner._order.batch = lambda step: asked.append(threading.current_thread().name) or batch(step)
        for step in data:
            weight = sum(float(micro.weight_B.sum()) * micro.latent.volume for micro in step.micros)
            assert weight == pytest.approx(1)
    assert len(threads) == len(asked) == 8
    assert all(name.startswith("shard-reader") for name in threads + asked)


def test_more_threads_than_slots_are_refused_with_the_way_out():
    def said(**data):
        return [p.message for p in data_problems(TrainConfig(data=DataConfig(path=".", **data)), world=1)]

    (message,) = said(reader_threads=3)
    assert "data.prefetch_batches=2" in message and "use data.prefetch_batches=4, or data.reader_threads=2" in message
    assert not said(reader_threads=3, prefetch_batches=3)
