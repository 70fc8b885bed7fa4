"""Softmax attention, behind one function so that a faster kernel has one place to go."""

# B batch, N heads, L queries, M keys, K head dim

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from opensora_dist.ops.choice import current, interpreted
from opensora_dist.ops.flash import MOST_SEQUENCES, dense_rows, flash_attention, takes
from opensora_dist.ops.precision import accumulation_dtype, compute_dtype

# Attention over time has a batch of samples x tokens per frame: of 720p 19 clips are more than ``MOST_SEQUENCES``. (The memory-efficient
# kernel cuts its batch itself.) And the backward of flash kernels adds up the gradient of queries in rows of 128 and heads of a multiple of 32, which it finds by 32 bits: beyond, it
# reads and writes anywhere (flash-attention pull request 1500 mended it there in 2025; torch carries an older copy). Over 16 frames at
# XL/2 that is a batch of 10,922.
_CUDA_MAX_SUMS = 2**31
_CUDA_MAX_HEAD = 256  # of the flash kernels
_TRITON_MAX_HEAD = 128  # of the package's own: wider tiles don't fit registers
_REFERENCE_SCORES = 1 << 24  # numbers that the reference holds of an L x M matrix at once


def attention(q_BNLK: Tensor, k_BNMK: Tensor, v_BNMK: Tensor, *, mask_BM: Tensor | None = None) -> Tensor:
    """``softmax(q k^T / sqrt(K)) v`` over the keys that take part.

    Args:
        q_BNLK: Queries; any strides.
        k_BNMK: Keys.
        v_BNMK: Values.
        mask_BM: bool, True where a key takes part; None lets all take part. A sample without any key gets zeros.
    Returns:
        [B, N, L, K].
    """
    if mask_BM is None:
        return _attend_in_parts(q_BNLK, k_BNMK, v_BNMK, max_batch=_flash_batch(q_BNLK) if q_BNLK.is_cuda else len(q_BNLK))
    # A softmax over nothing is NaN in some kernels, forward or backward. So a sample without keys attends to all of them, with
    # values of zero: that costs a copy of the values, not of the (much larger) output.
    empty_B1 = ~mask_BM.any(dim=1, keepdim=True)
    v_BNMK = v_BNMK.masked_fill(empty_B1[:, :, None, None], 0)
    return F.scaled_dot_product_attention(q_BNLK, k_BNMK, v_BNMK, attn_mask=(mask_BM | empty_B1)[:, None, None])


def triton_takes(like: Tensor, *, head_dim: int) -> bool:
    """Whether the choice is Triton's kernels, and those of few frames, captions and packs compute with such queries, keys and values.

    They are laid out for halves: of float32 tiles take twice the registers. Triton's interpreter, for tests, has no such limits.

    Args:
        like: Queries, or what the linear is given that makes them.
    """
    if current().kernels != "triton" or head_dim > _TRITON_MAX_HEAD:
        return False
    dtype = compute_dtype(like)
    return dtype in (torch.float16, torch.bfloat16) or (dtype == torch.float32 and interpreted())


def _attend_in_parts(q_BNLK: Tensor, k_BNMK: Tensor, v_BNMK: Tensor, *, max_batch: int) -> Tensor:
    attend = flash_attention if takes(q_BNLK) else F.scaled_dot_product_attention
    if len(q_BNLK) <= max_batch:
        return attend(q_BNLK, k_BNMK, v_BNMK)
    parts = zip(*(torch.split(tensor, max_batch) for tensor in (q_BNLK, k_BNMK, v_BNMK)))
    return torch.cat([attend(*part) for part in parts])


def _flash_batch(q_BNLK: Tensor) -> int:
    """The largest batch of one call."""
    _, N, L, K = q_BNLK.shape
    sums = N * (L + -L % 128) * (K + -K % 32)
    return min(MOST_SEQUENCES, max(1, _CUDA_MAX_SUMS // max(1, sums)))


# --- attention whose parts can be put together: keys that are not all here at once

Tensors = tuple[Tensor, ...]


class _Kernel(NamedTuple):
    """One backend.

    Args:
        forward: (q, k, v) to (out, lse).
        backward: (grad_out, q, k, v, out, lse) to (dq, dk, dv).
        max_batch: Largest batch of one call with queries like these.
    """

    forward: Callable[..., Tensors]
    backward: Callable[..., Tensors]
    max_batch: Callable[[Tensor], int]


@torch.no_grad()
def attention_with_lse(q_BNLK: Tensor, k_BNMK: Tensor, v_BNMK: Tensor) -> tuple[Tensor, Tensor]:
    """``attention`` over all keys, and the log of each query's sum of exponentials. Without autograd: ``attention_backward`` is its own.

    What is computed of two parts of the keys merges into what all of them give: with ``w = sigmoid(lse_2 - lse_1)`` the output is
    ``out_1 + w (out_2 - out_1)`` and its lse ``logaddexp(lse_1, lse_2)``.

    Args:
        q_BNLK: Queries; any strides.
        k_BNMK: Keys; their number M may be another than L. Without any, the output is 0 and lse -inf.
        v_BNMK: Values.
    Returns:
        out [B, N, L, K] in the inputs' dtype, and lse [B, N, L] of scores scaled by 1 / sqrt(K), in float32 (float64 for float64).
    """
    kernel = _kernel(q_BNLK, k_BNMK)
    out, lse = _in_parts(kernel.forward, (q_BNLK, k_BNMK, v_BNMK), max_batch=kernel.max_batch(q_BNLK))
    return out, lse


@torch.no_grad()
def attention_backward(
    grad_BNLK: Tensor, q_BNLK: Tensor, k_BNMK: Tensor, v_BNMK: Tensor, out_BNLK: Tensor, lse_BNL: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of ``attention``.

    ``k`` and ``v`` may be a part of the keys that ``out`` and ``lse`` were merged over. Then dk and dv are those of this part, and the
    sum of dq over all parts is the gradient of q.

    Args:
        grad_BNLK: Gradient of ``out``.
        q_BNLK: Queries.
        k_BNMK: Keys, all or some.
        v_BNMK: Their values.
        out_BNLK: Output over all keys.
        lse_BNL: Its lse.
    Returns:
        (dq, dk, dv) in the shapes and the dtype of q, k, v.
    """
    kernel = _kernel(q_BNLK, k_BNMK)
    tensors = (grad_BNLK, q_BNLK, k_BNMK, v_BNMK, out_BNLK, lse_BNL)
    dq, dk, dv = _in_parts(kernel.backward, tensors, max_batch=kernel.max_batch(q_BNLK))
    return dq, dk, dv


def _kernel(q_BNLK: Tensor, k_BNMK: Tensor) -> _Kernel:
    if q_BNLK.numel() == 0 or k_BNMK.numel() == 0:
        return _REFERENCE  # the CPU's kernel divides by a size of 0
    if q_BNLK.device.type == "cpu":
        return _CPU
    if q_BNLK.is_cuda and q_BNLK.dtype in (torch.float16, torch.bfloat16) and q_BNLK.shape[-1] <= _CUDA_MAX_HEAD:
        return _CUDA
    return _REFERENCE


def _in_parts(kernel: Callable[..., Tensors], tensors: Tensors, *, max_batch: int) -> Tensors:
    if len(tensors[0]) <= max_batch:
        return kernel(*tensors)
    parts = [kernel(*part) for part in zip(*(torch.split(tensor, max_batch) for tensor in tensors))]
    return tuple(torch.cat(results) for results in zip(*parts))


def _cpu_forward(q_BNLK: Tensor, k_BNMK: Tensor, v_BNMK: Tensor) -> Tensors:
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(*dense_rows(q_BNLK, k_BNMK, v_BNMK))
    return out, lse


def _cpu_backward(
    grad_BNLK: Tensor, q_BNLK: Tensor, k_BNMK: Tensor, v_BNMK: Tensor, out_BNLK: Tensor, lse_BNL: Tensor
) -> Tensors:
    tensors = dense_rows(grad_BNLK, q_BNLK, k_BNMK, v_BNMK, out_BNLK)
    dq, dk, dv = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(*tensors, lse_BNL, 0.0, False)
    return dq, dk, dv


def _cuda_forward(q_BNLK: Tensor, k_BNMK: Tensor, v_BNMK: Tensor) -> Tensors:
    K = q_BNLK.shape[-1]
    out, lse, *_ = torch.ops.aten._scaled_dot_product_flash_attention(*_padded(q_BNLK, k_BNMK, v_BNMK), scale=K**-0.5)
    return out[..., :K], lse


def _cuda_backward(
    grad_BNLK: Tensor, q_BNLK: Tensor, k_BNMK: Tensor, v_BNMK: Tensor, out_BNLK: Tensor, lse_BNL: Tensor
) -> Tensors:
    L, M, K = q_BNLK.shape[2], k_BNMK.shape[2], q_BNLK.shape[-1]
    tensors = _padded(grad_BNLK, q_BNLK, k_BNMK, v_BNMK, out_BNLK)
    # Read by dropout alone, of which there is none.
    seed, offset = (torch.empty(size, dtype=torch.uint64, device=q_BNLK.device) for size in ((2,), ()))
    grads = torch.ops.aten._scaled_dot_product_flash_attention_backward(
        *tensors, lse_BNL.contiguous(), None, None, L, M, 0.0, False, seed, offset, scale=K**-0.5
    )
    return tuple(grad[..., :K] for grad in grads)


def _padded(*tensors: Tensor) -> Tensors:
    """Zeros up to a head dim that the kernels of CUDA take, a multiple of 8: they change no score and no output."""
    missing = -tensors[0].shape[-1] % 8
    return dense_rows(*(F.pad(tensor, (0, missing)) if missing else tensor for tensor in tensors))


def _reference_forward(q_BNLK: Tensor, k_BNMK: Tensor, v_BNMK: Tensor) -> Tensors:
    exact, scale = accumulation_dtype(q_BNLK.dtype), q_BNLK.shape[-1] ** -0.5
    k, v = k_BNMK.to(exact), v_BNMK.to(exact)
    outs, lses = [], []
    with torch.autocast(q_BNLK.device.type, enabled=False):
        for q in torch.split(q_BNLK, _reference_rows(q_BNLK, k_BNMK), dim=2):
            scores = (q.to(exact) * scale) @ k.mT
            lse = torch.logsumexp(scores, dim=-1)
            outs.append((scores - lse[..., None]).exp() @ v)
            lses.append(lse)
    return torch.cat(outs, dim=2).to(q_BNLK.dtype), torch.cat(lses, dim=2)


def _reference_backward(
    grad_BNLK: Tensor, q_BNLK: Tensor, k_BNMK: Tensor, v_BNMK: Tensor, out_BNLK: Tensor, lse_BNL: Tensor
) -> Tensors:
    exact, scale = accumulation_dtype(q_BNLK.dtype), q_BNLK.shape[-1] ** -0.5
    k, v = k_BNMK.to(exact), v_BNMK.to(exact)
    dqs, dk, dv = [], torch.zeros_like(k), torch.zeros_like(v)
    rows = _reference_rows(q_BNLK, k_BNMK)
    with torch.autocast(q_BNLK.device.type, enabled=False):
        for part in zip(*(torch.split(tensor, rows, dim=2) for tensor in (grad_BNLK, q_BNLK, out_BNLK, lse_BNL))):
            grad, q, out, lse = (tensor.to(exact) for tensor in part)
            p_BNLM = (q * scale @ k.mT - lse[..., None]).exp()
            dscores_BNLM = p_BNLM * (grad @ v.mT - (grad * out).sum(dim=-1, keepdim=True)) * scale
            dqs.append(dscores_BNLM @ k)
            dk += dscores_BNLM.mT @ q
            dv += p_BNLM.mT @ grad
    return torch.cat(dqs, dim=2).to(q_BNLK.dtype), dk.to(k_BNMK.dtype), dv.to(v_BNMK.dtype)


def _reference_rows(q_BNLK: Tensor, k_BNMK: Tensor) -> int:
    """Queries at once, so that the scores of a long sequence are never there all together."""
    return max(1, _REFERENCE_SCORES // max(1, q_BNLK.shape[0] * q_BNLK.shape[1] * k_BNMK.shape[2]))


_CPU = _Kernel(_cpu_forward, _cpu_backward, len)
_CUDA = _Kernel(_cuda_forward, _cuda_backward, _flash_batch)
_REFERENCE = _Kernel(_reference_forward, _reference_backward, len)
