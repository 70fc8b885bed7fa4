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
        ema.update(step=step)
        decay = min(0.5, (1 + step) / (10 + step))  # 0.1 first; 0.5 from step 8 on
        expected = decay * expected + (1 - decay) * value
        assert ema.shadow["w"].item() == pytest.approx(expected, rel=1e-6)


def test_a_first_update_forgets_nine_tenths_of_the_start():
    weight = torch.nn.Parameter(torch.tensor([0.0]))
    ema = Ema({"w": weight}, decay=0.9999)
    weight.data.fill_(10.0)
    ema.update(step=0)
    assert ema.shadow["w"].item() == pytest.approx(9.0)


def test_the_average_of_half_precision_weights_is_kept_in_fp32():
    params = _params(torch.bfloat16)
    ema = Ema(params, decay=0.9)
    assert {t.dtype for t in ema.shadow.values()} == {torch.float32}
    assert {t.dtype for t in Ema(_params(torch.float64), decay=0.9).shadow.values()} == {torch.float64}


def test_the_average_is_no_alias_of_the_weights():
    params = _params()
    ema = Ema(params, decay=0.9)
    before = {n: t.clone() for n, t in ema.shadow.items()}
    for p in params.values():
        p.data.add_(1)
    assert all(torch.equal(ema.shadow[n], before[n]) for n in before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("fails", [False, True], ids=["well", "error"])
def test_applied_puts_the_weights_back_bitwise_however_the_block_ends(dtype, fails):
    params = _params(dtype)
    ema = Ema(params, decay=0.9)
    for p in params.values():
        p.data.mul_(1.37)
    kept, average = ({n: t.detach().clone() for n, t in source.items()} for source in (params, ema.shadow))

    def use():
        with ema.applied():
            assert all(torch.equal(params[n], average[n].to(dtype)) for n in params)
            if fails:
                raise OSError("no space left")

    if fails:
        with pytest.raises(OSError, match="no space left"):
            use()
    else:
        use()
    assert all(torch.equal(params[n], kept[n]) for n in params)
    assert all(torch.equal(ema.shadow[n], average[n]) for n in params)
