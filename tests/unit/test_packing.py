"""Packs: within their budget, full, and about equally costly; planned from the index alone, each sample once."""

from __future__ import annotations

import runpy
import tempfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from index_factory import open_only_index, write_only_index

from opensora_dist.config.train import DataConfig
from opensora_dist.core.errors import DataError
from opensora_dist.core.types import Thw
from opensora_dist.data.index import Index
from opensora_dist.data.order import build_order, micro_places
from opensora_dist.data.packing import pack
from opensora_dist.parallel.keys import Keys

BENCHMARK = Path(__file__).parents[2] / "benchmarks" / "order.py"
CLIPS = [Thw(1, 16, 16), Thw(1, 32, 32), Thw(4, 16, 16), Thw(8, 16, 24), Thw(16, 32, 32), Thw(5, 24, 40)]


def cost_of(latent: Thw, text_tokens: int) -> float:
    """Linear layers, attention along both axes, and text: as a transformer's."""
    return latent.volume * (40 + latent.h * latent.w + latent.t + text_tokens)


def packed(index, *, packs=4, unit_tokens=300, seed=0, **fields):
    data = DataConfig(batching="packed", global_batch=packs, unit_tokens=unit_tokens, **fields)
    return build_order(index, data, keys=Keys(seed), cost_of=cost_of)


def tokens(index, unit):
    return sum(index.latent_shape(row).volume for row in unit)


@st.composite
def mixes(draw):
    """Samples of some shapes, and a budget that holds the largest."""
    clips = draw(st.lists(st.sampled_from(CLIPS), min_size=1, max_size=4, unique=True))
    samples = {clip: draw(st.integers(1, 60)) for clip in clips}
    largest = max(clip.t * (clip.h // 8) * (clip.w // 8) for clip in clips)
    return samples, draw(st.integers(largest, 4 * largest)), draw(st.integers(1, 6))


@settings(deadline=None, max_examples=60)
@given(
    counts=st.lists(st.integers(0, 300), min_size=1, max_size=12),
    num_packs=st.integers(1, 20),
    budget=st.integers(100, 1000),
    seed=st.integers(0, 9),
)
def test_packing_keeps_the_budget_loses_nothing_unsaid_and_leaves_no_pack_empty(counts, num_packs, budget, seed):
    rng = np.random.default_rng(seed)
    counts = np.array(counts)
    size = rng.integers(1, 101, len(counts))
    costs = size * rng.uniform(1, 2, len(counts))
    if counts.sum() < num_packs:
        return
    packing = pack(counts, tokens=size, costs=costs, num_packs=num_packs, budget=budget)
    assert (packing.counts >= 0).all() and (packing.left_out >= 0).all()
    assert (packing.counts.sum(axis=0) + packing.left_out == counts).all()
    assert (packing.counts @ size <= budget).all()
    assert (packing.counts.sum(axis=1) > 0).all()
    if packing.left_out.any():
        smallest = size[packing.left_out > 0].min()
        assert (packing.counts @ size + smallest > budget).all(), "left out although it has room"


@settings(deadline=None, max_examples=15)
@given(mix=mixes(), seed=st.integers(0, 3), window=st.sampled_from([None, 1, 2]))
def test_an_epoch_has_each_sample_once_in_packs_within_the_budget(mix, seed, window):
    samples, unit_tokens, packs = mix
    with tempfile.TemporaryDirectory() as folder:
        index = open_only_index([write_only_index(Path(folder) / "set", samples)])
        if len(index) < packs:
            with pytest.raises(DataError, match=f"data.global_batch={packs} packs are more than the {len(index)} samples"):
                packed(index, packs=packs, unit_tokens=unit_tokens, seed=seed)
            return
        order = packed(index, packs=packs, unit_tokens=unit_tokens, seed=seed, shuffle_shards=window)
        for epoch in range(3):
            steps = [order.batch(epoch * order.batches_per_epoch + k) for k in range(order.batches_per_epoch)]
            seen = Counter(row for batch in steps for row in (*batch.rows, *batch.left_out))
            assert set(seen.values()) == {1}
            # What a fixed number of samples a step doesn't divide is the tail of the epoch.
            assert len(index) - len(seen) < min(len(batch.rows) + len(batch.left_out) for batch in steps)
            used = Counter(index.clip_shape(row) for batch in steps for row in batch.rows)
            exact = epoch == 0 and len(steps) <= 32  # all its steps were packed when the pace was chosen
            for y in order.yields():
                assert used[y.bucket] == y.used_per_epoch or not exact
                assert bool(y.reason) == (y.used_per_epoch < y.samples)
            assert sum(order.dropped.values()) == sum(y.samples - y.used_per_epoch for y in order.yields())
            assert {latent for batch in steps for latent in batch.shapes} <= set(order.latents)
            assert {batch.epoch for batch in steps} == {epoch}
            assert all(len(batch.units) == packs and all(batch.units) for batch in steps)
            assert all(tokens(index, unit) <= unit_tokens for batch in steps for unit in batch.units)
            for batch in steps:
                assert batch.shapes == Counter(index.latent_shape(row) for row in batch.rows)
                assert batch.text_tokens == max(index.text_tokens[row] for row in batch.rows)


@pytest.mark.parametrize("seed", range(4))
def test_of_a_set_that_is_not_tiny_later_epochs_use_of_each_shape_what_was_said_of_the_first(seed, tmp_path):
    """In a tiny one the order of an epoch may leave a whole shape out."""
    index = open_only_index([write_only_index(tmp_path / "set", dict.fromkeys(CLIPS, 60))])
    order = packed(index, packs=3, unit_tokens=300, seed=seed)
    for epoch in range(1, 4):
        rows = [row for k in range(order.batches_per_epoch) for row in order.batch(epoch * order.batches_per_epoch + k).rows]
        used = Counter(index.clip_shape(row) for row in rows)
        for y in order.yields():
            assert used[y.bucket] == pytest.approx(y.used_per_epoch, abs=2 + 0.02 * y.samples)


@pytest.fixture(scope="module")
def index(tmp_path_factory):
    folder = tmp_path_factory.mktemp("packs") / "set"
    return open_only_index([write_only_index(folder, {clip: 400 // (i + 1) for i, clip in enumerate(CLIPS)})])


def test_the_packs_of_a_step_do_not_depend_on_what_was_asked_before_or_on_who_asks(index):
    forward = [packed(index).batch(step) for step in range(3)]
    order, other = packed(index), packed(index, seed=1)
    steps = order.batches_per_epoch + 3
    backward = [order.batch(step) for step in reversed(range(steps))][::-1]
    assert backward[:3] == forward
    later = packed(index)
    assert [later.batch(step) for step in range(5, steps)] == backward[5:], "resumed at 5"
    assert [other.batch(step).rows for step in range(3)] != [b.rows for b in forward]


@pytest.mark.parametrize("data_size, accum", [(1, 1), (2, 1), (1, 4), (2, 2), (4, 1)])
def test_ranks_take_whole_packs_of_the_one_global_batch(index, data_size, accum):
    batch = packed(index).batch(3)
    sizes = [len(unit) for unit in batch.units]
    taken = [
        tuple(batch.rows[place] for place in micro_places(sizes, data_rank=r, data_size=data_size, accum=accum, micro=m))
        for r in range(data_size)
        for m in range(accum)
    ]
    each = len(batch.units) // (data_size * accum)
    assert taken == [tuple(row for unit in batch.units[i : i + each] for row in unit) for i in range(0, len(batch.units), each)]


def test_steps_have_all_buckets_in_about_their_share(index):
    order = packed(index, packs=8, unit_tokens=600)
    for step in range(order.batches_per_epoch):
        batch = order.batch(step)
        for clip in CLIPS:
            latent = Thw(clip.t, clip.h // 8, clip.w // 8)
            wanted = len(index.buckets[clip]) / order.batches_per_epoch
            assert abs(batch.shapes.get(latent, 0) - wanted) <= 3 + 0.25 * wanted


def test_what_an_epoch_yields_is_what_its_steps_hold(index):
    order = packed(index, unit_tokens=1500)
    used = Counter(index.clip_shape(row) for k in range(order.batches_per_epoch) for row in order.batch(k).rows)
    for y in order.yields():
        assert y.samples == len(index.buckets[y.bucket])
        assert used[y.bucket] == pytest.approx(y.used_per_epoch, abs=2 + 0.02 * y.samples)
    assert order.packing.fill > 0.85 and order.packing.imbalance < 0.05


def test_a_substitute_in_a_pack_takes_no_more_room(index):
    order, step = packed(index), 5
    batch = order.batch(step)
    found = {place: order.substitute(step, place, 0) for place in range(len(batch.rows))}
    assert len(set(found.values())) == len(found)
    for place, row in found.items():
        assert index.clip_shape(row) == index.clip_shape(batch.rows[place]) and row not in batch.rows
        assert index.text_tokens[row] <= batch.text_tokens


def test_a_sample_larger_than_a_pack_is_refused_with_its_bucket_and_the_way_out(index):
    with pytest.raises(DataError) as error:
        packed(index, unit_tokens=200)
    for part in ("data.unit_tokens=200", "16x32x32: 256", "data.unit_tokens=256 or more", "clip.buckets"):
        assert part in str(error.value)


@pytest.mark.parametrize("small", [7936, 7680, 7040, 5760, 640])
def test_a_rare_large_sample_has_room_among_many_small_ones(small):
    """Three quarters of one pack of 64: the small ones go elsewhere."""
    size = np.array([1000, 100_000])
    packing = pack(np.array([small, 1]), tokens=size, costs=size.astype(float), num_packs=64, budget=131_072)
    assert packing.left_out.tolist() == [0, 0]
    assert packing.imbalance(size.astype(float)) < 0.03 or small * 1000 + 100_000 < 64 * 100_000


PICTURE, FILM = Thw(1, 256, 256), Thw(96, 256, 256)  # 1,024 and 98,304 tokens


@pytest.mark.parametrize("films, steps", [(5, 5), (100, 7)])
def test_all_of_a_few_long_clips_among_many_pictures_are_trained_on(tmp_path, films, steps):
    index = open_only_index([write_only_index(tmp_path / "set", {PICTURE: 40_000, FILM: films}, shard_samples=1000)])
    order = packed(index, packs=64, unit_tokens=131_072)
    seen = Counter(index.clip_shape(row) for k in range(order.batches_per_epoch) for row in order.batch(k).rows)
    assert seen[FILM] == films and seen[PICTURE] >= 0.99 * 40_000
    assert order.batches_per_epoch == steps, "as few as all tokens take"


def test_no_bucket_is_left_out_because_it_is_rare(tmp_path):
    """Of all samples, all films together are next to nothing."""
    index = open_only_index([write_only_index(tmp_path / "set", {PICTURE: 30_000, FILM: 30}, shard_samples=1000)])
    order = packed(index, packs=8, unit_tokens=131_072)
    assert max(order.packing.left_out.values()) <= 0.02
    seen = Counter(index.clip_shape(row) for k in range(order.batches_per_epoch) for row in order.batch(k).rows)
    assert seen[FILM] >= 29


def test_packs_that_stay_rather_empty_are_said_with_what_helps(tmp_path):
    index = open_only_index([write_only_index(tmp_path / "set", {Thw(12, 16, 16): 50})])  # of 48 tokens
    assert "60% full" in packed(index, packs=5, unit_tokens=80).packing.warning
    assert "a larger data.unit_tokens" in packed(index, packs=5, unit_tokens=80).packing.warning
    assert packed(index, packs=5, unit_tokens=96).packing.warning == ""


def test_a_shape_that_only_later_epochs_have_is_known_from_the_start(tmp_path):
    """The one large sample may be in the tail of the first epoch."""
    index = open_only_index([write_only_index(tmp_path / "set", {CLIPS[0]: 45, CLIPS[3]: 1})])
    tails = 0
    for seed in range(12):
        order = packed(index, unit_tokens=48, seed=seed)
        shapes = {latent for k in range(8 * order.batches_per_epoch) for latent in order.batch(k).shapes}
        assert shapes <= set(order.latents)
        tails += any(y.used_per_epoch == 0 for y in order.yields())
    assert tails


def test_no_pack_belongs_to_a_data_set_or_to_the_large_samples(tmp_path):
    """Packs are those of ranks: the first must not always get the first data set, nor the largest samples."""
    folders = [write_only_index(tmp_path / name, {CLIPS[0]: 200, CLIPS[3]: 40}) for name in "ab"]
    index = open_only_index(folders)
    order = packed(index, unit_tokens=180)
    steps = [order.batch(k) for k in range(3 * order.batches_per_epoch)]
    rows = [row for batch in steps for row in batch.units[0]]
    assert sum(row < 240 for row in rows) / len(rows) == pytest.approx(0.5, abs=0.15)
    large = [Counter(index.clip_shape(row) for row in unit)[CLIPS[3]] for batch in steps for unit in batch.units]
    first = [large[i] for i in range(0, len(large), 4)]
    assert np.mean(first) == pytest.approx(np.mean(large), rel=0.25)


def test_few_large_samples_get_a_pack_each(tmp_path):
    """Six tenths of a pack each: two don't fit, and none may be lost for that."""
    clip = Thw(12, 16, 16)  # 48 tokens
    index = open_only_index([write_only_index(tmp_path / "set", {clip: 50})])
    order = packed(index, packs=5, unit_tokens=80)
    assert order.batches_per_epoch == 10 and order.dropped == {}
    assert all(len(unit) == 1 for k in range(10) for unit in order.batch(k).units)


def test_packs_of_the_bucket_table_of_open_sora_are_full_and_even_over_64_ranks(tmp_path):
    script = runpy.run_path(str(BENCHMARK))
    script["write_samples"](tmp_path, rows=30_000)
    setting = script["Setting"](packs=64, unit_tokens=131_072, steps=12)
    found = script["measure_order"](Index.open(tmp_path), "packed", setting)
    assert found["filled"]["least"] >= 0.95
    assert found["imbalance"]["most"] <= 0.03
    assert found["left_out_of_steps"] <= 0.001
