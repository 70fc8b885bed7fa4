"""Attention kernels are their torch reference: forward and backward, on odd shapes, with any strides and masks, in every precision."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

pytest.importorskip("triton", reason="Triton runs on Linux only; pip install 'opensora-dist[kernels]'")

from kernel_checks import TOLERANCES, assert_same, draws
from opensora_kernels import short_attention, varlen_attention
from opensora_kernels.products import WIDEST_HEAD

from opensora_dist.ops import attention, frames

COMPILED = os.environ.get("OPENSORA_KERNEL_TESTS") == "cuda"
DTYPE = torch.bfloat16 if COMPILED else torch.float32
IN_FLOAT32 = pytest.mark.skipif(
    COMPILED, reason="compiled, nobody calls these kernels in float32: unset OPENSORA_KERNEL_TESTS, and the interpreter runs them"
)
DTYPES = pytest.mark.parametrize(
    "dtype", [pytest.param(dtype, marks=[IN_FLOAT32] * (dtype == torch.float32)) for dtype in TOLERANCES], ids=str
)


@DTYPES
@pytest.mark.parametrize(
    "B, T, S, N, K", [(2, 16, 3, 2, 72), (1, 5, 3, 2, 24), (2, 1, 2, 3, 16), (1, 33, 2, 1, 64), (1, 17, 1, 1, 100)]
)
def test_attention_over_frames(dtype, B, T, S, N, K):
    assert_same(short_attention.short_attention, short_attention.reference, draws(dtype, (B, T, S, 3, N, K)))


@DTYPES
@pytest.mark.parametrize("order", [(0, 1, 2), (1, 0, 2), (2, 0, 1), (1, 2, 0)], ids=str)
def test_frames_are_attended_to_where_they_lie_in_memory(order, dtype):
    """Rows that came from other ranks have frames outermost; what is given, and the gradient, is dense in the same order."""
    shape = (2, 5, 3)
    (memory,) = draws(dtype, (*(shape[dim] for dim in order), 3, 2, 24))
    back = [order.index(dim) for dim in range(3)]

    def view(x: Tensor) -> Tensor:
        return x.permute(*back, 3, 4, 5)

    def run_of_places(x: Tensor) -> Tensor:
        return view(x)[:, :, 1:]

    for part in (view, run_of_places):
        ours, theirs = short_attention.short_attention, short_attention.reference
        assert_same(lambda x: ours(part(x)), lambda x: theirs(part(x)), [memory.clone()])
    qkv = run_of_places(memory)
    out = short_attention.short_attention(qkv)
    assert out.permute(*order, 3, 4).is_contiguous()
    grad = short_attention.short_attention_backward(out, qkv)
    assert grad.shape == qkv.shape and grad.permute(*order, 3, 4, 5).is_contiguous()


def test_more_frames_than_a_tile_holds_are_refused():
    with pytest.raises(AssertionError, match="129 frames"):
        short_attention.short_attention(torch.zeros(1, 129, 1, 3, 1, 16))


def test_heads_wider_than_a_tile_holds_are_refused_and_operators_know_the_limits():
    """Operators can't look them up: Triton isn't everywhere."""
    with pytest.raises(AssertionError, match="heads of 136"):
        short_attention.short_attention(torch.zeros(1, 2, 1, 3, 1, 136))
    with pytest.raises(AssertionError, match="heads of 136"):
        varlen_attention.varlen_attention(torch.zeros(3, 1, 136), torch.zeros(3, 2, 1, 136), *of_pack([3], [3]))
    assert attention._TRITON_MAX_HEAD == WIDEST_HEAD and frames._LONGEST == short_attention.LONGEST


def ends(lengths: Sequence[int]) -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)


def of_pack(queries: Sequence[int], keys: Sequence[int]) -> tuple:
    k_ends = ends(keys)
    return ends(queries), k_ends, k_ends[1:], None, max(queries), max(keys)


PACKS = {
    "short samples": ([5, 20, 3], [4, 9, 6], 2, 24),
    "a sample of several tiles": ([130, 1, 40], [60, 75, 7], 1, 72),
    "a sample without a key, and one without a query": ([20, 7, 0, 30], [9, 0, 11, 30], 1, 64),
    "one sample": ([65], [65], 1, 40),
}


@DTYPES
@pytest.mark.parametrize("pack", PACKS)
def test_attention_of_each_sample_to_its_own_keys(dtype, pack):
    queries, keys, N, K = PACKS[pack]
    inputs = draws(dtype, (sum(queries), N, K), (sum(keys), 2, N, K))
    samples = of_pack(queries, keys)
    assert_same(
        lambda q, kv: varlen_attention.varlen_attention(q, kv, *samples),
        lambda q, kv: varlen_attention.reference(q, kv, *samples),
        inputs,
    )


def padded(queries: Sequence[int], mask_GY: Tensor) -> tuple:
    G, Y = mask_GY.shape
    k_ends = torch.arange(0, (G + 1) * Y, Y, dtype=torch.int32)
    stops = k_ends[:-1] + (mask_GY * torch.arange(1, Y + 1)).amax(1).to(torch.int32)
    return ends(queries), k_ends, stops, mask_GY.flatten(), max(queries), Y


@DTYPES
@pytest.mark.parametrize("Y, N, K", [(7, 2, 24), (70, 1, 72)])
def test_keys_that_are_masked_in_any_pattern_are_nobodys(dtype, Y, N, K):
    queries = [33, 70, 5, 9]
    mask_GY = draws(torch.float32, (4, Y))[0] < 0
    mask_GY[1] = False  # no key at all
    mask_GY[2, :] = True
    mask_GY[3, Y // 2 :] = False  # an end that no tile need see
    q, kv = draws(dtype, (sum(queries), N, K), (4 * Y, 2, N, K))
    samples = padded(queries, mask_GY)
    assert_same(
        lambda q, kv: varlen_attention.varlen_attention(q, kv, *samples),
        lambda q, kv: varlen_attention.reference(q, kv, *samples),
        [q, kv],
    )
    out, _ = varlen_attention.varlen_attention(q, kv, *samples)
    dq, dkv = torch.autograd.grad(out, (q, kv), torch.ones_like(out))
    assert (out[33:103] == 0).all() and (dq[33:103] == 0).all() and (dkv.view(4, Y, -1)[~mask_GY] == 0).all()


@pytest.mark.filterwarnings("ignore:overflow:RuntimeWarning")  # of numpy's exponential, in the interpreter
@IN_FLOAT32
def test_what_masked_keys_hold_reaches_nobody():
    mask_GY = torch.tensor([[True, False, True, False], [False, False, False, True]])
    q, kv = draws(torch.float32, (12, 1, 16), (8, 2, 1, 16))
    samples = padded([7, 5], mask_GY)
    kv = torch.where(mask_GY.flatten()[:, None, None, None], kv, 1e30).requires_grad_()
    out, _ = varlen_attention.varlen_attention(q.requires_grad_(), kv, *samples)
    assert torch.isfinite(out).all() and out.abs().max() < 10
    for grad in torch.autograd.grad(out, (q, kv), torch.ones_like(out)):
        assert torch.isfinite(grad).all() and grad.abs().max() < 100


@IN_FLOAT32
def test_queries_dealt_out_for_the_gradients_of_few_keys_are_added_up(monkeypatch):
    """The last share may be empty, and a sample may have less than one."""
    samples = of_pack([300, 20], [20, 5])
    q, kv = draws(torch.float32, (320, 1, 24), (25, 2, 1, 24))
    (grad,) = draws(torch.float32, (320, 1, 24))
    found = []
    for programs in (1, 10):
        monkeypatch.setattr(varlen_attention, "_PROGRAMS", programs)
        out, _ = varlen_attention.varlen_attention(q.requires_grad_(), kv.requires_grad_(), *samples)
        found.append(torch.autograd.grad(out, (q, kv), grad))
    for whole, split in zip(*found, strict=True):
        torch.testing.assert_close(split, whole, rtol=1e-5, atol=1e-5)


@DTYPES
def test_the_queries_and_the_keys_of_a_linears_output_are_read_where_they_lie(dtype):
    samples = of_pack([10, 20], [10, 20])
    ours, theirs = varlen_attention.varlen_attention, varlen_attention.reference
    assert_same(
        lambda qkv: ours(qkv[:, 0], qkv[:, 1:], *samples),
        lambda qkv: theirs(qkv[:, 0], qkv[:, 1:], *samples),
        draws(dtype, (30, 3, 2, 24)),
    )


@IN_FLOAT32
def test_a_gradient_that_was_broadcast_is_taken_as_it_comes():
    (qkv,) = draws(torch.float32, (30, 3, 2, 24))
    samples = of_pack([10, 20], [10, 20])
    qkv.requires_grad_()
    out, _ = varlen_attention.varlen_attention(qkv[:, 0], qkv[:, 1:], *samples)
    wanted = varlen_attention.reference(qkv[:, 0], qkv[:, 1:], *samples)
    grad = torch.ones(1, 1, 1).expand_as(out)
    torch.testing.assert_close(
        torch.autograd.grad(out, qkv, grad)[0], torch.autograd.grad(wanted, qkv, grad)[0], rtol=1e-5, atol=1e-5
    )


@IN_FLOAT32
def test_the_log_of_sums_of_exponentials_is_given_with_it():
    q, kv = draws(torch.float32, (30, 2, 24), (25, 2, 2, 24))
    _, lse = varlen_attention.varlen_attention(q, kv, *of_pack([10, 20], [25, 0]))
    scores = torch.einsum("qnk,mnk->nqm", q[:10], kv[:, 0]) / 24**0.5
    torch.testing.assert_close(lse[:, :10], scores.logsumexp(dim=-1))
    assert (lse[:, 10:] == 0).all()


class Made(TorchDispatchMode):
    """Notes what operators give."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: dict[str, list[torch.Size]] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.shapes.setdefault(str(func), []).extend(t.shape for t in tree_leaves(out) if isinstance(t, Tensor))
        return out


class Dropped(torch.autograd.Function):
    """Whose input gets no gradient."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return None


def test_no_zeros_are_made_for_the_gradient_of_the_log_and_nothing_is_computed_where_the_output_has_none():
    q, kv = (t.requires_grad_() for t in draws(DTYPE, (9, 2, 16), (7, 2, 2, 16)))
    out, lse = varlen_attention.varlen_attention(q, kv, *of_pack([4, 5], [7, 0]))
    assert not lse.requires_grad
    with Made() as made:
        torch.autograd.grad(out, (q, kv), torch.ones_like(out), retain_graph=True)
    backward = "opensora.varlen_attention_backward.default"
    assert made.shapes.pop(backward) == [q.shape, kv.shape]
    assert lse.shape not in {shape for shapes in made.shapes.values() for shape in shapes}
    with Made() as made:
        grads = torch.autograd.grad(Dropped.apply(out).sum(), (q, kv), allow_unused=True)
    assert grads == (None, None) and backward not in made.shapes


def operators() -> Iterator[tuple[str, Callable, tuple]]:
    (qkv,) = draws(DTYPE, (1, 5, 2, 3, 1, 16))
    yield "short_attention", short_attention.short_attention, (qkv.clone().requires_grad_(),)
    frames_first = draws(DTYPE, (5, 2, 3, 3, 1, 16))[0].transpose(0, 1)
    yield "short_attention, frames outermost", short_attention.short_attention, (frames_first.requires_grad_(),)
    q, kv = draws(DTYPE, (9, 1, 16), (7, 2, 1, 16))
    q.requires_grad_(), kv.requires_grad_()
    yield "varlen_attention", varlen_attention.varlen_attention, (q, kv, *of_pack([4, 5], [7, 0]))
    mask = torch.tensor([[True, False, True], [True, False, False]])
    yield "varlen_attention, masked", varlen_attention.varlen_attention, (q, kv[:6], *padded([4, 5], mask))


@pytest.mark.parametrize("name", [name for name, _, _ in operators()])
def test_torch_sees_through_each_attention(name):
    """Schema, fake tensors, autograd and compilation, by torch's own checks."""
    operator, inputs = next((operator, inputs) for found, operator, inputs in operators() if found == name)
    torch.library.opcheck(operator, inputs)
