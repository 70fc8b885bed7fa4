"""Attention in parts of the batch, as CUDA's grids need it."""

from __future__ import annotations

import pytest
import torch

from opensora_dist.ops import attention as ops
from opensora_dist.parallel.keys import Keys


def _inputs():
    shape = (7, 2, 5, 4)
    return [torch.empty(shape, dtype=torch.float64).normal_(generator=Keys(0).generator(name)).requires_grad_() for name in "qkv"]


@pytest.mark.parametrize("max_batch", [1, 3, 6, 7])
def test_cutting_the_batch_changes_no_value_and_no_gradient(max_batch):
    whole, parts = _inputs(), _inputs()
    wanted = ops.attention(*whole)
    found = ops._attend_in_parts(*parts, max_batch=max_batch)
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)
    for out in (wanted, found):
        out.square().sum().backward()
    for one, other in zip(whole, parts):
        torch.testing.assert_close(other.grad, one.grad, rtol=1e-12, atol=1e-12)
