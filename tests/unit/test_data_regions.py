"""Ranks that share samples: each reads, checks and is given its own part, and the parts make the whole."""

from __future__ import annotations

import os
import re
from itertools import accumulate

import numpy as np
import pytest
import torch
from dataset_factory import write_dataset

from opensora_dist.config.train import DataConfig
from opensora_dist.core.errors import ConfigError, DataError
from opensora_dist.core.types import Region, Share, Thw
from opensora_dist.data import reader as reader_module
from opensora_dist.data.index import Index
from opensora_dist.data.loader import Loader
from opensora_dist.data.order import build_order
from opensora_dist.data.reader import ShardReader
from opensora_dist.parallel.keys import Keys
from opensora_dist.parallel.sequence.base import ranges, split_sizes

# Latents of 5x4x2 and 1x6x3: frames that don't divide, and a single frame, whose rows are shared.
LONG, STILL = Thw(5, 32, 16), Thw(1, 48, 24)
GLOBAL_BATCH = 4


@pytest.fixture
def index(tmp_path):
    write_dataset(tmp_path, samples={LONG: 9, STILL: 10})
    return Index.open(tmp_path)


def part(latent, size, rank):
    """The region of one of ``size`` ranks: some frames, or rows where there are too few."""
    if latent.t >= size:
        mine = ranges(split_sizes(latent.t, size))[rank]
        return Region(mine.start, mine.stop, 0, latent.h)
    mine = ranges(split_sizes(latent.h, size))[rank]
    return Region(0, latent.t, mine.start, mine.stop)


def load(index, share, *, num_steps=4, accum=1, weight="sample"):
    order = build_order(index, DataConfig(global_batch=GLOBAL_BATCH), keys=Keys(0))
    return Loader(
        index,
        order,
        share=share,
        accum=accum,
        start_step=0,
        num_steps=num_steps,
        loss_weight=weight,
        reader_threads=2,
        prefetch_batches=2,
        dtype=torch.float32,
        device=torch.device("cpu"),
    )


def micros(index, share, **more):
    with load(index, share, **more) as data:
        return [micro for step in data for micro in step.micros]


@pytest.fixture
def asked(monkeypatch):
    """(offset, bytes) of every array that was read, in order; of headers between two of them nothing."""
    reads, preadv = [], os.preadv

    def counted(fd, buffers, offset):
        ends = list(accumulate((len(b) for b in buffers), initial=offset))
        reads.extend((ends[i], len(b)) for i, b in enumerate(buffers) if i != 1)
        return preadv(fd, buffers, offset)

    monkeypatch.setattr(reader_module.os, "preadv", counted)
    return reads


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("data_size", [1, 2])
def test_the_parts_of_all_ranks_make_the_whole_batch_bitwise(index, size, data_size):
    for data_rank in range(data_size):
        whole = micros(index, lambda latent, d=data_rank: Share(d, data_size, Region.whole(latent)), accum=2)
        parts = [
            micros(index, lambda latent, d=data_rank, r=rank: Share(d, data_size, part(latent, size, r)), accum=2)
            for rank in range(size)
        ]
        assert {micro.latent for micro in whole} == {Thw(5, 4, 2), Thw(1, 6, 3)}
        for one, *mine in zip(whole, *parts, strict=True):
            assert one.region == Region.whole(one.latent)
            for rank, micro in enumerate(mine):
                assert (micro.latent, micro.region) == (one.latent, part(one.latent, size, rank))
                assert micro.latents_BCthw.is_contiguous()
                assert (micro.keys, micro.samples) == (one.keys, one.samples)
                for name in ("text_BYE", "text_mask_BY", "weight_B"):
                    assert torch.equal(getattr(micro, name), getattr(one, name))
            together = torch.cat([m.latents_BCthw for m in mine], dim=2 if one.latent.t >= size else 3)
            assert torch.equal(together, one.latents_BCthw)


@pytest.mark.parametrize("rule", ["sample", "token"])
def test_weights_times_the_positions_of_all_ranks_sum_to_one(index, rule):
    total = sum(
        (micro.weight_B.sum() * micro.latents_BCthw[0, 0].numel()).item()
        for rank in range(6)
        for micro in micros(index, lambda latent, r=rank: Share(r // 3, 2, part(latent, 3, r % 3)), weight=rule)
    )
    assert total == pytest.approx(4.0, rel=1e-14)


@pytest.mark.parametrize("frames", [range(0, 2), range(3, 5), range(4, 5)], ids=str)
def test_one_read_takes_the_frames_asked_for_and_nothing_else(index, asked, frames):
    row = int(index.buckets[LONG][3])
    sample = ShardReader(index).read([row], frames=frames)[0]
    frame_bytes = 4 * 4 * 2 * 2
    (latents, text) = asked
    assert latents == (index.latents_place(row).offset + frames.start * frame_bytes, len(frames) * frame_bytes)
    assert text == (index.text_place(row).offset, index.text_place(row).num_bytes)
    whole = ShardReader(index).read([row])[0]
    np.testing.assert_array_equal(sample.latents, whole.latents[frames.start : frames.stop])


def test_ranks_that_share_samples_by_frames_ask_for_each_latent_byte_once(index, asked):
    def latent_bytes(share):
        asked.clear()
        texts = {index.text_place(row).offset for row in range(len(index))}
        batches = micros(index, share)
        assert {m.latent.t for m in batches} == {1, 5}
        return sum(size for offset, size in asked if offset not in texts), batches

    whole, batches = latent_bytes(lambda latent: Share(0, 1, Region.whole(latent)))
    stills = sum(m.latents_BCthw.numel() * 2 for m in batches if m.latent.t == 1)
    parts = [latent_bytes(lambda latent, r=rank: Share(0, 1, part(latent, 3, r)))[0] for rank in range(3)]
    # Rows of a frame lie together with no other rank's, but are checked with it: each rank reads the one frame.
    assert sum(parts) == whole + 2 * stills


def test_a_flipped_bit_is_seen_by_the_rank_that_owns_its_frame_and_by_no_other(index):
    order = build_order(index, DataConfig(global_batch=GLOBAL_BATCH), keys=Keys(0))
    row = next(order.batch(step).rows[2] for step in range(4) if any(latent.t == 5 for latent in order.batch(step).shapes))
    frame, frame_bytes = 3, 4 * 4 * 2 * 2
    offset = index.latents_place(row).offset + frame * frame_bytes
    path = index.shard_path(row)
    damaged = bytearray(path.read_bytes())
    damaged[offset + 5] ^= 1
    path.write_bytes(damaged)
    said = rf"latents, frame 3 at offset {offset}: {frame_bytes} bytes with xxh3 .*, expected"
    for rank in range(3):  # frames 0-1, 2-3 and 4

        def share(latent, rank=rank):
            return Share(0, 1, part(latent, 3, rank))

        found = [(m.keys[b], why) for m in micros(index, share) for b, why in enumerate(m.bad) if why is not None]
        if rank == 1:
            ((key, why),) = found
            assert (key, why.shard) == (index.key[row], path.name) and re.match(said, why.reason)
        else:
            assert not found


def test_a_shard_that_ends_early_names_the_frame_where_it_does(index):
    row = int(index.buckets[LONG][0])
    frame_bytes = 4 * 4 * 2 * 2
    with open(index.shard_path(row), "r+b") as handle:
        handle.truncate(index.latents_place(row).offset + 3 * frame_bytes + 7)
    offset = index.latents_place(row).offset + 3 * frame_bytes
    with pytest.raises(DataError, match=rf"latents, frame 3 at offset {offset}: the file ends after 7 of {frame_bytes} bytes"):
        ShardReader(index).read([row], frames=range(2, 5))


def test_every_shape_of_the_order_is_asked_about_once_and_must_divide_before_anything_is_read(index, asked):
    shapes = []

    def share(latent):
        shapes.append(latent)
        return Share(0, 4 if latent.t == 5 else 1, Region.whole(latent))

    with load(index, share, num_steps=8) as data:
        assert sorted(shapes) == [Thw(1, 6, 3), Thw(5, 4, 2)] and not asked
        sizes = {len(m.keys) for step in data for m in step.micros if m.latent.t == 5}
    assert sizes == {1} and len(shapes) == 2
    asked.clear()
    # Whatever shape comes first: three ranks for the other one are refused at once.
    for odd in (1, 5):
        with pytest.raises(ConfigError, match=r"data.global_batch=4 must be a multiple of data ranks x .* = 3 x 1"):
            load(index, lambda latent, odd=odd: Share(0, 3 if latent.t == odd else 2, Region.whole(latent)))
    assert not asked
