"""Attention with log-sum-exp: what every backend gives of parts of the keys merges into what all of them give."""

# B batch, N heads, L queries, M keys, K head dim

from __future__ import annotations

import pytest
import torch

from opensora_dist.ops import attention as ops
from opensora_dist.parallel.keys import Keys
from opensora_dist.parallel.sequence.ring import merge_

_NEEDS_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device: run this file where torch sees one")
BACKENDS = {"cpu": (ops._CPU, "cpu"), "reference": (ops._REFERENCE, "cpu"), "cuda": (ops._CUDA, "cuda")}
SIZES = [(1, 1, 1, 1, 5), (2, 3, 1, 7, 72), (3, 2, 9, 1, 5), (2, 3, 7, 5, 72), (2, 1, 33, 17, 64), (1, 2, 130, 70, 6)]
# Of out, dq, dk and dv, and of lse, which no backend rounds to half precision; float64 wherever a backend has it.
TOLERANCES = {torch.float64: (1e-12, 1e-13), torch.float32: (1e-5, 2e-6), torch.bfloat16: (3e-2, 3e-4)}
CASES = [
    *[(name, dtype) for name in ("cpu", "reference") for dtype in TOLERANCES],
    pytest.param("cuda", torch.bfloat16, marks=_NEEDS_GPU),
]


def _inputs(size, *, dtype=torch.float64, device="cpu", scale=1.0):
    B, N, L, M, K = size
    shapes = {"q": L, "k": M, "v": M, "grad": L}
    drawn = [torch.empty(B, N, n, K).normal_(generator=Keys(0).generator(name)) for name, n in shapes.items()]
    drawn[0] *= scale
    return [t.to(device, dtype) for t in drawn]


def _truth(q, k, v, grad):
    """(out, lse, dq, dk, dv) in float64, by the formulas and autograd."""
    q, k, v = (t.detach().double().cpu().clone().requires_grad_() for t in (q, k, v))
    scores = q @ k.mT / q.shape[-1] ** 0.5
    out = scores.softmax(dim=-1) @ v
    out.backward(grad.double().cpu())
    return out.detach(), torch.logsumexp(scores, dim=-1).detach(), q.grad, k.grad, v.grad


def _assert_near(found, wanted, tolerance):
    for one, other in zip(found, wanted, strict=True):
        assert one.shape == other.shape
        assert (one.double().cpu() - other).abs().max() <= tolerance * max(1.0, other.abs().max())


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name, dtype", CASES)
def test_lse_is_that_of_the_scaled_scores_on_every_backend(name, dtype, size):
    kernel, device = BACKENDS[name]
    q, k, v, grad = _inputs(size, dtype=dtype, device=device)
    out, lse = kernel.forward(q, k, v)
    wanted_out, wanted_lse, *_ = _truth(q, k, v, grad)
    assert lse.dtype == (torch.float64 if dtype == torch.float64 else torch.float32) and out.dtype == dtype
    _assert_near([out], [wanted_out], TOLERANCES[dtype][0])
    _assert_near([lse], [wanted_lse], TOLERANCES[dtype][1])


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name, dtype", CASES)
def test_gradients_are_those_of_autograd_on_every_backend(name, dtype, size):
    kernel, device = BACKENDS[name]
    q, k, v, grad = _inputs(size, dtype=dtype, device=device)
    found = kernel.backward(grad, q, k, v, *kernel.forward(q, k, v))
    assert [t.dtype for t in found] == [dtype] * 3
    _assert_near(found, _truth(q, k, v, grad)[2:], TOLERANCES[dtype][0])


@pytest.mark.parametrize("scale", [1.0, 3e3])
@pytest.mark.parametrize("size", [s for s in SIZES if s[3] >= 5])
@pytest.mark.parametrize("name", ["cpu", "reference"])
def test_parts_of_the_keys_merge_into_the_whole_and_share_its_gradients(name, size, scale):
    kernel, _ = BACKENDS[name]
    q, k, v, grad = _inputs(size, scale=scale)  # scores of thousands, which overflow where a maximum is not taken off
    parts = list(zip(k.split([1, 2, size[3] - 3], dim=2), v.split([1, 2, size[3] - 3], dim=2)))
    out, lse = kernel.forward(q, *parts[0])
    for part in parts[1:]:
        merge_(out, lse, *kernel.forward(q, *part))
    wanted_out, wanted_lse, wanted_dq, wanted_dk, wanted_dv = _truth(q, k, v, grad)
    _assert_near([out, lse], [wanted_out, wanted_lse], 1e-12)
    gradients = [kernel.backward(grad, q, *part, out, lse) for part in parts]
    dq = sum(g[0] for g in gradients)
    dk, dv = (torch.cat([g[i] for g in gradients], dim=2) for i in (1, 2))
    # lse is known to an ulp of its size, and the weights are its exponentials.
    _assert_near([dq, dk, dv], [wanted_dq, wanted_dk, wanted_dv], 1e-12 * scale)


def test_an_lse_of_zeros_does_not_pass_for_one():
    q, k, v, grad = _inputs((2, 3, 7, 5, 72))
    out, lse = ops.attention_with_lse(q, k[:, :, :2], v[:, :, :2])
    more_out, more_lse = ops.attention_with_lse(q, k[:, :, 2:], v[:, :, 2:])
    merge_(out, torch.zeros_like(lse), more_out, torch.zeros_like(more_lse))
    assert (out - _truth(q, k, v, grad)[0]).abs().max() > 1e-3


def test_strided_views_give_what_copies_give():
    packed_LB3NK = torch.empty(7, 2, 3, 3, 5, dtype=torch.float64).normal_(generator=Keys(0).generator("packed"))
    grad = torch.empty(7, 2, 3, 5, dtype=torch.float64).normal_(generator=Keys(0).generator("grad")).permute(1, 2, 0, 3)
    views = packed_LB3NK.permute(2, 1, 3, 0, 4).unbind(0)
    copies = [t.contiguous() for t in views]
    out, lse = ops.attention_with_lse(*views)
    assert out.permute(2, 0, 1, 3).is_contiguous(), "the output keeps the queries' order in memory: a rank sends it as it is"
    wanted = ops.attention_with_lse(*copies)
    torch.testing.assert_close([out, lse], list(wanted), rtol=0, atol=1e-14)
    found = ops.attention_backward(grad, *views, out, lse)
    torch.testing.assert_close(found, ops.attention_backward(grad.contiguous(), *copies, *wanted), rtol=0, atol=1e-14)


def test_a_gradient_that_was_broadcast_is_read_right():
    q, k, v, _ = _inputs((2, 3, 7, 5, 6))
    ones = torch.ones((), dtype=torch.float64).expand(q.shape)
    found = ops.attention_backward(ones, q, k, v, *ops.attention_with_lse(q, k, v))
    _assert_near(found, _truth(q, k, v, ones)[2:], 1e-12)


def test_the_reference_gives_the_same_in_pieces_of_the_queries(monkeypatch):
    q, k, v, grad = _inputs((2, 3, 9, 5, 6))
    monkeypatch.setattr(ops, "_REFERENCE_SCORES", 2 * 3 * 5 * 2)  # two queries at once
    out, lse = ops._reference_forward(q, k, v)
    _assert_near([out, lse, *ops._reference_backward(grad, q, k, v, out, lse)], _truth(q, k, v, grad), 1e-12)


@pytest.mark.parametrize("max_batch", [1, 3, 7])
def test_cutting_the_batch_changes_nothing(monkeypatch, max_batch):
    q, k, v, grad = _inputs((7, 2, 5, 4, 6))
    monkeypatch.setattr(ops, "_CPU", ops._CPU._replace(max_batch=lambda _q: max_batch))
    out, lse = ops.attention_with_lse(q, k, v)
    _assert_near([out, lse, *ops.attention_backward(grad, q, k, v, out, lse)], _truth(q, k, v, grad), 1e-12)


def test_without_keys_the_output_is_zero_and_merges_as_nothing():
    q, k, v, grad = _inputs((2, 3, 4, 5, 6))
    out, lse = ops.attention_with_lse(q, k, v)
    none, none_lse = ops.attention_with_lse(q, k[:, :, :0], v[:, :, :0])
    assert (none == 0).all() and (none_lse == -torch.inf).all()
    merge_(out, lse, none, none_lse)
    _assert_near([out, lse], _truth(q, k, v, grad)[:2], 1e-12)


@pytest.mark.parametrize("K", [5, 72])
def test_the_call_of_cuda_s_kernels_fits_their_signature(K):
    """Shapes and dtypes alone, on tensors without data: what can be seen of it where there is no GPU."""
    q, k, v, grad = _inputs((2, 3, 7, 5, K), dtype=torch.bfloat16, device="meta")
    out, lse = ops._CUDA.forward(q, k, v)
    assert out.shape == q.shape and lse.shape == (2, 3, 7) and lse.dtype == torch.float32
    assert [t.shape for t in ops._CUDA.backward(grad, q, k, v, out, lse)] == [q.shape, k.shape, v.shape]
