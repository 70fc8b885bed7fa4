"""Reading and loading: what was written is what arrives, whatever the layout; damage is named, threads end."""

from __future__ import annotations

import os
import threading
import time

import numpy as np
import pytest
import torch
from dataset_factory import SPEC, write_dataset

from opensora_dist.config.train import DataConfig
from opensora_dist.core.errors import ConfigError, DataError
from opensora_dist.core.types import Region, Share, Thw
from opensora_dist.data import reader as reader_module
from opensora_dist.data.index import Index
from opensora_dist.data.loader import Loader
from opensora_dist.data.order import build_order
from opensora_dist.data.reader import ShardReader
from opensora_dist.parallel.keys import Keys, sample_id

SMALL, LARGE = Thw(2, 16, 24), Thw(4, 16, 16)


@pytest.fixture
def dataset(tmp_path):
    written = write_dataset(tmp_path, samples={SMALL: 26, LARGE: 13})
    return Index.open(tmp_path), written


def loader(index, **changes):
    order = changes.pop("order", None) or build_order(index, DataConfig(global_batch=8), keys=Keys(0))
    data_rank, data_size = changes.pop("data_rank", 0), changes.pop("data_size", 1)
    arguments = {
        "share": lambda latent: Share(data_rank, data_size, Region.whole(latent)),
        "accum": 1,
        "start_step": 0,
        "num_steps": 6,
        "loss_weight": "sample",
        "reader_threads": 2,
        "prefetch_batches": 3,
        "dtype": torch.float32,
        "device": torch.device("cpu"),
    } | changes
    return Loader(index, order, **arguments)


def flip_bit(index, row, offset):
    path = index.shard_path(row)
    data = bytearray(path.read_bytes())
    data[offset] ^= 1
    path.write_bytes(data)


def num_open(folder):
    """Descriptors of this process on shards in ``folder``."""
    links = [f"/proc/self/fd/{fd}" for fd in os.listdir("/proc/self/fd")]
    files = [os.readlink(link) for link in links if os.path.islink(link)]
    return sum(file.startswith(str(folder)) and file.endswith(".tar") for file in files)


def reader_threads():
    return [t for t in threading.enumerate() if t.name.startswith("shard-reader")]


def test_read_returns_what_was_written(dataset):
    index, written = dataset
    reader = ShardReader(index)
    for rows in ([3], [0, 38, 7], list(range(20))):
        for row, sample in zip(rows, reader.read(rows), strict=True):
            np.testing.assert_array_equal(sample.latents, written[index.key[row]].latents)
            np.testing.assert_array_equal(sample.text, written[index.key[row]].text)
    reader.close()


def test_memory_is_used_again(dataset):
    index, _ = dataset
    reader = ShardReader(index)
    addresses = {reader.read(list(range(8)))[0].latents.ctypes.data for _ in range(4)}
    assert len(addresses) == 1


def test_short_reads_are_continued(dataset, monkeypatch):
    index, written = dataset
    preadv = os.preadv
    monkeypatch.setattr(reader_module.os, "preadv", lambda fd, buffers, offset: preadv(fd, [buffers[0][:7]], offset))
    sample = ShardReader(index).read([5])[0]
    np.testing.assert_array_equal(sample.latents, written[index.key[5]].latents)


def test_few_files_are_open_at_once(tmp_path, monkeypatch):
    write_dataset(tmp_path, samples={SMALL: 12}, shard_samples=1)
    monkeypatch.setattr(reader_module, "_MAX_OPEN_FILES", 3)
    reader = ShardReader(Index.open(tmp_path))
    for _ in range(2):
        reader.read(list(range(12)))
        assert num_open(tmp_path) == 3
    reader.close()
    assert num_open(tmp_path) == 0


@pytest.mark.parametrize("kind", ["latents", "text"])
def test_a_flipped_bit_names_sample_shard_and_offset(dataset, kind):
    index, _ = dataset
    offset = getattr(index, f"{kind}_place")(4).offset
    flip_bit(index, 4, offset + 1)
    with pytest.raises(DataError) as error:
        ShardReader(index).read([3, 4])
    what = {"latents": "latents, frame 0", "text": "text"}[kind]
    for part in (str(index.shard_path(4)), repr(index.key[4]), f"{what} at offset {offset}", "expected", "data prepare"):
        assert part in str(error.value)
    ShardReader(index).read([3])  # the others are still good


def test_a_shard_cut_after_opening_is_named(dataset):
    index, _ = dataset
    row = 4
    with open(index.shard_path(row), "r+b") as handle:
        handle.truncate(index.latents_place(row).offset + 10)
    with pytest.raises(DataError, match=r"latents, frame 0 at offset \d+: the file ends after 10 of [\d,]+ bytes"):
        ShardReader(index).read([row])


def test_a_shard_gone_after_opening_is_named(dataset):
    index, _ = dataset
    index.shard_path(0).unlink()
    with pytest.raises(DataError, match=r"sample 'clip-00000', latents, frame 0 at offset \d+: can't be read \(.*No such file"):
        ShardReader(index).read([0])


@pytest.mark.parametrize("stored", ["float16", "float32"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_batches_hold_normalised_latents_and_padded_text(tmp_path, stored, dtype):
    written = write_dataset(tmp_path, samples={SMALL: 9, LARGE: 8}, dtype=stored)
    index = Index.open(tmp_path)
    mean, std = (np.array(v)[:, None, None] for v in (SPEC.latent_mean, SPEC.latent_std))
    with loader(index, dtype=dtype, data_size=2, data_rank=1, num_steps=2) as data:
        for step in data:
            rows = data._planner.plan(step.step).batch.rows
            longest = max(len(written[index.key[row]].text) for row in rows)
            (micro,) = step.micros
            assert micro.keys == tuple(index.key[row] for row in rows[4:])
            assert micro.samples == tuple(sample_id(k) for k in micro.keys)
            assert micro.latents_BCthw.dtype == micro.text_BYE.dtype == dtype
            assert micro.text_BYE.shape == (4, longest, 8)
            for b, key in enumerate(micro.keys):
                latents, text = written[key].latents.astype(np.float64), written[key].text
                expected = ((latents - mean) / std).transpose(1, 0, 2, 3)
                np.testing.assert_allclose(micro.latents_BCthw[b].numpy(), expected, rtol=1e-5, atol=1e-6)
                np.testing.assert_array_equal(micro.text_BYE[b, : len(text)].numpy(), text)
                assert not micro.text_BYE[b, len(text) :].any()
                assert micro.text_mask_BY[b].tolist() == [i < len(text) for i in range(longest)]


def collect(index, *, data_size, accum, **changes):
    """Per step: digest and each sample's latents, text shape and weight, in the order of ranks and micro-batches."""
    steps = {}
    for rank in range(data_size):
        with loader(index, data_rank=rank, data_size=data_size, accum=accum, **changes) as data:
            for step in data:
                digest, samples = steps.setdefault(step.step, (step.digest, []))
                assert digest == step.digest
                assert len(step.micros) == accum
                for m in step.micros:
                    for b, key in enumerate(m.keys):
                        shape = tuple(m.text_BYE.shape[1:])
                        samples.append((key, m.samples[b], m.latents_BCthw[b].numpy().tobytes(), shape, float(m.weight_B[b])))
    return steps


@pytest.mark.parametrize("rule", ["sample", "token"])
def test_every_layout_sees_the_same_global_batches_across_epochs(dataset, rule):
    index, _ = dataset
    whole = collect(index, data_size=1, accum=1, loss_weight=rule)
    assert len(whole) == 6  # 4 steps make an epoch
    for data_size, accum in [(1, 2), (2, 1), (2, 2), (4, 1), (4, 2)]:
        assert collect(index, data_size=data_size, accum=accum, loss_weight=rule) == whole


@pytest.mark.parametrize("rule", ["sample", "token"])
def test_weights_times_positions_sum_to_one_over_ranks_and_micro_batches(dataset, rule):
    index, _ = dataset
    total = [0.0] * 6
    for rank in range(2):
        with loader(index, data_rank=rank, data_size=2, accum=2, loss_weight=rule) as data:
            for i, step in enumerate(data):
                for m in step.micros:
                    assert m.weight_B.dtype == torch.float64
                    total[i] += float(m.weight_B.sum()) * m.latents_BCthw[0, 0].numel()
    assert total == pytest.approx([1.0] * 6, rel=1e-14)


@pytest.mark.parametrize("start", [1, 3, 4, 5])
def test_resuming_at_a_step_is_continuing(dataset, start):
    index, _ = dataset
    whole = collect(index, data_size=2, accum=1)
    resumed = collect(index, data_size=2, accum=1, start_step=start, num_steps=6 - start)
    assert resumed == {step: value for step, value in whole.items() if step >= start}


@pytest.mark.parametrize("threads, ahead", [(1, 1), (3, 1), (1, 5), (4, 9)])
def test_threads_and_prefetch_change_nothing(dataset, threads, ahead):
    index, _ = dataset
    plain = collect(index, data_size=1, accum=2)
    assert collect(index, data_size=1, accum=2, reader_threads=threads, prefetch_batches=ahead) == plain


def test_reading_ahead_is_bounded(dataset, monkeypatch):
    index, _ = dataset
    loaded = []
    load = Loader._load
    monkeypatch.setattr(Loader, "_load", lambda self, *work: loaded.append(work) or load(self, *work))
    data = loader(index, num_steps=50, prefetch_batches=3)
    steps = iter(data)
    next(steps)
    data._pool.shutdown(wait=True)  # lets what was asked for finish
    assert len(loaded) == 1 + 3
    data.close()


def test_threads_end_when_the_consumer_breaks_early(dataset):
    index, _ = dataset
    with loader(index, num_steps=1000) as data:
        for _ in data:
            assert reader_threads()
            break
    assert not reader_threads()
    data.close()  # again
    assert num_open(index.folder) == 0


def test_threads_end_after_the_last_step(dataset):
    index, _ = dataset
    data = loader(index)
    assert [s.step for s in data] == list(range(6))
    assert not reader_threads()


def test_an_error_in_a_thread_reaches_the_consumer_at_its_step(dataset, monkeypatch):
    index, _ = dataset
    load = Loader._load

    def broken(self, step, *work):
        if step == 2:
            raise MemoryError("no more")
        return load(self, step, *work)

    monkeypatch.setattr(Loader, "_load", broken)
    seen = []
    with pytest.raises(MemoryError, match="no more"):
        seen.extend(step.step for step in loader(index, prefetch_batches=6))
    assert seen == [0, 1]
    _let_threads_end()


def _let_threads_end():
    until = time.monotonic() + 10
    while reader_threads() and time.monotonic() < until:
        time.sleep(0.01)
    assert not reader_threads()


def _fail_in_the_first_step(loader):
    with loader as data:
        for _ in data:
            raise ValueError("of the consumer")


def test_an_error_of_the_consumer_does_not_wait_for_a_thread_that_is_stuck(dataset, monkeypatch):
    index, _ = dataset
    load, free = Loader._load, threading.Event()

    def stuck(self, step, *work):
        if step == 3:
            assert free.wait(60)
        return load(self, step, *work)

    monkeypatch.setattr(Loader, "_load", stuck)
    with pytest.raises(ValueError, match="of the consumer"):
        _fail_in_the_first_step(loader(index, prefetch_batches=6))
    assert reader_threads()
    free.set()
    _let_threads_end()


def test_a_sample_that_cant_be_read_is_marked_and_the_others_are_as_ever(dataset):
    index, _ = dataset
    order = build_order(index, DataConfig(global_batch=8), keys=Keys(0))
    whole = [step.micros[0] for step in loader(index, order=order)]
    row = order.batch(2).rows[5]
    flip_bit(index, row, index.latents_place(row).offset)
    for step, before in zip(loader(index, order=order, prefetch_batches=6), whole, strict=True):
        (micro,) = step.micros
        bad = [b for b, why in enumerate(micro.bad) if why is not None]
        good = [b for b, key in enumerate(micro.keys) if key != index.key[row]]
        assert bad == [b for b in range(8) if b not in good] and (bad or step.step != 2)
        assert (micro.keys, micro.samples, micro.places) == (before.keys, before.samples, tuple(range(8)))
        assert torch.equal(micro.weight_B, before.weight_B)
        for name in ("latents_BCthw", "text_BYE", "text_mask_BY"):
            now, then = getattr(micro, name), getattr(before, name)
            assert torch.equal(now[good], then[good]) and torch.isfinite(now).all()
    assert not reader_threads()


def test_a_global_batch_that_does_not_divide_is_refused_before_reading(dataset):
    index, _ = dataset
    with pytest.raises(ConfigError, match=r"data.global_batch=8 must be a multiple"):
        loader(index, data_size=3)
    assert not reader_threads()


def test_waiting_is_measured(dataset, monkeypatch):
    index, _ = dataset
    release = threading.Event()
    load = Loader._load

    def blocked(self, *work):
        release.wait(10)
        return load(self, *work)

    monkeypatch.setattr(Loader, "_load", blocked)
    threading.Timer(0.2, release.set).start()
    with loader(index, num_steps=1) as data:
        assert data.last_wait_s == 0
        next(iter(data))
        assert 0.1 < data.last_wait_s < 10
