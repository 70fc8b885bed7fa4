"""The order of samples is a pure function of data set, seed and step."""

from __future__ import annotations

from collections import Counter

import pytest
from dataset_factory import write_dataset
from index_factory import open_only_index, write_only_index

from opensora_dist.config.train import DataConfig
from opensora_dist.core.errors import ConfigError, DataError
from opensora_dist.core.types import Thw
from opensora_dist.data.index import Index
from opensora_dist.data.order import build_order, micro_places, position_weights
from opensora_dist.parallel.keys import Keys

SMALL, LARGE, RARE = Thw(2, 16, 24), Thw(4, 16, 16), Thw(8, 16, 16)


@pytest.fixture(scope="module")
def index(tmp_path_factory):
    folder = tmp_path_factory.mktemp("set")
    write_dataset(folder, samples={SMALL: 26, LARGE: 13, RARE: 3})
    return Index.open(folder)


def order(index, *, seed=0, global_batch=4):
    return build_order(index, DataConfig(global_batch=global_batch), keys=Keys(seed))


def test_an_epoch_sees_each_sample_at_most_once_and_what_is_dropped_is_counted(index):
    o = order(index)
    assert o.batches_per_epoch == 6 + 3
    assert o.dropped == {
        f"{SMALL}: tail of each epoch": 2,
        f"{LARGE}: tail of each epoch": 1,
        f"{RARE}: fewer than a global batch of 4": 3,
    }
    for epoch in range(3):
        batches = [o.batch(epoch * 9 + i) for i in range(9)]
        seen = Counter(row for b in batches for row in b.rows)
        assert set(seen.values()) == {1}
        assert len(seen) + sum(o.dropped.values()) == len(index)
        assert {b.epoch for b in batches} == {epoch}


def test_a_batch_has_one_shape(index):
    o = order(index)
    for step in range(18):
        batch = o.batch(step)
        assert len({index.clip_shape(row) for row in batch.rows}) == 1
        assert batch.shapes == {index.latent_shape(batch.rows[0]): len(batch.rows)}
        assert len(batch.rows) == 4


def test_batches_of_all_buckets_are_mixed_and_epochs_differ(index):
    o = order(index)
    buckets = [index.clip_shape(o.batch(step).rows[0]) for step in range(9)]
    assert sorted(buckets) != buckets
    assert [o.batch(s).rows for s in range(9)] != [o.batch(9 + s).rows for s in range(9)]
    assert {row for s in range(9 * 20) for row in o.batch(s).rows} == {
        row for bucket in (SMALL, LARGE) for row in index.buckets[bucket]
    }  # over epochs tails are not lost


def test_the_order_at_a_step_does_not_depend_on_how_one_got_there(index):
    forward = [order(index).batch(0)] + [(o := order(index)).batch(s) for s in range(1, 30)]
    o = order(index)
    backward = [o.batch(s) for s in reversed(range(30))][::-1]
    assert forward == backward


def test_another_seed_gives_another_order(index):
    assert [order(index).batch(s).rows for s in range(9)] != [order(index, seed=1).batch(s).rows for s in range(9)]


def test_digests_tell_batches_apart(index):
    o = order(index)
    digests = [o.batch(s).digest for s in range(18)]
    assert len(set(digests)) == 18
    assert all(len(d) == 16 for d in digests)
    assert digests == [order(index).batch(s).digest for s in range(18)]


def test_a_bucket_that_just_fills_a_batch_is_used(index):
    o = order(index, global_batch=3)
    assert RARE in {index.clip_shape(o.batch(s).rows[0]) for s in range(o.batches_per_epoch)}


def test_a_global_batch_no_bucket_fills_is_refused_with_counts_and_ways_out(index):
    with pytest.raises(DataError) as error:
        order(index, global_batch=27)
    for part in ("data.global_batch=27", "2x16x24: 26", "4x16x16: 13", "8x16x16: 3", "data.global_batch=26 or less", "buckets"):
        assert part in str(error.value)


def each(order, epoch=0):
    """The batches of an epoch."""
    return [order.batch(epoch * order.batches_per_epoch + k) for k in range(order.batches_per_epoch)]


def test_any_stretch_of_an_epoch_has_all_buckets(index):
    o = order(index, global_batch=2)
    buckets = [index.clip_shape(batch.rows[0]) for batch in each(o)]
    assert len(buckets) == 13 + 6 + 1
    for start in range(len(buckets) - 5):
        assert {SMALL, LARGE} <= set(buckets[start : start + 6])


def test_batches_of_tokens_have_one_shape_and_as_many_samples_as_fit(index):
    data = DataConfig(batching="tokens", global_batch=2, unit_tokens=40)
    o = build_order(index, data, keys=Keys(0))
    sizes = {SMALL: 40 // (2 * 2 * 3), LARGE: 40 // (4 * 2 * 2), RARE: 40 // (8 * 2 * 2)}
    seen = Counter()
    for batch in each(o):
        (bucket,) = {index.clip_shape(row) for row in batch.rows}
        assert [len(unit) for unit in batch.units] == [sizes[bucket]] * 2
        seen.update(batch.rows)
    assert set(seen.values()) == {1} and len(seen) == 24 + 12 + 2
    yields = {y.bucket: y for y in o.yields()}
    assert (yields[SMALL].used_per_epoch, yields[SMALL].steps_per_epoch, yields[SMALL].reason) == (24, 4, "tail of each epoch")
    assert (yields[LARGE].samples, yields[LARGE].used_per_epoch, yields[RARE].steps_per_epoch) == (13, 12, 1)


def test_a_sample_larger_than_a_unit_is_refused_with_the_way_out(index):
    data = DataConfig(batching="tokens", global_batch=2, unit_tokens=15)
    with pytest.raises(DataError, match=r"data.unit_tokens=15 is less .* 4x16x16: 16, 8x16x16: 32.* data.unit_tokens=32 or more"):
        build_order(index, data, keys=Keys(0))


def stretch(order, steps):
    return [row for step in range(steps) for row in order.batch(step).rows]


@pytest.fixture(scope="module")
def stills(tmp_path_factory):
    return open_only_index([write_only_index(tmp_path_factory.mktemp("stills") / "set", {Thw(1, 16, 16): 120, SMALL: 40})])


@pytest.mark.parametrize("share", [0.2, 0.5, 0.9])
def test_images_have_the_share_asked_for_and_each_is_seen_as_often_as_any(stills, share):
    o = build_order(stills, DataConfig(global_batch=2, image_share=share), keys=Keys(0))
    seen = Counter(stretch(o, 8 * o.batches_per_epoch))
    images = sum(count for row, count in seen.items() if stills.clip_shape(row).t == 1)
    assert images / seen.total() == pytest.approx(share, abs=0.02)
    for bucket in stills.buckets:
        counts = [seen[row] for row in stills.buckets[bucket]]
        assert max(counts) - min(counts) <= 1 + 8 * 0.1


def test_no_images_are_used_where_none_are_asked_for_and_it_is_said(stills):
    o = build_order(stills, DataConfig(global_batch=2, image_share=0.0), keys=Keys(0))
    assert o.dropped == {"1x16x16: data.image_share=0": 120}
    assert {stills.clip_shape(row) for row in stretch(o, 200)} == {SMALL}


def test_what_shares_leave_of_a_bucket_to_later_epochs_is_said(stills):
    o = build_order(stills, DataConfig(global_batch=2, image_share=0.2), keys=Keys(0))
    assert o.dropped == {"1x16x16: data.image_share=0.2": 88}
    images, videos = o.yields()
    assert (images.planned, images.used_per_epoch, images.left_out) == (32, 32, 88)
    assert (videos.samples, videos.planned, videos.left_out, videos.reason) == (40, 128, 0, "")


@pytest.mark.parametrize("batching, unit_tokens", [("samples", None), ("tokens", 40), ("packed", 40)])
@pytest.mark.parametrize(
    "clip, share, missing", [(SMALL, 0.5, "images"), (SMALL, 1.0, "images"), (Thw(1, 16, 16), 0.5, "videos")]
)
def test_a_share_of_what_there_is_none_of_is_refused(tmp_path, batching, unit_tokens, clip, share, missing):
    index = open_only_index([write_only_index(tmp_path / "set", {clip: 50})])
    data = DataConfig(batching=batching, unit_tokens=unit_tokens, global_batch=2, image_share=share)
    with pytest.raises(DataError, match=rf"data.image_share={share:g} asks for {missing}.* has none; leave data.image_share out"):
        build_order(index, data, keys=Keys(0))
    used = data.model_copy(update={"image_share": float(missing == "videos")})
    assert build_order(index, used, keys=Keys(0)).batches_per_epoch > 0


@pytest.mark.parametrize("window", [1, 2, 3])
def test_samples_are_shuffled_among_so_many_shards_at_a_time(tmp_path, window):
    index = open_only_index([write_only_index(tmp_path / "set", {SMALL: 100, LARGE: 60}, shard_samples=10)])
    o = build_order(index, DataConfig(global_batch=5, shuffle_shards=window), keys=Keys(0))
    orders = []
    for epoch in range(2):
        rows = [row for batch in each(o, epoch) for row in batch.rows]
        assert sorted(rows) == list(range(160))
        for bucket in (SMALL, LARGE):
            mine = [row for row in rows if index.clip_shape(row) == bucket]
            shards = [set(index.shard[mine[i : i + 10 * window]].tolist()) for i in range(0, len(mine), 10 * window)]
            assert all(len(found) <= window for found in shards)
            assert mine[:10] != sorted(mine[:10])
            orders.append(tuple(index.shard[mine].tolist()))
    assert len(set(orders)) == 4


def test_a_later_step_takes_no_longer_than_the_first(tmp_path):
    """Nothing is made of an epoch: a step far ahead is asked as the first, of an order that was asked nothing before."""
    index = open_only_index([write_only_index(tmp_path / "set", {SMALL: 300})])
    for batching, unit in (("samples", None), ("tokens", 40), ("packed", 40)):
        o = build_order(index, DataConfig(batching=batching, global_batch=4, unit_tokens=unit), keys=Keys(0))
        far = 10**9 + 1
        assert o.batch(far).epoch == far // o.batches_per_epoch and len(o.batch(far).units) == 4


@pytest.mark.parametrize("data_size, accum", [(1, 1), (1, 2), (2, 1), (2, 2), (4, 1), (4, 2)])
def test_all_layouts_cut_the_same_global_batch(data_size, accum):
    parts = [
        micro_places([1] * 16, data_rank=r, data_size=data_size, accum=accum, micro=m)
        for r in range(data_size)
        for m in range(accum)
    ]
    assert [place for part in parts for place in part] == list(range(16))
    assert len({len(part) for part in parts}) == 1


def test_a_global_batch_that_does_not_divide_is_refused():
    with pytest.raises(ConfigError, match=r"data.global_batch=8 must be a multiple of .* = 3 x 2; use a multiple of 6"):
        micro_places([1] * 8, data_rank=0, data_size=3, accum=2, micro=0)


@pytest.mark.parametrize("rule", ["sample", "token"])
def test_weights_sum_to_one_over_the_global_batch(rule):
    positions = [6, 6, 24, 1]
    weights = position_weights(rule, positions)
    assert sum(w * p for w, p in zip(weights, positions, strict=True)) == pytest.approx(1, rel=1e-15)


def test_weights_count_samples_or_positions_alike():
    assert position_weights("sample", [2, 4]) == [1 / 4, 1 / 8]
    assert position_weights("token", [2, 4]) == [1 / 6, 1 / 6]
