"""AdamW and the moving average of weights in one pass over a flat shard: each number of weight, gradient, moments and average is read once.

Apart, the average reads weight and average again: seven reads and five writes of 4 bytes become five and four.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_BLOCK = 1024


def reference(
    weight: Tensor,
    grad: Tensor,
    mean: Tensor,
    square: Tensor,
    average: Tensor,
    scale: Tensor,
    *,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    ema_decay: float,
    step: int,
) -> None:
    """One step, in place, as ``torch.optim.AdamW`` and ``average.lerp_(weight, 1 - ema_decay)`` do it.

    Args:
        weight: float32, as all but the gradient.
        grad: Any real dtype.
        mean: First moment.
        square: Second moment.
        average: Of weights.
        scale: One number by which the gradient is multiplied first, as clipping asks for; 0 leaves everything as it is, but for the
            decay of moments and weights: a step that is skipped is not given here.
        step: From 1.
    """
    g = grad.to(weight.dtype) * scale
    weight.mul_(1 - lr * weight_decay)
    mean.lerp_(g, 1 - beta1)
    square.mul_(beta2).addcmul_(g, g, value=1 - beta2)
    root = (square / (1 - beta2**step)).sqrt_().add_(eps)
    weight.addcdiv_(mean, root, value=-lr / (1 - beta1**step))
    average.lerp_(weight, 1 - ema_decay)


@torch.library.custom_op("opensora::adamw_ema", mutates_args=("weight", "mean", "square", "average"))
def adamw_ema(
    weight: Tensor,
    grad: Tensor,
    mean: Tensor,
    square: Tensor,
    average: Tensor,
    scale: Tensor,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    ema_decay: float,
    step: int,
) -> None:
    """As ``reference``, on contiguous tensors."""
    assert all(t.is_contiguous() for t in (weight, grad, mean, square, average)), "a flat shard is contiguous"
    if weight.numel():
        unbiased = (1 - beta1**step, 1 - beta2**step)
        _step[(triton.cdiv(weight.numel(), _BLOCK),)](
            weight,
            grad,
            mean,
            square,
            average,
            scale,
            weight.numel(),
            lr,
            beta1,
            beta2,
            eps,
            weight_decay,
            ema_decay,
            *unbiased,
            _BLOCK,
        )


@adamw_ema.register_fake
def _(weight: Tensor, *_) -> None:
    return None


@triton.jit
def _step(
    weight, grad, mean, square, average, scale, numbers, lr, beta1, beta2, eps, weight_decay, ema_decay, unbiased1, unbiased2,
    BLOCK: tl.constexpr,
):  # fmt: skip
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < numbers
    w = tl.load(weight + at, mask=inside, other=0.0) * (1.0 - lr * weight_decay)
    g = tl.load(grad + at, mask=inside, other=0.0).to(tl.float32) * tl.load(scale)
    m = tl.load(mean + at, mask=inside, other=0.0)
    m += (g - m) * (1.0 - beta1)
    s = tl.load(square + at, mask=inside, other=0.0) * beta2 + g * g * (1.0 - beta2)
    w -= lr / unbiased1 * m / (tl.sqrt(s / unbiased2) + eps)
    a = tl.load(average + at, mask=inside, other=0.0)
    tl.store(weight + at, w, mask=inside)
    tl.store(mean + at, m, mask=inside)
    tl.store(square + at, s, mask=inside)
    tl.store(average + at, a + (w - a) * (1.0 - ema_decay), mask=inside)
