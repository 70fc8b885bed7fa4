"""A kernel held to its reference in float64."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

TOLERANCES = {torch.float32: 2e-6, torch.bfloat16: 1e-2, torch.float16: 2e-3}
"""Largest difference from the reference, of its largest value: some roundings of the dtype of what is written."""


def draws(dtype: torch.dtype, *shapes: tuple[int, ...]) -> list[Tensor]:
    """The same numbers for the same shapes."""
    generator = torch.Generator("cpu").manual_seed(sum(map(sum, shapes)))
    device = torch.get_default_device()  # the GPU, in its own suite
    return [torch.randn(shape, generator=generator, device="cpu").to(device, dtype) for shape in shapes]


def assert_same(
    kernel: Callable[..., Tensor | tuple[Tensor, ...]],
    reference: Callable[..., Tensor | tuple[Tensor, ...]],
    inputs: Sequence[Tensor],
    *,
    dtypes: Sequence[torch.dtype] | None = None,
) -> None:
    """Outputs and the gradient of every input, which has its input's dtype and shape.

    Args:
        kernel: May give more than the reference.
        inputs: Of both; the reference has them in float64.
        dtypes: Of the outputs; None for that of the first input.
    """
    given = [t.requires_grad_() for t in inputs]
    exact = [t.detach().double().requires_grad_() for t in inputs]
    wanted = _tuple(reference(*exact))
    outs = _tuple(kernel(*given))[: len(wanted)]
    assert [out.dtype for out in outs] == list(dtypes or [inputs[0].dtype] * len(outs))
    grads = [draw.to(out.dtype) for out in outs for draw in draws(torch.float32, tuple(out.shape))]
    found = torch.autograd.grad(outs, given, grads)
    right = torch.autograd.grad(wanted, exact, [g.double() for g in grads])
    assert [grad.dtype for grad in found] == [t.dtype for t in inputs]
    for number, (a, b) in enumerate(zip((*outs, *found), (*wanted, *right), strict=True)):
        assert a.shape == b.shape
        if not a.numel():
            continue
        tolerance = max(TOLERANCES[a.dtype], TOLERANCES[inputs[0].dtype])  # a stream is rounded before its statistics are taken
        error = (a.double() - b).abs().max() / b.abs().max().clamp_min(1e-30)
        assert error <= tolerance or (a.double() - b).abs().max() <= 1e-12, f"output or gradient {number}: {error:.2e}"


def _tuple(value: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return value if isinstance(value, tuple) else (value,)
