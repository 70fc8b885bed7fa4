"""Each kernel is its torch reference: forward and backward, on odd shapes, in every precision; and compiles for every architecture."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="Triton runs on Linux only; pip install 'opensora-dist[kernels]'")

from opensora_kernels import short_attention, varlen_attention

TOLERANCES = {torch.float32: 2e-6, torch.bfloat16: 1e-2, torch.float16: 2e-3}
"""Largest difference from the reference in float64, of its largest value: some roundings of the dtype of what is read and written."""
DTYPES = pytest.mark.parametrize("dtype", TOLERANCES, ids=str)


def draws(dtype: torch.dtype, *shapes: tuple[int, ...]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(sum(map(sum, shapes)))
    return [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]


def assert_same(kernel: Callable, reference: Callable, inputs: Sequence[Tensor], *constants: Tensor) -> None:
    """Outputs and the gradient of every input."""
    dtype = inputs[0].dtype
    given = [t.requires_grad_() for t in inputs]
    exact = [t.detach().double().requires_grad_() for t in inputs]
    outs, wanted = _tuple(kernel(*given, *constants)), _tuple(reference(*exact, *constants))
    outs = outs[: len(wanted)]
    grads = draws(dtype, *(tuple(out.shape) for out in outs))
    found = [*outs, *torch.autograd.grad(outs, given, grads)]
    right = [*wanted, *torch.autograd.grad(wanted, exact, [g.double() for g in grads])]
    for number, (a, b) in enumerate(zip(found, right, strict=True)):
        assert a.dtype == dtype and a.shape == b.shape
        error = (a.double() - b).abs().max() / b.abs().max().clamp_min(1e-30)
        assert error <= TOLERANCES[dtype] or (a.double() - b).abs().max() <= 1e-12, f"output or gradient {number}: {error:.2e}"


def _tuple(value: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return value if isinstance(value, tuple) else (value,)


@DTYPES
@pytest.mark.parametrize(
    "B, T, S, N, K", [(2, 16, 3, 2, 72), (1, 5, 3, 2, 24), (1, 1, 2, 3, 16), (1, 33, 2, 1, 64), (1, 17, 1, 1, 100)]
)
def test_attention_over_frames(dtype, B, T, S, N, K):
    assert_same(short_attention.short_attention, short_attention.reference, draws(dtype, (B, T, S, 3, N, K)))


def test_more_frames_than_a_tile_holds_are_refused():
    with pytest.raises(AssertionError, match="129 frames"):
        short_attention.short_attention(torch.zeros(1, 129, 1, 3, 1, 16))


PACKS = {
    "samples that share tiles": ([5, 70, 3], [4, 9, 6], 2, 24),
    "a sample of several tiles": ([130, 1, 40], [60, 75, 7], 1, 72),
    "a sample without a key, and one without a query": ([20, 7, 0, 30], [9, 0, 11, 30], 1, 64),
    "one sample": ([65], [65], 1, 40),
}


def ends(lengths: Sequence[int]) -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)


@DTYPES
@pytest.mark.parametrize("pack", PACKS)
def test_attention_of_each_sample_to_its_own_keys(dtype, pack):
    queries, keys, N, K = PACKS[pack]
    inputs = draws(dtype, (sum(queries), N, K), (sum(keys), N, K), (sum(keys), N, K))
    assert_same(varlen_attention.varlen_attention, varlen_attention.reference, inputs, ends(queries), ends(keys))


def test_the_log_of_sums_of_exponentials_is_given_with_it():
    q, k, v = draws(torch.float32, (30, 2, 24), (25, 2, 24), (25, 2, 24))
    _, lse = varlen_attention.varlen_attention(q, k, v, ends([10, 20]), ends([25, 0]))
    scores = torch.einsum("qnk,mnk->nqm", q[:10], k) / 24**0.5
    torch.testing.assert_close(lse[:, :10], scores.logsumexp(dim=-1))
    assert (lse[:, 10:] == 0).all()


def operators() -> Iterator[tuple[str, Callable, tuple]]:
    yield "short_attention", short_attention.short_attention, (draws(torch.float32, (1, 5, 2, 3, 1, 16))[0].requires_grad_(),)
    q, k = draws(torch.float32, (9, 1, 16), (7, 1, 16))
    yield "varlen_attention", varlen_attention.varlen_attention, (q.requires_grad_(), k, k, ends([4, 5]), ends([7, 0]))


@pytest.mark.parametrize("name", [name for name, _, _ in operators()])
def test_torch_sees_through_each_operator(name):
    """Schema, fake tensors, autograd and compilation, by torch's own checks."""
    operator, inputs = next((operator, inputs) for found, operator, inputs in operators() if found == name)
    torch.library.opcheck(operator, inputs)
