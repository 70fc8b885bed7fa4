"""Each kernel is its torch reference: forward and backward, on odd shapes, in every precision; and compiles for every architecture."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="Triton runs on Linux only; pip install 'opensora-dist[kernels]'")

from opensora_kernels import adamw_ema, bias_gelu, gated_norm, norm_modulate, short_attention, varlen_attention

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
@pytest.mark.parametrize("B, L, D", [(2, 7, 72), (1, 1, 5), (1, 35, 129)])
def test_norm_and_modulation(dtype, B, L, D):
    assert_same(norm_modulate.norm_modulate, norm_modulate.reference, draws(dtype, (B, L, D), (B, D), (B, D)))


@DTYPES
@pytest.mark.parametrize("B, L, D", [(2, 7, 72), (1, 1, 5), (1, 35, 130)])
def test_gate_norm_and_modulation_give_the_stream_and_what_the_next_branch_is_given(dtype, B, L, D):
    inputs = draws(dtype, (B, L, D), (B, L, D), (B, D), (B, D), (B, D))
    assert_same(gated_norm.gated_norm, gated_norm.reference, inputs)


def test_a_stream_in_float32_stays_so_beside_a_modulation_in_bfloat16():
    x, branch = draws(torch.float32, (2, 9, 40), (2, 9, 40))
    gate, shift, scale = draws(torch.bfloat16, (2, 40), (2, 40), (2, 40))
    stream, out = gated_norm.gated_norm(x, branch, gate, shift, scale)
    assert stream.dtype == torch.float32 and out.dtype == torch.bfloat16
    wanted = x + gate[:, None].float() * branch
    torch.testing.assert_close(stream, wanted, rtol=1e-6, atol=1e-6)
    assert norm_modulate.norm_modulate(x, shift, scale).dtype == torch.bfloat16


@DTYPES
@pytest.mark.parametrize("shape", [(3, 7, 300), (1, 5), (33, 257)])
def test_bias_and_gelu(dtype, shape):
    x, bias = draws(dtype, shape, shape[-1:])
    assert_same(bias_gelu.bias_gelu, bias_gelu.reference, [x * 4, bias])


@pytest.mark.filterwarnings("ignore:overflow:RuntimeWarning")  # of numpy's exponential, in the interpreter
def test_gelu_of_huge_numbers_is_them_or_zero():
    x = torch.tensor([[-1e4, -50.0, 0.0, 50.0, 1e4]])
    torch.testing.assert_close(bias_gelu.bias_gelu(x, torch.zeros(5)), torch.tensor([[0.0, 0.0, 0.0, 50.0, 1e4]]))


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


def test_adamw_and_average_over_three_steps():
    weight, mean, average = draws(torch.float32, (3001,), (3001,), (3001,))
    square = mean**2
    ours, theirs = ([t.clone() for t in (weight, mean, square, average)] for _ in range(2))
    options = {"lr": 1e-2, "beta1": 0.9, "beta2": 0.99, "eps": 1e-8, "weight_decay": 0.1, "ema_decay": 0.95}
    for step in (1, 2, 3):
        (grad,) = draws(torch.bfloat16, (3001,))
        for (w, m, s, a), one in ((ours, adamw_ema.adamw_ema), (theirs, adamw_ema.reference)):
            one(w, grad, m, s, a, torch.tensor(0.5), **options, step=step)
    for found, right in zip(ours, theirs, strict=True):
        torch.testing.assert_close(found, right, rtol=1e-6, atol=1e-6)


def test_adamws_reference_is_torchs():
    weight = draws(torch.float32, (100,))[0]
    parameter = torch.nn.Parameter(weight.clone())
    optimizer = torch.optim.AdamW([parameter], lr=1e-2, betas=(0.9, 0.99), eps=1e-8, weight_decay=0.1)
    mean, square, average = torch.zeros(100), torch.zeros(100), weight.clone()
    for step in (1, 2, 3):
        (grad,) = draws(torch.float32, (100,))
        parameter.grad = grad * 0.5
        optimizer.step()
        options = {"lr": 1e-2, "beta1": 0.9, "beta2": 0.99, "eps": 1e-8, "weight_decay": 0.1, "ema_decay": 0.95}
        adamw_ema.reference(weight, grad, mean, square, average, torch.tensor(0.5), **options, step=step)
    torch.testing.assert_close(weight, parameter.detach(), rtol=1e-6, atol=1e-7)


def operators() -> Iterator[tuple[str, Callable, tuple]]:
    x, branch, gate, shift, scale = draws(torch.float32, (2, 9, 24), (2, 9, 24), (2, 24), (2, 24), (2, 24))
    x.requires_grad_(), gate.requires_grad_()
    yield "norm_modulate", norm_modulate.norm_modulate, (x, shift, scale, 1e-6)
    yield "gated_norm", gated_norm.gated_norm, (x, branch, gate, shift, scale, 1e-6)
    across, also = (t.transpose(1, 2) for t in draws(torch.float32, (2, 24, 9), (2, 24, 9)))
    yield "norm_modulate, of a transposed view", norm_modulate.norm_modulate, (across.requires_grad_(), shift, scale, 1e-6)
    yield "gated_norm, of transposed views", gated_norm.gated_norm, (across, also, gate, shift, scale, 1e-6)
    yield "bias_gelu", bias_gelu.bias_gelu, (x, shift[0])
    yield "short_attention", short_attention.short_attention, (draws(torch.float32, (1, 5, 2, 3, 1, 16))[0].requires_grad_(),)
    q, k = draws(torch.float32, (9, 1, 16), (7, 1, 16))
    yield "varlen_attention", varlen_attention.varlen_attention, (q.requires_grad_(), k, k, ends([4, 5]), ends([7, 0]))
    numbers = (1e-2, 0.9, 0.99, 1e-8, 0.1, 0.95, 1)
    yield (
        "adamw_ema",
        adamw_ema.adamw_ema,
        (*draws(torch.float32, *[(50,)] * 3), torch.ones(50), torch.ones(50), torch.tensor(1.0), *numbers),
    )


@pytest.mark.parametrize("name", [name for name, _, _ in operators()])
def test_torch_sees_through_each_operator(name):
    """Schema, fake tensors, autograd and compilation, by torch's own checks."""
    operator, inputs = next((operator, inputs) for found, operator, inputs in operators() if found == name)
    torch.library.opcheck(operator, inputs)


def test_every_kernel_compiles_for_every_architecture():
    """In a process of its own: this one interprets."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "opensora_kernels.compile"]
    said = subprocess.run(command, capture_output=True, text=True, timeout=240, env=environment)
    assert said.returncode == 0, said.stderr
    rows = [line for line in said.stdout.splitlines() if line.startswith("| ") and "---" not in line][1:]
    assert len(rows) == 14 and all(len(row.split(" | ")) == 4 for row in rows)
