from __future__ import annotations

import torch

from opensora_dist.parallel.keys import Keys, sample_id

SHAPE = (4, 3, 5)


def _normal(keys, *args, frames=range(4)):
    return keys.normal_frames(*args, frames=frames, shape=SHAPE)


def test_equal_arguments_give_equal_numbers_whatever_was_drawn_before():
    one, other = Keys(3), Keys(3)
    _normal(other, "noise", 9, 9)
    torch.rand(7)
    assert torch.equal(_normal(one, "noise", 1, 2), _normal(other, "noise", 1, 2))


def test_each_part_of_a_key_changes_the_draw():
    base = dict(purpose="noise", sample=1, step=2, frame=3)
    other = dict(purpose="sigma", sample=2, step=3, frame=4)
    draws = [torch.randn(8, generator=Keys(0).generator(**base)), torch.randn(8, generator=Keys(1).generator(**base))]
    draws += [torch.randn(8, generator=Keys(0).generator(**{**base, part: value})) for part, value in other.items()]
    for i, draw in enumerate(draws):
        assert not any(torch.equal(draw, d) for d in draws[:i]), i


def test_parts_of_a_key_do_not_run_into_each_other():
    keys = Keys(0)
    seeds = {keys.generator("noise", *parts).initial_seed() for parts in [(1, 11, 1), (11, 1, 1), (1, 1, 11), (111, 1, 1)]}
    assert len(seeds) == 4


def test_some_frames_drawn_alone_equal_the_same_frames_of_the_whole():
    keys = Keys(5)
    whole = _normal(keys, "noise", 1, 2, frames=range(6))
    assert whole.shape == (4, 6, 3, 5)
    assert torch.equal(_normal(keys, "noise", 1, 2, frames=[4, 1]), whole[:, [4, 1]])


def test_draws_leave_the_global_generator_alone():
    before = torch.get_rng_state()
    _normal(Keys(0), "noise", 0, 0)
    Keys(0).generator("order").get_state()
    assert torch.equal(torch.get_rng_state(), before)


def test_draws_look_standard_normal():
    values = Keys(0).normal_frames("noise", 1, 1, frames=range(8), shape=(16, 16, 16))
    assert abs(values.mean()) < 0.02 and abs(values.std() - 1) < 0.02


def test_a_sample_id_is_the_keys_alone_and_fits_an_int64():
    assert sample_id("clip-1") == sample_id("clip-1") != sample_id("clip-2")
    assert all(0 <= sample_id(str(i)) < 2**63 for i in range(1000))
