"""A region that is computed again in backward keeps what it received; one that needs no gradient keeps nothing."""

from __future__ import annotations

import pytest
import torch

from opensora_dist.parallel.recompute import recompute


@pytest.mark.parametrize("grad", [True, False])
def test_a_region_has_a_tape_and_a_second_run_only_where_a_gradient_is_asked_for(grad):
    runs = []

    def region(x, tape):
        runs.append(None if tape is None else tape.replaying)
        return (x * x).sum()

    x = torch.tensor([3.0, 4.0], dtype=torch.float64, requires_grad=True)
    with torch.set_grad_enabled(grad):
        out = recompute(region, x)
    assert out.item() == 25
    if grad:
        out.backward()
        assert x.grad.tolist() == [6, 8]
    assert runs == ([False, True] if grad else [None])
