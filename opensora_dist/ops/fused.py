"""What a block does to each token between its linears: norms, modulation, gates, GELU. What is of a sample is one row, [B, 1, 1, D]."""

# B batch, T frames, S tokens per frame, D width, H hidden width

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from opensora_dist.ops.choice import current
from opensora_dist.ops.compiled import region
from opensora_dist.ops.precision import compute_dtype

_EPS = 1e-6
"""Of every LayerNorm. It has no affine part: adaLN brings that."""


@region
def norm_modulate(x_BTSD: Tensor, shift_B11D: Tensor, scale_B11D: Tensor) -> Tensor:
    """``LN(x) (1 + scale) + shift``, what a branch is given of the residual stream."""
    if not _by_kernel(x_BTSD):
        return F.layer_norm(x_BTSD, x_BTSD.shape[-1:], eps=_EPS) * (1 + scale_B11D) + shift_B11D
    from opensora_kernels.norm_modulate import norm_modulate as kernel

    out: Tensor = kernel(x_BTSD, _of_sample(shift_B11D), _of_sample(scale_B11D), compute_dtype(x_BTSD), _EPS)
    return out


@region
def gated(x_BTSD: Tensor, branch_BTSD: Tensor, gate_B11D: Tensor) -> Tensor:
    """``x + gate branch``, the residual stream after a branch."""
    if not _by_kernel(x_BTSD):
        return x_BTSD + gate_B11D * branch_BTSD
    from opensora_kernels.gated import gated as kernel

    out: Tensor = kernel(x_BTSD, branch_BTSD, _of_sample(gate_B11D))
    return out


@region
def add_norm_modulate(x_BTSD: Tensor, branch_BTSD: Tensor, shift_B11D: Tensor, scale_B11D: Tensor) -> tuple[Tensor, Tensor]:
    """The residual stream after a branch without a gate, and what the next branch is given of it: ``norm_modulate(x + branch)``."""
    if not _by_kernel(x_BTSD):
        stream = x_BTSD + branch_BTSD
        return stream, norm_modulate(stream, shift_B11D, scale_B11D)
    from opensora_kernels.add_norm_modulate import add_norm_modulate as kernel

    shift_BD, scale_BD = _of_sample(shift_B11D), _of_sample(scale_B11D)
    both: tuple[Tensor, Tensor] = kernel(x_BTSD, branch_BTSD, shift_BD, scale_BD, compute_dtype(x_BTSD), _EPS)
    return both


@region
def linear_gelu(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """``gelu(x weight^T + bias)``, by tanh; [..., D] to [..., H]."""
    if not _by_kernel(x):
        return F.gelu(F.linear(x, weight, bias), approximate="tanh")
    from opensora_kernels.bias_gelu import bias_gelu as kernel

    out: Tensor = kernel(F.linear(x, weight), bias)
    return out


def _by_kernel(x: Tensor) -> bool:
    """Whether a kernel is to work on these tokens; of none of them there is no row of a sample, and nothing to gain."""
    return current().kernels == "triton" and x.numel() > 0


def _of_sample(row_B11D: Tensor) -> Tensor:
    """[B, D] of what is the same for every token of a sample, also where it has been expanded to each."""
    assert all(size == 1 or stride == 0 for size, stride in zip(row_B11D.shape[1:3], row_B11D.stride()[1:3]))
    return row_B11D[:, 0, 0]
