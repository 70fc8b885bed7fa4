"""Several data sets as one: their shares, their keys, and what keeps them apart."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
import torch
from dataset_factory import SPEC, write_dataset
from index_factory import open_only_index, write_only_index

from opensora_dist.config.codec import HashTextConfig
from opensora_dist.config.train import DataConfig, MixtureConfig
from opensora_dist.core.errors import ConfigError, DataError
from opensora_dist.core.index import read_rows
from opensora_dist.core.types import Region, Share, Thw
from opensora_dist.data.index import Index
from opensora_dist.data.loader import Loader
from opensora_dist.data.mixture import open_data
from opensora_dist.data.order import build_order
from opensora_dist.data.reader import ShardReader
from opensora_dist.parallel.keys import Keys

CLIP, OTHER = (2, 16, 24), (4, 16, 16)


def mixture(*folders, **weights):
    return DataConfig(mixture=tuple(MixtureConfig(path=str(f), weight=weights.get(f.name)) for f in folders), global_batch=4)


def test_a_mixture_has_all_samples_of_its_data_sets_with_their_bytes(tmp_path):
    written = {name: write_dataset(tmp_path / name, samples={CLIP: 7, OTHER: 5}, seed=i) for i, name in enumerate("ab")}
    index = open_data(mixture(tmp_path / "a", tmp_path / "b"))
    assert list(index.key) == [f"{name}/{key}" for name in "ab" for key in written[name]]
    assert len(set(index.sample_ids.tolist())) == 24, "of samples that are named alike each has its own identity"
    for row, sample in enumerate(ShardReader(index).read(range(24))):
        name, key = index.key[row].split("/")
        np.testing.assert_array_equal(sample.latents, written[name][key].latents)
        np.testing.assert_array_equal(sample.text, written[name][key].text)
        assert index.shard_path(row) == tmp_path / name / written[name][key].row.shard
        assert index.caption(row) == f"caption of {key}"
    assert sorted(np.concatenate(list(index.buckets.values()))) == list(range(24))
    again = open_data(mixture(tmp_path / "b", tmp_path / "a"))
    assert again.dataset_hash != index.dataset_hash
    assert set(again.sample_ids.tolist()) == set(index.sample_ids.tolist()), "an identity does not depend on the other data sets"


def test_one_data_set_keeps_its_keys_and_identity(tmp_path):
    write_dataset(tmp_path / "a", samples={CLIP: 7})
    index, alone = open_data(mixture(tmp_path / "a")), Index.open(tmp_path / "a")
    assert list(index.key) == [row.key for row in read_rows(tmp_path / "a")]
    assert (index.dataset_hash, index.sample_ids.tolist()) == (alone.dataset_hash, alone.sample_ids.tolist())
    assert open_data(DataConfig(path=str(tmp_path / "a"))).dataset_hash == alone.dataset_hash


def test_without_weights_each_sample_is_seen_once_an_epoch(tmp_path):
    index = open_only_index([write_only_index(tmp_path / n, {Thw(*CLIP): k}) for n, k in (("a", 40), ("b", 24))])
    order = build_order(index, DataConfig(global_batch=4), keys=Keys(0))
    seen = Counter(row for step in range(order.batches_per_epoch) for row in order.batch(step).rows)
    assert seen == Counter(range(64))
    first = [order.batch(step).rows for step in range(8)]
    assert all(
        {row < 40 for row in rows} == {True, False}
        for rows in zip(first[::2], first[1::2], strict=True)
        for rows in [sum(rows, ())]
    )


@pytest.mark.parametrize("batching, unit_tokens", [("samples", None), ("tokens", 30), ("packed", 100)])
def test_weights_are_shares_of_samples_and_repeat_evenly(tmp_path, batching, unit_tokens):
    """Three quarters of the samples come from the smaller data set: all of its samples are repeated about alike."""
    folders = [write_only_index(tmp_path / n, {Thw(*CLIP): k, Thw(*OTHER): k // 2}) for n, k in (("a", 120), ("b", 40))]
    index = open_only_index(folders, weights=[1.0, 3.0])
    data = DataConfig(batching=batching, global_batch=4, unit_tokens=unit_tokens)
    order = build_order(index, data, keys=Keys(0))
    seen = Counter(row for step in range(6 * order.batches_per_epoch) for row in order.batch(step).rows)
    small = [seen[row] for row in range(180, 240)]
    assert sum(small) / seen.total() == pytest.approx(0.75, abs=0.02)
    assert max(small) - min(small) <= 2 and min(small) > 14
    large = [seen[row] for row in range(180)]
    assert max(large) - min(large) <= 2
    for step in range(3):
        assert order.batch(step) == build_order(index, data, keys=Keys(0)).batch(step)


def test_adding_a_data_set_leaves_the_order_of_the_others(tmp_path):
    folders = [write_only_index(tmp_path / n, {Thw(*CLIP): 40}) for n in "abc"]
    two, three = (build_order(open_only_index(some), DataConfig(global_batch=4), keys=Keys(0)) for some in (folders[:2], folders))

    def of_first(order):
        return [row for step in range(order.batches_per_epoch) for row in order.batch(step).rows if row < 40]

    assert of_first(two) == of_first(three)


def test_statistics_are_pooled_over_all_latents(tmp_path):
    """Two halves with means 1 apart: the whole has the mean between, and more spread than either."""
    for name, mean in (("a", 0.0), ("b", 1.0)):
        spec = SPEC.model_copy(update={"latent_mean": (mean,) * 4, "latent_std": (1.0,) * 4})
        write_dataset(tmp_path / name, samples={CLIP: 6}, spec=spec)
    spec = open_data(mixture(tmp_path / "a", tmp_path / "b")).spec
    assert spec.latent_mean == pytest.approx((0.5,) * 4) and spec.latent_std == pytest.approx((1.25**0.5,) * 4)


def test_statistics_are_those_of_what_training_sees(tmp_path):
    """A tenth of the samples, nine tenths of what is trained on: what the model sees has mean 0 and std 1."""
    for name, mean, count in (("a", 0.0, 90), ("b", 10.0, 10)):
        spec = SPEC.model_copy(update={"latent_mean": (mean,) * 4, "latent_std": (1.0,) * 4})
        write_dataset(tmp_path / name, samples={CLIP: count}, spec=spec)
    spec = open_data(mixture(tmp_path / "a", tmp_path / "b", a=1.0, b=9.0)).spec
    assert spec.latent_mean == pytest.approx((9.0,) * 4)
    assert spec.latent_std == pytest.approx(((1 + 0.9 * 0.1 * 100) ** 0.5,) * 4)
    plain = open_data(mixture(tmp_path / "a", tmp_path / "b")).spec
    assert plain.latent_mean == pytest.approx((1.0,) * 4)


def test_a_sample_that_a_step_has_twice_draws_its_own_noise_each_time_under_any_layout(tmp_path):
    for name, count in (("a", 3), ("b", 20)):
        write_dataset(tmp_path / name, samples={CLIP: count})
    data = mixture(tmp_path / "a", tmp_path / "b", a=1.0, b=1.0).model_copy(update={"global_batch": 8})
    index = open_data(data)
    order = build_order(index, data, keys=Keys(0))
    batch = order.batch(0)
    assert len(set(batch.rows)) < 8, "the case"

    def read(data_size, accum):
        found = {}
        for rank in range(data_size):
            loader = Loader(
                index,
                order,
                share=lambda latent, rank=rank: Share(rank, data_size, Region.whole(latent)),
                accum=accum,
                start_step=0,
                num_steps=1,
                loss_weight="sample",
                reader_threads=1,
                prefetch_batches=2,
                dtype=torch.float32,
                device=torch.device("cpu"),
            )
            with loader:
                for micro in next(iter(loader)).micros:
                    found.update(zip(micro.places, zip(micro.keys, micro.samples, strict=True), strict=True))
        return [found[place] for place in range(8)]

    alone = read(1, 1)
    assert len({sample for _, sample in alone}) == 8
    firsts = [batch.rows.index(row) == place for place, row in enumerate(batch.rows)]
    for (key, sample), row, first in zip(alone, batch.rows, firsts, strict=True):
        assert key == index.key[row] and (sample == index.sample_id(row)) == first
    assert read(2, 2) == read(4, 1) == alone


def test_data_sets_that_were_not_made_alike_are_refused_with_every_difference(tmp_path):
    write_dataset(tmp_path / "a", samples={CLIP: 6})
    other = {"text": HashTextConfig(width=8, max_tokens=7), "max_tokens": 7, "fps": 24.0}
    write_dataset(tmp_path / "b", samples={CLIP: 6}, spec=SPEC.model_copy(update=other))
    with pytest.raises(DataError) as error:
        open_data(mixture(tmp_path / "a", tmp_path / "b"))
    for part in ("max_tokens: a has 6, b has 7", "text: a has", "fps: a has 8, b has 24", "prepare them with the same codec"):
        assert part in str(error.value)


def test_names_must_tell_data_sets_apart(tmp_path):
    write_dataset(tmp_path / "a", samples={CLIP: 6})
    with pytest.raises(ConfigError, match=r"several data sets named 'a'; give each a `name` of its own"):
        open_data(mixture(tmp_path / "a", tmp_path / "a"))
