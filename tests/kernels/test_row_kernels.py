"""Kernels that work on each token by itself are their torch references: forward and backward, on odd shapes, in every mix of dtypes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import pytest
import torch
from kernel_checks import assert_same, draws
from torch import Tensor

pytest.importorskip("triton", reason="Triton runs on Linux only; pip install 'opensora-dist[kernels]'")

from opensora_kernels import add_norm_modulate, bias_gelu, gated, norm_modulate
from opensora_kernels.rows import rows_per_program

EPS = 1e-6
F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
MIXES = {  # of residual stream, branch, modulation, and what the next linear is given
    "float32": (F32, F32, F32, F32),
    "bfloat16": (BF16, BF16, BF16, BF16),
    "float16": (F16, F16, F16, F16),
    "autocast": (F32, BF16, F32, BF16),
    "autocast with gathered bfloat16 weights": (F32, BF16, BF16, BF16),
    "a modulation finer than the stream": (BF16, BF16, F32, BF16),
}
SHAPES = [(2, 3, 5, 72), (1, 1, 1, 5), (1, 5, 7, 130)]
MIXED = pytest.mark.parametrize("mix", MIXES.values(), ids=MIXES)
SHAPED = pytest.mark.parametrize("shape", SHAPES, ids=str)


def tokens(dtype: torch.dtype, shape: tuple[int, ...], *, number: int) -> Tensor:
    """[B, T, S, D]; the first of a call as a transposed view, the second contiguous, so that layouts meet."""
    B, T, S, D = shape
    return draws(dtype, (B, S, T, D), (number + 1,))[0].transpose(1, 2) if number % 2 == 0 else draws(dtype, shape)[0]


def of_samples(dtype: torch.dtype, shape: tuple[int, ...], *, kinds: int) -> list[Tensor]:
    """[B, D] each, rows of one tensor as a block's modulation has them."""
    return [row.detach() for row in draws(dtype, (shape[0], kinds, shape[-1]))[0].unbind(1)]


def ways(
    mix: tuple[torch.dtype, ...], shape: tuple[int, ...]
) -> Iterator[tuple[str, Callable, Callable, list[Tensor], list[torch.dtype]]]:
    """Name, kernel, reference, inputs and the dtypes of outputs."""
    stream, branched, modulating, out = mix
    x, branch = tokens(stream, shape, number=0), tokens(branched, shape, number=1)
    gate, shift, scale = of_samples(modulating, shape, kinds=3)

    def both(operator: Callable, reference: Callable) -> tuple[Callable, Callable]:
        return partial(operator, out_dtype=out, eps=EPS), partial(reference, out_dtype=torch.float64, eps=EPS)

    yield "norm_modulate", *both(norm_modulate.norm_modulate, norm_modulate.reference), [x, shift, scale], [out]
    yield "gated", gated.gated, gated.reference, [x, branch, gate], [stream]
    yield "gated, of a branch along time", gated.gated, gated.reference, [branch.to(stream), x.to(branched), gate], [stream]
    kernel, wanted = both(add_norm_modulate.add_norm_modulate, add_norm_modulate.reference)
    yield "add_norm_modulate", kernel, wanted, [x, branch, shift, scale], [stream, out]


NAMES = [name for name, *_ in ways(MIXES["float32"], SHAPES[0])]


def chosen(name: str, mix: tuple[torch.dtype, ...], shape: tuple[int, ...]) -> tuple:
    return next(rest for found, *rest in ways(mix, shape) if found == name)


@pytest.mark.parametrize("name", NAMES)
@MIXED
@SHAPED
def test_a_kernel_gives_what_its_reference_gives_and_the_gradient_of_each_input(name, mix, shape):
    kernel, reference, inputs, dtypes = chosen(name, mix, shape)
    assert_same(kernel, reference, inputs, dtypes=dtypes)


@pytest.mark.parametrize("name", NAMES)
def test_sums_over_tokens_are_the_same_however_many_rows_a_program_has(name, monkeypatch):
    for module in (norm_modulate, gated, add_norm_modulate):
        monkeypatch.setattr(module, "FEWEST_ROWS", 64)
        monkeypatch.setattr(module, "MOST_ROWS", 64)
    kernel, reference, inputs, dtypes = chosen(name, MIXES["float32"], (1, 10, 7, 24))
    assert_same(kernel, reference, inputs, dtypes=dtypes)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("shape", [(2, 0, 5, 24), (0, 2, 5, 24), (1, 3, 0, 24)], ids=str)
def test_no_token_at_all_is_no_case_of_its_own(name, shape):
    kernel, _, inputs, dtypes = chosen(name, MIXES["autocast"], shape)
    outs = kernel(*(t.requires_grad_() for t in inputs))
    outs = outs if isinstance(outs, tuple) else (outs,)
    assert [(out.shape, out.dtype) for out in outs] == [(shape, dtype) for dtype in dtypes]
    for grad, given in zip(torch.autograd.grad(sum(out.float().sum() for out in outs), inputs), inputs, strict=True):
        assert grad.shape == given.shape and grad.dtype == given.dtype and not grad.any()


@pytest.mark.parametrize("name", NAMES)
def test_tokens_whose_width_is_not_innermost_are_read_and_what_comes_of_them_is_right(name):
    """Of these there is a copy; where the result has the strides of such an input, it has those of the copy, in fakes as well."""
    kernel, reference, inputs, dtypes = chosen(name, MIXES["float32"], (2, 3, 5, 24))
    inputs = [t.movedim(-1, 1).contiguous().movedim(1, -1).detach() if t.dim() == 4 else t for t in inputs]
    assert all(t.stride(-1) == 15 for t in inputs if t.dim() == 4)
    assert_same(kernel, reference, inputs, dtypes=dtypes)


@pytest.mark.parametrize("name", NAMES)
def test_what_is_not_one_row_for_each_sample_is_refused(name):
    kernel, _, inputs, _ = chosen(name, MIXES["float32"], (2, 3, 5, 24))
    for row in (inputs[-1][:1], inputs[-1][:, :20]):
        with pytest.raises(AssertionError, match=r"for samples and width \(2, 24\)"):
            kernel(*inputs[:-1], row)


def test_the_stream_and_gradients_lie_in_memory_as_what_they_belong_to_and_what_a_linear_reads_is_contiguous():
    shape = (2, 3, 5, 24)
    x, branch = tokens(F32, shape, number=0).requires_grad_(), tokens(F32, shape, number=1).requires_grad_()
    gate, shift, scale = of_samples(F32, shape, kinds=3)
    stream, out = add_norm_modulate.add_norm_modulate(x, branch, shift, scale, F32, EPS)
    assert stream.stride() == x.stride() != out.stride() and out.is_contiguous()
    dx, dbranch = torch.autograd.grad(stream.sum() + out.sum(), (x, branch))
    assert dx.stride() == x.stride() and dbranch.is_contiguous()
    stream = gated.gated(branch, x, gate)
    (dx,) = torch.autograd.grad(stream.sum(), x)
    assert stream.is_contiguous() and dx.stride() == x.stride()


@MIXED
@pytest.mark.parametrize("shape", [(3, 7, 300), (1, 5), (33, 257)], ids=str)
def test_bias_and_gelu(mix, shape):
    _, branched, modulating, _ = mix
    (x,), (bias,) = draws(branched, shape), draws(modulating, shape[-1:])
    assert_same(bias_gelu.bias_gelu, bias_gelu.reference, [x * 4, bias])


def test_the_bias_gradient_is_the_same_however_many_rows_a_program_has(monkeypatch):
    monkeypatch.setattr(bias_gelu, "FEWEST_ROWS", 64)
    x, bias = draws(F32, (70, 40), (40,))
    assert_same(bias_gelu.bias_gelu, bias_gelu.reference, [x, bias])


def test_gelu_of_no_token_gives_a_bias_gradient_of_zero():
    x, bias = torch.zeros(0, 3, 40, dtype=BF16, requires_grad=True), torch.ones(40, requires_grad=True)
    out = bias_gelu.bias_gelu(x, bias)
    dx, dbias = torch.autograd.grad(out.float().sum(), (x, bias))
    assert out.shape == dx.shape == x.shape and out.dtype == BF16 and not dbias.any()


@pytest.mark.filterwarnings("ignore:overflow:RuntimeWarning")  # of numpy's exponential, in the interpreter
def test_gelu_of_huge_numbers_is_them_or_zero():
    x = torch.tensor([[-1e4, -50.0, 0.0, 50.0, 1e4]])
    torch.testing.assert_close(bias_gelu.bias_gelu(x, torch.zeros(5)), torch.tensor([[0.0, 0.0, 0.0, 50.0, 1e4]]))


def test_programs_fill_a_device_before_their_sums_are_kept_small():
    wanted = 4 * 132  # four programs to each of an H100's multiprocessors
    sizes = {round(1.07**n) + odd for n in range(200) for odd in (-1, 0, 1)} | {0, 4096, 65_536, 524_288}
    for rows in sizes:
        each = rows_per_program(rows, least=8, most=128)
        assert each in (8, 16, 32, 64, 128)
        assert each == 8 or rows >= wanted * each, "no more rows to a program than leave enough programs"
        assert each == 128 or rows < wanted * 2 * each, "and no fewer than that"


@pytest.mark.parametrize("name", [*NAMES, "gated, rows not dense", "add_norm_modulate, rows not dense", "bias_gelu"])
def test_torch_sees_through_each_operator(name):
    """Schema, fake tensors, autograd and compilation, by torch's own checks."""
    shape = (2, 3, 5, 24)
    x, branch = tokens(F32, shape, number=0).requires_grad_(), tokens(BF16, shape, number=1).requires_grad_()
    gate, shift, scale = (t.requires_grad_() for t in of_samples(F32, shape, kinds=3))
    scattered = x.detach().movedim(-1, 1).contiguous().movedim(1, -1)
    calls = {
        "norm_modulate": (norm_modulate.norm_modulate, (x, shift, scale, BF16, EPS)),
        "gated": (gated.gated, (x, branch, gate)),
        "gated, of a branch along time": (gated.gated, (branch, x, gate)),
        "gated, rows not dense": (gated.gated, (scattered, scattered, gate)),
        "add_norm_modulate": (add_norm_modulate.add_norm_modulate, (x, branch, shift, scale, BF16, EPS)),
        "add_norm_modulate, rows not dense": (add_norm_modulate.add_norm_modulate, (scattered, branch, shift, scale, BF16, EPS)),
        "bias_gelu": (bias_gelu.bias_gelu, (branch, shift[0])),
    }
    operator, inputs = calls[name]
    inputs = tuple(t.detach().requires_grad_() if isinstance(t, Tensor) else t for t in inputs)
    torch.library.opcheck(operator, inputs)
