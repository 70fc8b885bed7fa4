"""What travels between tokens and heads, written by the matrix products themselves: nothing is packed before an all-to-all.

There, q, k, v of a rank's tokens are computed rank by rank, each product straight into the message of the rank that has those heads
(``QkvMessages``). Back, the output projection's gradient is (``project_home``). Gradients of weights are products into slices of one
gradient, and the queries', keys' and values' parts of dx are added up as they come: in float32 where linears compute in halves, so that
what one product would have given is rounded as often, once.

The two other ways, out of messages, are sums over ranks: the projection of what each rank gives of its heads, and dx of what each
gives of q, k and v. There are two forms of such a sum, and the one that moves fewer numbers is used. Product by product, each but the
first reads and writes the sum once more: (P - 1) D numbers a row. Or what came is joined to one matrix, as many numbers as came a row,
and one product reads that. So the projection is joined for more than 2 ranks; q, k and v sent together are for more than 4.
"""

# P ranks of a group, R rows: positions x sequences of the tokens here, D width, n heads of a rank, h of them in a message, K head dim,
# m of q, k, v in a message, c = h K

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from math import prod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from opensora_dist.core.types import Axis
from opensora_dist.ops.precision import accumulation_dtype, compute_dtype
from opensora_dist.parallel.recompute import Tape
from opensora_dist.parallel.sequence.base import Linear, Projections, cast, to_sequences

ALL = slice(None)


def rows_of(x_BtsD: Tensor, axis: Axis) -> Tensor:
    """The rows that messages are of, [l, ..., D], contiguous, as products compute with them: no pass over x, or one."""
    x_lGD = to_sequences(x_BtsD, axis)
    return x_lGD.to(compute_dtype(x_lGD), memory_format=torch.contiguous_format).contiguous()


class QkvMessages:
    """The qkv linear of one call, whose products write messages.

    Args:
        attn: The projections.
        ranks: Of the group that deals heads out.
        tape: Of the region under recomputation, if one is. In a later run nothing is sent, so that nothing need be projected.
    """

    def __init__(self, attn: Projections, *, ranks: int, tape: Tape | None) -> None:
        self._ranks, self._head_dim, self._tape = ranks, attn.head_dim, tape
        self._sums = _Sums()
        self._weight, self._bias = _Summed.apply(self._sums, cast(attn.qkv.weight), cast(attn.qkv.bias))  # type: ignore[no-untyped-call]

    def source(self, x_lGD: Tensor) -> Source:
        """Rows of tokens here, as ``rows_of`` gives them, to be projected message by message."""
        sums = _Sums()
        (x_lGD,) = _Summed.apply(sums, x_lGD)  # type: ignore[no-untyped-call]
        return Source(x_lGD, self, sums)


class Source:
    """Some rows, and the sum of what their messages give to their gradient. Made by ``QkvMessages``."""

    def __init__(self, x_lGD: Tensor, qkv: QkvMessages, sums: _Sums) -> None:
        self._x_lGD, self._qkv, self._sums = x_lGD, qkv, sums

    def write(self, *, parts: slice, heads: slice = ALL) -> Tensor:
        """One message for each rank.

        Args:
            parts: Which of q, k, v.
            heads: Which of each rank's.
        Returns:
            [P l, ..., m, c].
        """
        qkv = self._qkv
        message = _Message(
            ranks=qkv._ranks,
            head_dim=qkv._head_dim,
            parts=parts,
            heads=heads,
            of_x=self._sums,
            of_parameters=qkv._sums,
            tape=qkv._tape,
        )
        out: Tensor = _Write.apply(self._x_lGD, qkv._weight, qkv._bias, message)  # type: ignore[no-untyped-call]
        return out


def project_home(proj: Linear, pieces: Sequence[Tensor], *, ranks: int) -> Tensor:
    """The output projection of what each rank gives of its heads.

    Args:
        proj: May be without a bias.
        pieces: Runs of every rank's heads in their order, each [P l, ..., c].
        ranks: P.
    Returns:
        [l, ..., D].
    """
    bias = None if proj.bias is None else cast(proj.bias)
    out: Tensor = _Home.apply(ranks, cast(proj.weight), bias, *pieces)  # type: ignore[no-untyped-call]
    return out


def _is_least(*, products: int, width: int, joined: int) -> bool:
    """Whether so many products into one sum [R, width] move no more numbers than a copy of ``joined`` a row and one product."""
    return (products - 1) * width <= joined


@dataclass
class _Sums:
    """Gradients that nodes of a call add to, in place, for one that comes after all of them in backward."""

    tensors: dict[int, Tensor] = field(default_factory=dict)

    def zeros(self, index: int, like: Tensor) -> Tensor:
        """The ``index``-th, 0 at first; in the precision of sums."""
        if index not in self.tensors:
            self.tensors[index] = torch.zeros_like(like, dtype=accumulation_dtype(like.dtype))
        return self.tensors[index]

    def take(self, dtypes: Sequence[torch.dtype]) -> list[Tensor | None]:
        """All of them, once: a second backward starts anew."""
        taken, self.tensors = self.tensors, {}
        return [taken[i].to(dtype) if i in taken else None for i, dtype in enumerate(dtypes)]


class _Summed(torch.autograd.Function):
    """The tensors themselves; their gradients are the sums, when all that were made of them are through."""

    @staticmethod
    def forward(ctx: Any, sums: _Sums, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        ctx.sums, ctx.dtypes = sums, [tensor.dtype for tensor in tensors]
        same = tuple(tensor.view_as(tensor) for tensor in tensors)
        ctx.mark_non_differentiable(
            *(tensor for tensor, trained in zip(same, ctx.needs_input_grad[1:], strict=True) if not trained)
        )
        return same

    @staticmethod
    def backward(ctx: Any, *_grads: None) -> tuple[Tensor | None, ...]:
        return None, *ctx.sums.take(ctx.dtypes)


@dataclass(frozen=True, kw_only=True)
class _Message:
    """What of a qkv linear goes to each rank in one transfer. Holds no tensor of autograd's, whose graph holds this."""

    ranks: int
    head_dim: int
    parts: slice
    heads: slice
    of_x: _Sums
    of_parameters: _Sums
    tape: Tape | None

    def of(self, parameter: Tensor) -> Tensor:
        """Of the weight or the bias, [m, P, h, K, ...]; a view."""
        shape = (3, self.ranks, -1, self.head_dim, *parameter.shape[1:])
        return parameter.view(shape)[self.parts, :, self.heads]

    def write(self, x_lGD: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        """[P l, ..., m, c]."""
        rows_mPhKD, bias_mPhK = self.of(weight), self.of(bias)
        m, P, h, K = bias_mPhK.shape
        message = x_lGD.new_empty((P * len(x_lGD), *x_lGD.shape[1:-1], m, h * K))
        if self.tape is not None and self.tape.replaying:
            return message
        x_RD = x_lGD.flatten(0, -2)
        for p, out_RC in enumerate(message.view(P, len(x_RD), m * h * K)):
            # Of one of q, k, v a view; of several a copy of a P-th of their weights, so that one product has all of a message.
            torch.addmm(bias_mPhK[:, p].flatten(), x_RD, rows_mPhKD[:, p].flatten(0, 2).t(), out=out_RC)
        return message

    def add_dx(self, grad_PRmc: Tensor, x_lGD: Tensor, weight: Tensor) -> None:
        """What came back gives to dx."""
        rows_mPhKD = self.of(weight)
        P, _, m, c = grad_PRmc.shape
        if _is_least(products=P, width=x_lGD.shape[-1], joined=P * m * c):
            products = [(grad_PRmc[p].flatten(1), rows_mPhKD[:, p].flatten(0, 2)) for p in range(P)]
        else:
            products = [(grad_PRmc.permute(1, 2, 0, 3).flatten(1), rows_mPhKD.flatten(0, 3))]
        for grad_RC, rows_CD in products:
            if 0 in self.of_x.tensors:
                _add_product(self.of_x.tensors[0].view(1, -1, x_lGD.shape[-1]), grad_RC[None], rows_CD[None])
            else:
                self.of_x.tensors[0] = _product(grad_RC[None], rows_CD[None]).view(x_lGD.shape)

    def add_weight_grad(self, grad_PRmc: Tensor, x_RD: Tensor, weight: Tensor) -> None:
        """What came back gives to dW: into its slices."""
        P = len(grad_PRmc)
        x_PRD = x_RD.expand(P, *x_RD.shape)
        for i, sum_PhKD in enumerate(self.of(self.of_parameters.zeros(0, weight))):
            _add_product(sum_PhKD.view(P, -1, x_RD.shape[1]), grad_PRmc[:, :, i].mT, x_PRD)

    def add_bias_grad(self, grad_PRmc: Tensor, bias: Tensor) -> None:
        """What came back gives to the bias's gradient."""
        sum_mPhK = self.of(self.of_parameters.zeros(1, bias))
        sum_mPhK += grad_PRmc.sum(1, dtype=sum_mPhK.dtype).transpose(0, 1).view_as(sum_mPhK)


def _add_product(sum_BXY: Tensor, a_BXZ: Tensor, b_BZY: Tensor) -> None:
    """``sum += a @ b``."""
    if sum_BXY.dtype == a_BXZ.dtype:
        sum_BXY.baddbmm_(a_BXZ, b_BZY)
    else:
        sum_BXY += _product(a_BXZ, b_BZY)


def _product(a_BXZ: Tensor, b_BZY: Tensor) -> Tensor:
    """``a @ b``, not rounded to halves: a GPU adds up in float32 anyway."""
    exact = accumulation_dtype(a_BXZ.dtype)
    with torch.autocast(a_BXZ.device.type, enabled=False):
        if a_BXZ.is_cuda and exact != a_BXZ.dtype:
            return torch.bmm(a_BXZ, b_BZY, out_dtype=exact)
        return torch.bmm(a_BXZ.to(exact), b_BZY.to(exact))  # CPUs have no product of halves that gives float32


class _Write(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_lGD: Tensor, weight: Tensor, bias: Tensor, message: _Message) -> Tensor:
        ctx.message = message
        ctx.save_for_backward(x_lGD, weight, bias)
        return message.write(x_lGD, weight, bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, None, None, None]:
        (x_lGD, weight, bias), message = ctx.saved_tensors, ctx.message
        x_RD = x_lGD.flatten(0, -2)
        grad_PRmc = grad.view(message.ranks, len(x_RD), *grad.shape[-2:])
        of_x, of_weight, of_bias, _ = ctx.needs_input_grad
        if of_x:
            message.add_dx(grad_PRmc, x_lGD, weight)
        if of_weight:
            message.add_weight_grad(grad_PRmc, x_RD, weight)
        if of_bias:
            message.add_bias_grad(grad_PRmc, bias)
        return None, None, None, None


class _Home(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, ranks: int, weight: Tensor, bias: Tensor | None, *pieces: Tensor) -> Tensor:
        D, C = weight.shape
        shape = (len(pieces[0]) // ranks, *pieces[0].shape[1:-1])
        blocks_PRc = [piece.view(ranks, prod(shape), piece.shape[-1]) for piece in pieces]
        ctx.shapes, ctx.ranks = [piece.shape for piece in pieces], ranks
        ctx.joined = not _is_least(products=ranks * len(pieces), width=D, joined=C)
        if ctx.joined:
            joined_RC = torch.cat([block.transpose(0, 1) for block in blocks_PRc], dim=2).flatten(1)
            ctx.save_for_backward(weight, joined_RC)
            return F.linear(joined_RC, weight, bias).view(*shape, D)
        ctx.save_for_backward(weight, *pieces)
        y_RD: Tensor | None = None
        for block_PRc, columns_DPc in zip(blocks_PRc, _columns(weight, blocks_PRc), strict=True):
            for p, rows_Rc in enumerate(block_PRc):
                columns_Dc = columns_DPc[:, p]
                y_RD = F.linear(rows_Rc, columns_Dc, bias) if y_RD is None else y_RD.addmm_(rows_Rc, columns_Dc.t())
        assert y_RD is not None
        return y_RD.view(*shape, D)

    @staticmethod
    def backward(ctx: Any, grad_lGD: Tensor) -> tuple[Tensor | None, ...]:
        weight, *saved = ctx.saved_tensors
        _, of_weight, of_bias, *of_pieces = ctx.needs_input_grad
        grad_RD = grad_lGD.flatten(0, -2)
        messages = [grad_RD.new_empty((ctx.ranks, len(grad_RD), shape[-1])) for shape in ctx.shapes]
        if any(of_pieces):
            for message_PRc, columns_DPc in zip(messages, _columns(weight, messages), strict=True):
                for p, out_Rc in enumerate(message_PRc):
                    torch.mm(grad_RD, columns_DPc[:, p], out=out_Rc)
        grad_weight = None
        if of_weight and ctx.joined:
            grad_weight = grad_RD.t() @ saved[0]
        elif of_weight:
            grad_weight = torch.empty_like(weight)
            blocks_PRc = [piece.view(message.shape) for piece, message in zip(saved, messages, strict=True)]
            for block_PRc, columns_DPc in zip(blocks_PRc, _columns(grad_weight, blocks_PRc), strict=True):
                for p, rows_Rc in enumerate(block_PRc):
                    torch.mm(grad_RD.t(), rows_Rc, out=columns_DPc[:, p])
        grads = [message.view(shape) for message, shape in zip(messages, ctx.shapes, strict=True)]
        return None, grad_weight, grad_RD.sum(0) if of_bias else None, *grads


def _columns(weight_DC: Tensor, blocks_PRc: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Of an output projection's weight, [D, P, c] of each piece of every rank's heads; views."""
    return torch.split(weight_DC.view(len(weight_DC), len(blocks_PRc[0]), -1), [block.shape[-1] for block in blocks_PRc], dim=2)
