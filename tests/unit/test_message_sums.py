"""Gradients of a linear whose output left in several messages are rounded as those of one product are."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from opensora_dist.models.layers import SelfAttention
from opensora_dist.parallel.sequence.messages import QkvMessages

WIDTH, HEADS, TOKENS, SEQUENCES = 64, 8, 48, 10
APART, TOGETHER = [slice(0, 1), slice(1, 2), slice(2, 3)], [slice(3)]


def message_of(grad: Tensor, *, ranks: int, parts: slice) -> Tensor:
    """What of a gradient of all q, k, v [l, G, 3 D] belongs to a message [P l, G, m, c]."""
    tokens, sequences, _ = grad.shape
    parts_PlGmc = grad.view(tokens, sequences, 3, ranks, -1)[:, :, parts].permute(3, 0, 1, 2, 4)
    return parts_PlGmc.reshape(ranks * tokens, sequences, -1, WIDTH // ranks)


def gradients(attn: SelfAttention, x: Tensor, grad: Tensor, *, ranks: int, parts: list[slice], pieces: int) -> list[Tensor]:
    """Of x, weight and bias."""
    qkv = QkvMessages(attn, ranks=ranks, tape=None)
    sent, wanted = [], []
    for piece, of_piece in zip(x.chunk(pieces, dim=1), grad.chunk(pieces, dim=1), strict=True):
        source = qkv.source(piece.contiguous())
        for part in parts:
            sent.append(source.write(parts=part))
            wanted.append(message_of(of_piece, ranks=ranks, parts=part))
    return list(torch.autograd.grad(sent, [x, attn.qkv.weight, attn.qkv.bias], wanted))


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("parts", [APART, TOGETHER], ids=["apart", "together"])
@pytest.mark.parametrize("pieces", [1, 5])
def test_gradients_in_bfloat16_are_as_near_to_exact_ones_as_one_products(ranks, parts, pieces):
    torch.manual_seed(0)
    attn = SelfAttention(WIDTH, heads=HEADS).bfloat16()
    x = torch.randn(TOKENS, SEQUENCES, WIDTH).bfloat16().requires_grad_()
    grad = torch.randn(TOKENS, SEQUENCES, 3 * WIDTH).bfloat16()
    inputs = [x, attn.qkv.weight, attn.qkv.bias]
    one = torch.autograd.grad(F.linear(*inputs), inputs, grad)
    doubled = [t.detach().double().requires_grad_() for t in inputs]
    exact = torch.autograd.grad(F.linear(*doubled), doubled, grad.double())
    found = gradients(attn, x, grad, ranks=ranks, parts=parts, pieces=pieces)
    for name, ours, theirs, right in zip(("x", "weight", "bias"), found, one, exact, strict=True):
        assert ours.dtype == torch.bfloat16
        far, near = (float((t.double() - right).norm() / right.norm()) for t in (ours, theirs))
        assert 0 < far <= 1.2 * near, (name, far, near)
