"""What stands in for samples that can't be read: decided alike wherever it is asked, and as heavy as what it replaces."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from dataset_factory import write_dataset
from hypothesis import given, settings
from hypothesis import strategies as st

from opensora_dist.config.train import DataConfig
from opensora_dist.core.types import Region, Share, Thw
from opensora_dist.data.index import Index
from opensora_dist.data.loader import Loader
from opensora_dist.data.order import MAX_ATTEMPTS, build_order
from opensora_dist.data.reader import Damage, ShardReader
from opensora_dist.parallel.keys import Keys

WIDE, SQUARE = Thw(3, 16, 24), Thw(4, 16, 16)
GLOBAL_BATCH = 4


@pytest.fixture(scope="module")
def index(tmp_path_factory):
    folder = tmp_path_factory.mktemp("set")
    write_dataset(folder, samples={WIDE: 60, SQUARE: 23})
    return Index.open(folder)


def _order(index, *, seed=0, global_batch=GLOBAL_BATCH):
    return build_order(index, DataConfig(global_batch=global_batch), keys=Keys(seed))


def _all(order, step):
    """Every substitute of a step, by place and attempt."""
    pairs = ((place, attempt) for place in range(order.global_batch) for attempt in range(MAX_ATTEMPTS + 2))
    return {pair: row for pair in pairs if (row := order.substitute(step, *pair)) is not None}


@settings(deadline=None, max_examples=40)
@given(step=st.integers(0, 200), seed=st.integers(0, 5), global_batch=st.sampled_from([1, 4, 8]))
def test_a_substitute_is_of_the_same_bucket_new_to_the_batch_and_has_no_longer_text(index, step, seed, global_batch):
    order = _order(index, seed=seed, global_batch=global_batch)
    batch, found = order.batch(step), _all(order, step)
    longest = max(index.text_tokens[row] for row in batch.rows)
    assert {index.clip_shape(row) for row in found.values()} <= {index.clip_shape(batch.rows[0])}
    assert not set(found.values()) & set(batch.rows)
    assert all(index.text_tokens[row] <= longest for row in found.values())
    assert len(set(found.values())) == len(found), "two places or attempts get the same one"
    fit = [r for r in index.buckets[index.clip_shape(batch.rows[0])] if r not in batch.rows and index.text_tokens[r] <= longest]
    assert len(found) == min(len(fit), MAX_ATTEMPTS * global_batch)


def test_whoever_asks_gets_the_same_whatever_was_asked_before(index):
    for step in range(12):
        found = _all(_order(index), step)
        other = _order(index)
        assert {pair: other.substitute(step, *pair) for pair in reversed(found)} == found


def test_substitutes_depend_on_step_and_seed(index):
    steps = [step for step in range(12) if index.clip_shape(_order(index).batch(step).rows[0]) == WIDE]
    first = {order.substitute(step, 0, 0) for order in (_order(index), _order(index, seed=1)) for step in steps}
    assert len(first) > len(steps) / 2


def _loader(index, *, order=None, **changes):
    arguments = {
        "share": lambda latent: Share(1, 2, Region.whole(latent)),
        "accum": 1,
        "start_step": 0,
        "num_steps": 6,
        "loss_weight": "token",
        "reader_threads": 2,
        "prefetch_batches": 3,
        "dtype": torch.float64,
        "device": torch.device("cpu"),
    } | changes
    return Loader(index, order or _order(index), **arguments)


def test_what_is_substituted_is_what_a_batch_with_that_sample_would_hold(index, monkeypatch):
    told, order = [], _order(index)
    for step in _loader(index, on_bad=told.append):
        (micro,) = step.micros
        before = {name: getattr(micro, name).clone() for name in ("latents_BCthw", "text_BYE", "text_mask_BY")}
        row = order.substitute(step.step, 3, 1)
        after = step.substitute(micro, [False, True], 1)
        assert after.keys == (micro.keys[0], index.key[row]) and after.samples == (micro.samples[0], index.sample_id(row))
        assert torch.equal(after.weight_B, micro.weight_B) and after.bad == (None, None)
        planned = order.batch(step.step)
        with monkeypatch.context() as patch:
            other = _order(index)
            patch.setattr(other, "batch", lambda _step, b=replace(planned, units=(*planned.units[:3], (row,))): b)
            (wanted,) = next(iter(_loader(index, order=other))).micros
        tokens = wanted.text_BYE.shape[1]
        for name in before:
            assert torch.equal(getattr(after, name)[0], before[name][0])
        assert torch.equal(after.latents_BCthw[1], wanted.latents_BCthw[1])
        assert torch.equal(after.text_BYE[1, :tokens], wanted.text_BYE[1]) and not after.text_BYE[1, tokens:].any()
        assert torch.equal(after.text_mask_BY[1, :tokens], wanted.text_mask_BY[1]) and not after.text_mask_BY[1, tokens:].any()
    assert told == [], "another rank found it bad"


def test_this_ranks_first_sample_reads_as_damaged_where_a_drill_says_so_and_is_told(index):
    told, damaged = [], []
    for step in _loader(index, on_bad=told.append, damaged=lambda step: step == 2):
        (micro,) = step.micros
        damaged += [(step.step, b) for b, why in enumerate(micro.bad) if why is not None]
        if any(micro.bad):
            key = step.substitute(micro, [why is not None for why in micro.bad], 0).keys[0]
            assert [(bad.step, bad.key, bad.substitute) for bad in told] == [(2, micro.keys[0], key)]
            assert "fault.bad_sample" in told[0].damage.reason
    assert damaged[0] == (2, 0)


def test_a_bad_sample_is_read_once(index, monkeypatch):
    row, asked = int(index.buckets[SQUARE][0]), []
    steps = [step for step in range(80) if row in _order(index).batch(step).rows]
    real = ShardReader.read_into

    def read_into(self, targets):
        asked.extend(target.row for target in targets)
        found = real(self, targets)
        return [Damage(shard="s", reason="r") if t.row == row else why for t, why in zip(targets, found, strict=True)]

    monkeypatch.setattr(ShardReader, "read_into", read_into)
    loader = _loader(index, share=lambda latent: Share(0, 1, Region.whole(latent)), num_steps=80, reader_threads=1)
    assert [step.step for step in loader if any(step.micros[0].bad)] == steps
    assert len(steps) > 1 and asked.count(row) == 1


@pytest.mark.parametrize("rule", ["sample", "token"])
def test_where_nothing_is_left_the_sample_weighs_nothing_and_all_is_finite(index, rule):
    told = []
    for step in _loader(index, on_bad=told.append, loss_weight=rule, num_steps=1):
        (micro,) = step.micros
        micro.latents_BCthw[0] = float("nan")
        weight = micro.weight_B[1].item()
        after = step.substitute(replace(micro, bad=(Damage(shard="s", reason="r"), None)), [True, False], MAX_ATTEMPTS)
        assert after.weight_B.tolist() == [0, weight] and after.bad == (None, None)
        assert torch.isfinite(after.latents_BCthw).all() and after.text_mask_BY[0].any()
        assert [(bad.key, bad.substitute) for bad in told] == [(micro.keys[0], None)]
