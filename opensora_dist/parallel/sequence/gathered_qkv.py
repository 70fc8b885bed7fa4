"""q, k and v of this rank's heads for the tokens of all ranks, which come round a ring, as autograd nodes.

Autograd runs nodes in the reverse order of their making, and each does in backward the transpose of what it did in forward. So whatever
a scheme runs between them to hide the ring in forward hides it in backward, too:

    method           in forward                                 in backward
    issue            sends the first hop of x                   waits for the last hop of dx, adds what own tokens gave here
    project_own      projects own tokens                        own tokens' dx, their part of dW
    project_arrived  waits, sends on, projects what came        adds dx of what came to the sum passing by, sends it; its part of dW
    regather         nothing                                    sends the first hop of x again, for dW

dx is summed in the dtype of the products, as that is what travels: in bfloat16 it is rounded once a hop; the last sum is in the dtype
of the residual stream. dW is summed in float32 or wider.
"""

# P ranks, D width, n heads of a rank, K head dim, E = 3 n K; G sequences, L their tokens, l those of one rank

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from opensora_dist.ops.precision import accumulation_dtype
from opensora_dist.parallel.recompute import Tape
from opensora_dist.parallel.sequence.base import Projections, ranges
from opensora_dist.parallel.sequence.exchange import Exchange
from opensora_dist.parallel.sequence.heads import rows_of_heads
from opensora_dist.parallel.sequence.hops import RingGather, RingReduce


class HeadSlice:
    """This rank's heads of one qkv linear in one call: their rows of the weight, and the sums of their gradients.

    Products are added to the sums in place and reach autograd once, so it never adds two gradients of a weight's size. Rows are cut
    anew in backward: saved ones would be a copy that outlives the whole weight, which FSDP takes away in between.

    Args:
        attn: The projections.
        rank: Which of the ``size`` runs of heads.
        dtype: What is computed in, and travels.
    """

    def __init__(self, attn: Projections, *, rank: int, size: int, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self.num = attn.heads // size
        self.trained = attn.qkv.weight.requires_grad
        self._rank, self._size = rank, size
        self._rows_ED: Tensor | None = None
        self._weight_grad_ED: Tensor | None = None
        self._bias_grad_E: Tensor | None = None

    def parameters(self, attn: Projections) -> tuple[Tensor, Tensor]:
        """Weight and bias as the nodes of this call take them; once per call."""
        out: tuple[Tensor, Tensor] = _Parameters.apply(attn.qkv.weight, attn.qkv.bias, self)  # type: ignore[no-untyped-call]
        return out

    def rows(self, parameter: Tensor) -> Tensor:
        """Of the weight or the bias, [3 N K, ...] to [E, ...]."""
        return rows_of_heads(parameter, rank=self._rank, size=self._size).to(self.dtype)

    def weight_rows(self, weight: Tensor) -> Tensor:
        """``rows`` of the weight, held until ``drop_rows`` or the end of backward."""
        if self._rows_ED is None:
            self._rows_ED = self.rows(weight)
        return self._rows_ED

    def drop_rows(self) -> None:
        """At the end of forward."""
        self._rows_ED = None

    def add_weight_grad(self, grad_lGE: Tensor, x_lGD: Tensor) -> None:
        """What these tokens give to the weight's gradient."""
        grad_ER, x_RD = grad_lGE.flatten(0, 1).t(), x_lGD.flatten(0, 1)
        if self._weight_grad_ED is None:
            self._weight_grad_ED = (grad_ER @ x_RD).to(accumulation_dtype(x_RD.dtype))
        elif self._weight_grad_ED.dtype == x_RD.dtype:
            self._weight_grad_ED.addmm_(grad_ER, x_RD)
        else:
            self._weight_grad_ED.add_(grad_ER @ x_RD)

    def add_bias_grad(self, grad_LGE: Tensor) -> None:
        """What these tokens give to the bias's gradient."""
        grad_E = grad_LGE.sum((0, 1), dtype=accumulation_dtype(grad_LGE.dtype))
        self._bias_grad_E = grad_E if self._bias_grad_E is None else self._bias_grad_E.add_(grad_E)

    def take_gradients(self, *, weight_dtype: torch.dtype, bias_dtype: torch.dtype) -> tuple[Tensor | None, Tensor | None]:
        """Of the whole weight and bias. Zero for the heads of other ranks, which those have summed."""
        grads = self._whole(self._weight_grad_ED, dtype=weight_dtype), self._whole(self._bias_grad_E, dtype=bias_dtype)
        self._rows_ED = self._weight_grad_ED = self._bias_grad_E = None
        return grads

    def _whole(self, rows: Tensor | None, *, dtype: torch.dtype) -> Tensor | None:
        if rows is None:
            return None
        whole = rows.new_zeros((3, self._size, len(rows) // 3, *rows.shape[1:]), dtype=dtype)
        whole[:, self._rank] = rows.view(3, -1, *rows.shape[1:])
        return whole.flatten(0, 2)


class GatheredQkv:
    """One gather of x of one forward, and its backward. ``issue``, ``project_own`` and P - 1 times ``project_arrived``, once each.

    Holds none of autograd's own tensors, whose graph holds this.

    Args:
        exchange: The ring.
        heads: Of this rank; shared by all gathers of a call.
        lengths: Tokens of each sequence on each rank.
        overlap: False waits as soon as a hop is started: the blocking form, with the same bytes.
        keep: Keeps what is gathered for the weight's gradient; else it is gathered again, in ``regather``'s backward.
        sum_dx: Whether x needs a gradient.
        tape: Of the region under recomputation, if one is.
    """

    def __init__(
        self,
        exchange: Exchange,
        heads: HeadSlice,
        *,
        lengths: tuple[int, ...],
        overlap: bool,
        keep: bool,
        sum_dx: bool,
        tape: Tape | None,
    ) -> None:
        self._rank, self._heads, self._keep, self._tape = exchange.rank, heads, keep and heads.trained, tape
        self._parts = ranges(lengths)
        self._num_arrived = 0
        self._there = RingGather(exchange, lengths=lengths, by=1, overlap=overlap, keep=self._keep)
        # The other way round: backward works on parts in the reverse order of forward.
        self._again = None if keep or not heads.trained else RingGather(exchange, lengths=lengths, by=-1, overlap=overlap)
        self._dx = RingReduce(exchange, lengths=lengths, by=-1, overlap=overlap) if sum_dx else None

    def issue(self, x: Tensor) -> Tensor:
        """[l, ..., D], of any dtype and strides, to [l, G, D] as it is projected and sent; the first hop starts."""
        out: Tensor = _Issue.apply(x, self)  # type: ignore[no-untyped-call]
        return out

    def project_own(self, x_lGD: Tensor, *, weight: Tensor, bias: Tensor) -> Tensor:
        """q, k and v of own tokens, in the tensor that those of all tokens will be in: [L, G, E]."""
        out: Tensor = _ProjectOwn.apply(x_lGD, weight, bias, self)  # type: ignore[no-untyped-call]
        return out

    def project_arrived(self, qkv_LGE: Tensor, *, weight: Tensor, bias: Tensor) -> Tensor:
        """Fills in q, k and v of the tokens of one more rank."""
        out: Tensor = _ProjectArrived.apply(qkv_LGE, weight, bias, self)  # type: ignore[no-untyped-call]
        return out

    def regather(self, out: Tensor, *, x_lGD: Tensor) -> Tensor:
        """``out``, the last thing that a scheme has made of these sequences: when backward comes there, x is sent again.

        Args:
            out: Anything.
            x_lGD: What ``issue`` gave.
        """
        if self._again is None:
            return out
        same: Tensor = _Regather.apply(out, x_lGD.detach(), self)  # type: ignore[no-untyped-call]
        return same

    def _send(self, x_lGD: Tensor) -> None:
        if self._tape is None or not self._tape.replaying:
            self._there.start(x_lGD)

    def _begin(self, x_lGD: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        if self._tape is not None and self._tape.replaying:
            replayed: Tensor = self._tape.replay()
            return replayed
        rows_ED = self._heads.weight_rows(weight)
        qkv_LGE = x_lGD.new_empty((self._parts[-1].stop, x_lGD.shape[1], len(rows_ED)))
        self._project(x_lGD, qkv_LGE, self._rank, weight, bias)
        if self._tape is not None:
            self._tape.keep(qkv_LGE)  # what is yet to come will be filled in there, too
        return qkv_LGE

    def _continue(self, qkv_LGE: Tensor, weight: Tensor, bias: Tensor) -> tuple[int, Tensor | None]:
        """The rank whose part has come, and its x where that is kept."""
        self._num_arrived += 1
        source = (self._rank - self._num_arrived) % len(self._parts)
        if self._tape is not None and self._tape.replaying:
            return source, self._tape.replay() if self._keep else None
        x_lGD = self._there.next()
        self._project(x_lGD, qkv_LGE, source, weight, bias)
        if not self._keep:
            return source, None
        return source, x_lGD if self._tape is None else self._tape.keep(x_lGD)

    def _project(self, x_lGD: Tensor, qkv_LGE: Tensor, source: int, weight: Tensor, bias: Tensor) -> None:
        rows_ED, x_RD = self._heads.weight_rows(weight), x_lGD.flatten(0, 1)
        torch.addmm(self._heads.rows(bias), x_RD, rows_ED.t(), out=self._part(qkv_LGE, source).view(len(x_RD), -1))

    def _part(self, tensor_LGE: Tensor, source: int) -> Tensor:
        return tensor_LGE[self._parts[source].start : self._parts[source].stop]

    def _send_again(self, x_lGD: Tensor) -> None:
        assert self._again is not None
        self._again.start(x_lGD)

    def _arrived_back(self, grad_LGE: Tensor, weight: Tensor, source: int, kept_x_lGD: Tensor | None) -> None:
        grad_lGE = self._part(grad_LGE, source)
        if self._dx is not None:
            product_lGD = grad_lGE @ self._heads.weight_rows(weight)  # before the wait, which this hides
            sum_lGD = self._dx.arrived()
            self._dx.send(product_lGD if sum_lGD is None else sum_lGD.add_(product_lGD))
        # After the sum is on its way, which this hides.
        x_lGD = kept_x_lGD if self._again is None else self._again.next()
        if x_lGD is not None:
            self._heads.add_weight_grad(grad_lGE, x_lGD)

    def _own_back(self, grad_LGE: Tensor, x_lGD: Tensor, weight: Tensor) -> Tensor | None:
        grad_lGE = self._part(grad_LGE, self._rank)
        if self._heads.trained:
            self._heads.add_weight_grad(grad_lGE, x_lGD)
        self._heads.add_bias_grad(grad_LGE)
        return None if self._dx is None else grad_lGE @ self._heads.weight_rows(weight)

    def _finish_back(self) -> Tensor:
        assert self._dx is not None
        return self._dx.finish()


class _Parameters(torch.autograd.Function):
    """The last of a call in backward, as all its projections come before."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, bias: Tensor, heads: HeadSlice) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        ctx.heads, ctx.dtypes = heads, {"weight_dtype": weight.dtype, "bias_dtype": bias.dtype}
        return weight.view_as(weight), bias.view_as(bias)

    @staticmethod
    def backward(ctx: Any, *_grads: None) -> tuple[Tensor | None, Tensor | None, None]:
        return *ctx.heads.take_gradients(**ctx.dtypes), None


class _Issue(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, gathered: GatheredQkv) -> Tensor:
        ctx.gathered, ctx.shape, ctx.dtype = gathered, x.shape, x.dtype
        # One pass where x is both cast and put in order.
        x = x.to(gathered._heads.dtype, memory_format=torch.contiguous_format)
        x_lGD = x.contiguous().view(len(x), -1, x.shape[-1])
        gathered._send(x_lGD)
        return x_lGD

    @staticmethod
    def backward(ctx: Any, own_lGD: Tensor) -> tuple[Tensor, None]:
        return ctx.gathered._finish_back().to(ctx.dtype).add_(own_lGD).view(ctx.shape), None


class _ProjectOwn(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_lGD: Tensor, weight: Tensor, bias: Tensor, gathered: GatheredQkv) -> Tensor:
        ctx.gathered = gathered
        ctx.save_for_backward(x_lGD, weight)
        return gathered._begin(x_lGD, weight, bias)

    @staticmethod
    def backward(ctx: Any, grad_LGE: Tensor) -> tuple[Tensor | None, None, None, None]:
        return ctx.gathered._own_back(grad_LGE, *ctx.saved_tensors), None, None, None


class _ProjectArrived(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, qkv_LGE: Tensor, weight: Tensor, bias: Tensor, gathered: GatheredQkv) -> Tensor:
        ctx.gathered = gathered
        ctx.source, kept_x_lGD = gathered._continue(qkv_LGE, weight, bias)
        ctx.save_for_backward(weight, kept_x_lGD)
        return qkv_LGE.view_as(qkv_LGE)

    @staticmethod
    def backward(ctx: Any, grad_LGE: Tensor) -> tuple[Tensor, None, None, None]:
        weight, kept_x_lGD = ctx.saved_tensors
        grad_LGE = grad_LGE.contiguous()
        ctx.gathered._arrived_back(grad_LGE, weight, ctx.source, kept_x_lGD)
        return grad_LGE, None, None, None


class _Regather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, out: Tensor, x_lGD: Tensor, gathered: GatheredQkv) -> Tensor:
        ctx.gathered = gathered
        ctx.save_for_backward(x_lGD)
        return out.view_as(out)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        ctx.gathered._send_again(*ctx.saved_tensors)
        return grad, None, None
