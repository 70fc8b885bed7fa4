"""A region that is computed again in backward keeps what it received; one that needs no gradient keeps nothing."""

from __future__ import annotations

import pytest
import torch

from opensora_dist.parallel.recompute import recompute

OPERATORS = ("flash_attn::_flash_attn_forward", "flash_attn::_flash_attn_varlen_forward", "flash_attn_3::_flash_attn_forward")


@pytest.mark.parametrize("name", OPERATORS)
def test_an_attention_that_flash_attn_registers_as_an_operator_is_kept(name):
    """Called as the packages do: by an autograd function, which keeps what the operator gave."""
    calls = []

    def forward(q: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        calls.append(name)
        return q * q, q.sum(-1)

    namespace, operator = name.split("::")

    class Attention(torch.autograd.Function):
        @staticmethod
        def forward(ctx, q):
            out, lse = getattr(getattr(torch.ops, namespace), operator)(q)
            ctx.save_for_backward(q, out, lse)
            return out

        @staticmethod
        def backward(ctx, grad):
            return grad * 2 * ctx.saved_tensors[0]

    x = torch.tensor([[3.0, 4.0]], requires_grad=True)
    with torch.library._scoped_library(namespace, "FRAGMENT") as library:
        library.define(f"{operator}(Tensor q) -> (Tensor, Tensor)")
        library.impl(operator, forward, "CompositeExplicitAutograd")
        for how, times in (("selective", 1), ("full", 2)):
            calls.clear()
            out = recompute(lambda x, _tape: Attention.apply(x * 2).sin(), x, how=how)
            (grad,) = torch.autograd.grad(out.sum(), x)
            assert torch.allclose(grad, (4 * x * x).cos() * 8 * x) and len(calls) == times, how


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
