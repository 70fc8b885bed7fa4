"""Permutations and merges that are computed place by place."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from opensora_dist.data.permutation import Merge, permute, seed_of


def permutation(size, *, number=0, places=None):
    places = np.arange(size) if places is None else places
    seeds = np.repeat(seed_of(5, number), len(places))
    return permute(places, sizes=np.full(len(places), size), seeds=seeds)


@settings(deadline=None)
@given(size=st.integers(1, 3000), number=st.integers(0, 1000))
def test_every_number_stands_at_one_place(size, number):
    assert sorted(permutation(size, number=number)) == list(range(size))


def test_a_place_can_be_asked_alone_and_beside_those_of_other_permutations():
    sizes, numbers = np.array([7, 1000, 7, 10_000_000]), np.array([1, 2, 3, 4])
    found = permute(np.array([3, 999, 3, 123_456]), sizes=sizes, seeds=seed_of(5, numbers))
    alone = [
        permutation(s, number=n, places=np.array([p]))[0] for s, n, p in zip(sizes, numbers, (3, 999, 3, 123_456), strict=True)
    ]
    assert found.tolist() == alone


@pytest.mark.parametrize("size", [2, 3, 4, 5])
def test_all_permutations_of_few_are_about_as_frequent(size):
    seeds = np.repeat(seed_of(5, np.arange(4000)), size)
    found = permute(np.tile(np.arange(size), 4000), sizes=np.full(len(seeds), size), seeds=seeds)
    counts = Counter(map(tuple, found.reshape(-1, size).tolist()))
    possible = {2: 2, 3: 6, 4: 24, 5: 120}[size]
    assert len(counts) == possible
    wanted = 4000 / possible
    assert sum((n - wanted) ** 2 / wanted for n in counts.values()) < possible + 5 * possible**0.5


def test_neighbours_of_many_are_unrelated():
    found = permutation(10_000_000, places=np.arange(4000)).astype(float)
    assert abs(np.corrcoef(np.arange(4000), found)[0, 1]) < 0.06 and abs(np.corrcoef(found[1:], found[:-1])[0, 1]) < 0.06
    assert abs(found.mean() / 10_000_000 - 0.5) < 0.03


@settings(deadline=None)
@given(sizes=st.lists(st.integers(0, 40), min_size=1, max_size=8), seed=st.integers(0, 99), data=st.data())
def test_a_merge_has_each_member_once_and_any_stretch_of_it_can_be_asked_alone(sizes, seed, data):
    total = sum(sizes)
    if not total:
        return
    merge = Merge(np.array(sizes), np.ones(len(sizes), dtype=np.int64), seed=seed)
    queues, numbers = merge.members(0, total)
    for queue, size in enumerate(sizes):
        assert numbers[queues == queue].tolist() == list(range(size)), "in the order of the queue"
    start = data.draw(st.integers(0, total - 1))
    stop = data.draw(st.integers(start + 1, total))
    some = merge.members(start, stop)
    assert some[0].tolist() == queues[start:stop].tolist() and some[1].tolist() == numbers[start:stop].tolist()


@settings(deadline=None)
@given(
    members=st.lists(st.tuples(st.integers(0, 40), st.integers(1, 500)), min_size=1, max_size=8),
    seed=st.integers(0, 99),
    share=st.floats(0, 1),
)
def test_a_cut_by_weight_is_where_the_merge_reaches_it(members, seed, share):
    sizes, weights = (np.array(values) for values in zip(*members, strict=True))
    if not sizes.sum():
        return
    merge = Merge(sizes, weights, seed=seed)
    at = int(share * merge.total)
    cut = merge.cut(at)
    taken = int((cut * weights).sum())
    assert taken <= at < taken + weights[sizes > 0].max() + (at == merge.total)
    assert merge.cut(merge.total).tolist() == sizes.tolist()
    assert (merge.cut(max(0, at - 7)) <= cut).all()


@settings(deadline=None)
@given(sizes=st.lists(st.integers(1, 400), min_size=2, max_size=6), seed=st.integers(0, 99))
def test_any_stretch_of_a_merge_has_of_each_queue_its_share(sizes, seed):
    sizes = np.array(sizes)
    merge = Merge(sizes, np.ones(len(sizes), dtype=np.int64), seed=seed)
    for start in range(0, int(sizes.sum()), 37):
        stop = min(int(sizes.sum()), start + 50)
        counts = np.bincount(merge.members(start, stop)[0], minlength=len(sizes))
        assert (abs(counts - (stop - start) * sizes / sizes.sum()) <= 2 + len(sizes) * sizes / sizes.sum()).all()
