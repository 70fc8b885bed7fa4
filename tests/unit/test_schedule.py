from __future__ import annotations

import math

import pytest

from opensora_dist.config.train import OptimConfig
from opensora_dist.train.schedule import learning_rate


def _rates(steps, **fields):
    config = OptimConfig(lr=0.8, **fields)
    return [learning_rate(s, config, steps=steps) for s in range(steps)]


def test_warm_up_rises_in_equal_parts_to_the_peak():
    assert _rates(6, warmup_steps=4) == pytest.approx([0.2, 0.4, 0.6, 0.8, 0.8, 0.8])


def test_without_warm_up_the_first_step_has_the_peak():
    assert _rates(3) == [0.8, 0.8, 0.8]


def test_linear_falls_towards_its_floor():
    assert _rates(6, warmup_steps=2, schedule="linear") == pytest.approx([0.4, 0.8, 0.8, 0.6, 0.4, 0.2])
    assert _rates(4, schedule="linear", min_lr_ratio=0.5) == pytest.approx([0.8, 0.7, 0.6, 0.5])


def test_cosine_is_half_way_down_in_the_middle():
    rates = _rates(8, schedule="cosine", min_lr_ratio=0.25)
    assert rates[0] == 0.8
    assert rates[4] == pytest.approx((0.8 + 0.2) / 2)
    assert rates[2] == pytest.approx(0.2 + 0.6 * 0.5 * (1 + math.cos(math.pi / 4)))
    assert rates == sorted(rates, reverse=True) and min(rates) > 0.2


def test_a_run_of_nothing_but_warm_up_has_a_rate_for_each_step():
    assert _rates(3, warmup_steps=3, schedule="cosine") == pytest.approx([0.8 / 3, 1.6 / 3, 0.8])
