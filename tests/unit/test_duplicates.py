"""Perceptual hashes, and near duplicates of a whole set against comparing all with all."""

from __future__ import annotations

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pictures import picture, seen

from opensora_dist.core.video import read_video, write_video
from opensora_dist.prepare import duplicates
from opensora_dist.prepare.duplicates import near_duplicates, phash


def compared_all_with_all(hashes, max_bits):
    kept, found = [], []
    for i, value in enumerate(hashes):
        found.append(next((j for j in kept if (value ^ hashes[j]).bit_count() <= max_bits), None))
        if found[-1] is None:
            kept.append(i)
    return found


@st.composite
def crowds(draw):
    """Hashes around a few centres: some equal, some near, some just too far, in any order."""
    centres = draw(st.lists(st.integers(0, 2**64 - 1), min_size=1, max_size=5))
    flips = st.lists(st.integers(0, 63), max_size=10, unique=True)
    member = st.tuples(st.sampled_from(centres), flips).map(lambda m: m[0] ^ sum(1 << bit for bit in m[1]))
    return draw(st.lists(member, max_size=60))


@settings(max_examples=150, deadline=None)
@given(hashes=crowds(), max_bits=st.integers(0, 12) | st.just(64))
def test_near_duplicates_are_those_of_comparing_all_with_all(hashes, max_bits):
    assert near_duplicates(hashes, max_bits) == compared_all_with_all(hashes, max_bits)


@pytest.mark.parametrize("max_bits", [1, 4, 9])
def test_the_same_where_hashes_come_in_many_blocks_and_runs(max_bits, monkeypatch):
    monkeypatch.setattr(duplicates, "_FIRST_BLOCK", 16)
    monkeypatch.setattr(duplicates, "_PAIRS_AT_ONCE", 64)
    rng = np.random.default_rng(max_bits)
    centres = rng.integers(0, 2**64, 40, dtype=np.uint64).tolist()
    hashes = []
    for centre in rng.choice(40, 500).tolist():
        flips = rng.choice(64, int(rng.integers(0, max_bits + 3)), replace=False).tolist()
        hashes.append(centres[centre] ^ sum(1 << bit for bit in flips))
    assert near_duplicates(hashes, max_bits) == compared_all_with_all(hashes, max_bits)


def test_a_large_set_with_a_crowd_of_near_ones():
    rng = np.random.default_rng(0)
    hashes = rng.integers(0, 2**64, 60_000, dtype=np.uint64)
    crowd = np.uint64(0xF0F0F0F0F0F0F0F0) ^ (np.uint64(1) << rng.integers(0, 64, 20_000).astype(np.uint64))
    hashes[rng.choice(60_000, 20_000, replace=False)] = crowd
    found = near_duplicates(hashes.tolist(), 2)
    first = int(np.isin(hashes, crowd).argmax())
    assert [j for j in found if j is not None] == [first] * 19_999


def test_an_empty_set_and_one():
    assert near_duplicates([], 4) == []
    assert near_duplicates([2**64 - 1], 64) == [None]


def apart(a, b):
    return (phash(a) ^ phash(b)).bit_count()


def test_a_hash_outlives_compression_scaling_and_light(tmp_path):
    for seed, move in enumerate(({}, {"right": 3}, {"zoom": 1.02})):
        clip = seen(picture(seed), 8, **move)
        write_video(tmp_path / f"{seed}.mp4", clip, fps=8, crf=35)
        assert apart(clip, read_video(tmp_path / f"{seed}.mp4")[0]) <= 4
        assert apart(clip, np.stack([cv2.resize(frame, (128, 72), interpolation=cv2.INTER_AREA) for frame in clip])) <= 4
        assert apart(clip, (clip * 0.7 + 20).astype(np.uint8)) <= 4


def test_hashes_of_other_pictures_are_far():
    clips = [seen(picture(seed), 4) for seed in range(12)]
    distances = [apart(a, b) for i, a in enumerate(clips) for b in clips[:i]]
    assert min(distances) > 12
    assert np.mean(distances) == pytest.approx(32, abs=2)


def test_what_a_hash_takes_for_the_same_and_what_not():
    clip = seen(picture(0), 8, right=3)
    assert apart(clip, clip[::-1]) == 0
    assert apart(np.zeros_like(clip), np.full_like(clip, 255)) == 0
    assert apart(clip, np.pad(clip, ((0, 0), (32, 32), (0, 0), (0, 0)))) > 4
    assert apart(clip, clip[:, :, ::-1]) > 20


def test_a_clip_without_structure_hashes_to_zero():
    assert phash(np.full((4, 64, 64, 3), 77, np.uint8)) == 0
