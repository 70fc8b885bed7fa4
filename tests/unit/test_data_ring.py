"""The memory of loading: read into once, used again, bounded, and never a place where an older batch shines through."""

from __future__ import annotations

import os
from dataclasses import replace

import numpy as np
import pytest
import torch
from dataset_factory import SPEC, write_dataset

from opensora_dist.config.train import DataConfig
from opensora_dist.core.index import write_index
from opensora_dist.core.types import Region, Share, Thw
from opensora_dist.data import reader as reader_module
from opensora_dist.data.buffers import ALIGNMENT, Slot, aligned
from opensora_dist.data.index import Index
from opensora_dist.data.loader import Loader
from opensora_dist.data.order import build_order
from opensora_dist.data.reader import ShardReader
from opensora_dist.parallel.keys import Keys

SMALL, LARGE = Thw(2, 16, 24), Thw(4, 16, 16)


def loader(index, **changes):
    arguments = {
        "share": lambda latent: Share(0, 1, Region.whole(latent)),
        "accum": 1,
        "start_step": 0,
        "num_steps": 8,
        "loss_weight": "sample",
        "reader_threads": 2,
        "prefetch_batches": 3,
        "dtype": torch.float32,
        "device": torch.device("cpu"),
    } | changes
    return Loader(index, build_order(index, DataConfig(global_batch=6), keys=Keys(0)), **arguments)


@pytest.fixture
def dataset(tmp_path):
    written = write_dataset(tmp_path, samples={SMALL: 26, LARGE: 13})
    return Index.open(tmp_path), written


@pytest.fixture
def calls(monkeypatch):
    """The sizes of the buffers of every read."""
    found, preadv = [], os.preadv

    def counted(fd, buffers, offset):
        found.append([len(b) for b in buffers])
        return preadv(fd, buffers, offset)

    monkeypatch.setattr(reader_module.os, "preadv", counted)
    return found


def test_arrays_of_a_slot_start_at_pages_and_its_memory_stays_where_it_is():
    slot = Slot(pinned=False)
    first = slot.arrays([10, 5000, 4096])
    assert [a.numel() for a in first] == [10, 5000, 4096]
    assert [a.data_ptr() % ALIGNMENT for a in first] == [0, 0, 0]
    again = slot.arrays([3, 4096])
    assert again[0].data_ptr() == first[0].data_ptr() and slot.num_bytes == aligned(10) + aligned(5000) + aligned(4096)
    assert slot.arrays([slot.num_bytes + 1])[0].data_ptr() % ALIGNMENT == 0


def test_memory_is_not_handed_out_before_what_was_copied_from_it_is_over():
    class Event:
        waits = 0

        def synchronize(self):
            self.waits += 1

    slot, event = Slot(pinned=False), Event()
    slot.copied(event)
    slot.arrays([8])
    assert event.waits == 1
    slot.arrays([8])
    assert event.waits == 1


def test_a_sample_is_one_read_and_headers_go_nowhere(dataset, calls):
    index, written = dataset
    rows = [7, 0, 30, 12]
    samples = ShardReader(index).read(rows)
    assert len(calls) == len(rows)
    for row, sample in zip(rows, samples, strict=True):
        one = written[index.key[row]]
        np.testing.assert_array_equal(sample.latents, one.latents)
        np.testing.assert_array_equal(sample.text, one.text)
        assert [one.latents.nbytes, one.text.nbytes] in [[call[0], call[2]] for call in calls]
    assert max(call[1] for call in calls) < 2048


def test_samples_are_read_in_the_order_in_which_they_lie(dataset, monkeypatch):
    index, _ = dataset
    asked, open_shard, preadv = [], index.shard_source.open, os.preadv
    shards = {}
    monkeypatch.setattr(index.shard_source, "open", lambda n: (shards.setdefault((fd := open_shard(n)), n) and fd) or fd)
    monkeypatch.setattr(reader_module.os, "preadv", lambda fd, b, at: asked.append((shards[fd], at)) or preadv(fd, b, at))
    ShardReader(index).read([31, 2, 17, 3, 16, 30, 1])
    assert len(asked) == 7 and asked == sorted(asked)


def test_arrays_that_lie_apart_are_two_reads(tmp_path, calls, monkeypatch):
    written = write_dataset(tmp_path, samples={SMALL: 4})
    monkeypatch.setattr(reader_module, "_MAX_GAP", 100)
    index = Index.open(tmp_path)
    samples = ShardReader(index).read(range(4))
    assert [len(call) for call in calls] == [1] * 8
    for row, sample in enumerate(samples):
        np.testing.assert_array_equal(sample.text, written[index.key[row]].text)


def test_text_before_latents_is_read_as_well(tmp_path):
    written = write_dataset(tmp_path, samples={SMALL: 2}, shard_samples=2)
    index = Index.open(tmp_path)
    first, second = (written[index.key[row]].row for row in (0, 1))
    # Each takes the other's text, so that for one of them it lies before its latents.
    swapped = [
        replace(a, text_offset=b.text_offset, text_bytes=b.text_bytes, text_xxh3=b.text_xxh3, text_tokens=b.text_tokens)
        for a, b in ((first, second), (second, first))
    ]
    write_index(tmp_path, rows=swapped, shards=index.shards, spec=index.spec.model_dump(mode="json"))
    samples = ShardReader(Index.open(tmp_path)).read([0, 1])
    np.testing.assert_array_equal(samples[0].text, written[index.key[1]].text)
    np.testing.assert_array_equal(samples[1].text, written[index.key[0]].text)
    np.testing.assert_array_equal(samples[1].latents, written[index.key[1]].latents)


def test_what_is_handed_out_is_as_stored_and_what_training_gets_is_made_of_it_to_the_bit(dataset):
    index, written = dataset
    mean, std = (torch.tensor(v, dtype=torch.float32).view(-1, 1, 1, 1) for v in (SPEC.latent_mean, SPEC.latent_std))
    with loader(index) as stored, loader(index) as made:
        for (raw,), step in zip(stored.stored(), made, strict=True):
            (micro,) = step.micros
            assert raw.latents_BtCHw.dtype == raw.text_BYE.dtype == torch.float16 and raw.keys == micro.keys
            for b, key in enumerate(raw.keys):
                latents, text = written[key].latents, written[key].text
                assert torch.equal(raw.latents_BtCHw[b], torch.from_numpy(latents))
                assert (
                    torch.equal(raw.text_BYE[b, : len(text)], torch.from_numpy(text)) and not raw.text_BYE[b, len(text) :].any()
                )
                expected = torch.from_numpy(latents).float().transpose(0, 1).sub(mean).div(std)
                assert torch.equal(micro.latents_BCthw[b], expected)
            assert micro.latents_BCthw.is_contiguous()


def test_the_ring_is_used_again_and_holds_no_more_than_its_slots(dataset):
    index, _ = dataset
    with loader(index, num_steps=40) as data:
        addresses = {raw.latents_BtCHw.data_ptr() for (raw,) in data.stored()}
        assert len(addresses) <= 2 * 3  # a slot moves when it grows
        biggest = 6 * 4 * 4 * 2 * 3 * 2, 6 * SPEC.max_tokens * SPEC.text_width * 2
        assert 0 < data.buffer_bytes <= 3 * sum(map(aligned, (max(biggest[0], 6 * 4 * 4 * 2 * 2 * 2), biggest[1])))


def test_a_batch_that_training_holds_is_not_written_over_by_later_ones(dataset):
    index, _ = dataset
    with loader(index, num_steps=12, prefetch_batches=1) as data:
        kept = [step.micros[0] for step in data]
    with loader(index, num_steps=12, prefetch_batches=12) as data:
        for before, step in zip(kept, data, strict=True):
            assert torch.equal(before.latents_BCthw, step.micros[0].latents_BCthw)
            assert torch.equal(before.text_BYE, step.micros[0].text_BYE)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_samples_of_two_precisions_are_one_batch(tmp_path, dtype):
    halves = write_dataset(tmp_path, samples={SMALL: 8}, dtype="float16")
    shards = Index.open(tmp_path).shards
    wholes = write_dataset(tmp_path / "more", samples={SMALL: 8}, dtype="float32", seed=1)
    more = Index.open(tmp_path / "more").shards
    for shard in more:
        (tmp_path / "more" / shard.name).rename(tmp_path / f"more-{shard.name}")
    renamed = {
        f"more-{key}": replace(w, row=replace(w.row, key=f"more-{key}", shard=f"more-{w.row.shard}")) for key, w in wholes.items()
    }
    written = halves | renamed
    write_index(
        tmp_path,
        rows=[w.row for w in written.values()],
        shards=[*shards, *(replace(s, name=f"more-{s.name}") for s in more)],
        spec=SPEC.model_dump(mode="json"),
    )
    index, mixed = Index.open(tmp_path), 0
    mean, std = (torch.tensor(v, dtype=dtype).view(-1, 1, 1, 1) for v in (SPEC.latent_mean, SPEC.latent_std))
    with loader(index, dtype=dtype, num_steps=4) as data:
        for step in data:
            (micro,) = step.micros
            mixed += len({written[key].latents.dtype for key in micro.keys}) == 2
            for b, key in enumerate(micro.keys):
                latents, text = torch.from_numpy(written[key].latents), torch.from_numpy(written[key].text)
                assert torch.equal(micro.latents_BCthw[b], latents.to(dtype).transpose(0, 1).sub(mean).div(std))
                assert torch.equal(micro.text_BYE[b, : len(text)], text.to(dtype)) and not micro.text_BYE[b, len(text) :].any()
    assert mixed


def test_a_damaged_sample_shows_nothing_of_the_batch_that_was_there_before(dataset):
    index, _ = dataset
    with loader(index, num_steps=8, prefetch_batches=1) as data:
        (row,) = (data._planner.plan(7).batch.rows[2],)
        path, offset = index.shard_path(row), index.text_place(row).offset
        damaged = bytearray(path.read_bytes())
        damaged[offset] ^= 1
        path.write_bytes(damaged)
        for number, (raw,) in enumerate(data.stored()):
            for b, why in enumerate(raw.bad):
                if why is not None:
                    assert not raw.latents_BtCHw[b].any() and not raw.text_BYE[b].any()
                    assert raw.text_mask_BY[b].tolist() == [True] + [False] * (raw.text_BYE.shape[1] - 1)
            assert number != 7 or raw.bad[2] is not None


def test_the_source_of_shards_is_told_what_comes_next(dataset, monkeypatch):
    index, _ = dataset
    told = []
    monkeypatch.setattr(index.shard_source, "prefetch", lambda numbers: told.append(list(numbers)))
    with loader(index, prefetch_batches=1) as data:
        read = [{int(index.shard[row]) for row in data._planner.plan(step).batch.rows} for step in range(8)]
        for _ in data:
            pass
    assert len(told) == 8
    for step, numbers in enumerate(told):
        assert len(set(numbers)) == len(numbers) and set(numbers[: len(read[step])]) == read[step]
        assert set(numbers) == set.union(*read[step : step + 5])
