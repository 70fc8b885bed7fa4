from __future__ import annotations

import pytest
import torch

from opensora_dist.train.ema import Ema


def _params(dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    return {n: torch.nn.Parameter(torch.randn(3, 2, generator=generator).to(dtype)) for n in ("a", "b")}


def test_the_average_moves_as_computed_by_hand():
    weight = torch.nn.Parameter(torch.tensor([2.0]))
    ema = Ema({"w": weight}, decay=0.5)
    expected = 2.0
    for step, value in enumerate([4.0, -1.0, 7.0, 0.5, 3.0, 3.0, 9.0, 1.0, 2.0, 5.0]):
        weight.data.fill_(value)
        ema.update(step=step, skipped=torch.zeros(()))
        decay = min(0.5, (1 + step) / (10 + step))  # 0.1 first; 0.5 from step 8 on
        expected = decay * expected + (1 - decay) * value
        assert ema.shadow["w"].item() == pytest.approx(expected, rel=1e-6)


def test_a_first_update_forgets_nine_tenths_of_the_start():
    weight = torch.nn.Parameter(torch.tensor([0.0]))
    ema = Ema({"w": weight}, decay=0.9999)
    weight.data.fill_(10.0)
    ema.update(step=0, skipped=torch.zeros(()))
    assert ema.shadow["w"].item() == pytest.approx(9.0)


def test_the_average_is_no_alias_of_the_weights():
    params = _params()
    ema = Ema(params, decay=0.9)
    before = {n: t.clone() for n, t in ema.shadow.items()}
    for p in params.values():
        p.data.add_(1)
    assert all(torch.equal(ema.shadow[n], before[n]) for n in before)


def test_a_skipped_step_leaves_the_average_as_it_is_bitwise():
    params = _params(torch.float64)
    ema = Ema(params, decay=0.9)
    for p in params.values():
        p.data.add_(1)
    before = {n: t.clone() for n, t in ema.shadow.items()}
    ema.update(step=3, skipped=torch.ones(()))
    assert all(torch.equal(ema.shadow[n], before[n]) for n in before)
    ema.update(step=4, skipped=torch.zeros(()))
    weight = 1 - 5 / 14
    for n, p in params.items():
        torch.testing.assert_close(ema.shadow[n], before[n] + weight * (p.detach() - before[n]), rtol=1e-14, atol=1e-14)
