"""What a block does to each token between its linears: norms, modulation, gates, GELU. Every tensor of a sample is one row, [B, 1, 1, D]."""

# B batch, T frames, S tokens per frame, D width, H hidden width

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from opensora_dist.ops.choice import current

_EPS = 1e-6
"""Of every LayerNorm. It has no affine part: adaLN brings that."""


def norm_modulate(x_BTSD: Tensor, shift_B11D: Tensor, scale_B11D: Tensor) -> Tensor:
    """``LN(x) (1 + scale) + shift``, what a branch is given of the residual stream."""
    if current().kernels == "torch":
        return _norm(x_BTSD) * (1 + scale_B11D) + shift_B11D
    from opensora_kernels.norm_modulate import norm_modulate as kernel

    out: Tensor = kernel(_rows(x_BTSD), _of_sample(shift_B11D), _of_sample(scale_B11D), _EPS)
    return out.view(x_BTSD.shape)


def gated(x_BTSD: Tensor, branch_BTSD: Tensor, gate_B11D: Tensor) -> Tensor:
    """``x + gate branch``, the residual stream after a branch."""
    return x_BTSD + gate_B11D * branch_BTSD


def add_norm_modulate(x_BTSD: Tensor, branch_BTSD: Tensor, shift_B11D: Tensor, scale_B11D: Tensor) -> tuple[Tensor, Tensor]:
    """The residual stream after a branch without a gate, and what the next branch is given of it: ``norm_modulate(x + branch)``."""
    stream = x_BTSD + branch_BTSD
    return stream, norm_modulate(stream, shift_B11D, scale_B11D)


def linear_gelu(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """``gelu(x weight^T + bias)``, by tanh; [..., D] to [..., H]."""
    if current().kernels == "torch":
        return F.gelu(F.linear(x, weight, bias), approximate="tanh")
    from opensora_kernels.bias_gelu import bias_gelu as kernel

    out: Tensor = kernel(F.linear(x, weight), bias)
    return out


def _norm(x: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], eps=_EPS)


def _rows(x_BTSD: Tensor) -> Tensor:
    """[B, T S, D]."""
    return x_BTSD.flatten(1, 2)


def _of_sample(row_B11D: Tensor) -> Tensor:
    """[B, D] of what is the same for every token of a sample, also where it has been expanded to each."""
    assert all(size == 1 or stride == 0 for size, stride in zip(row_B11D.shape[1:3], row_B11D.stride()[1:3]))
    return row_B11D[:, 0, 0]
