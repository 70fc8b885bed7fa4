"""Attention kernels where ranks share a sample: the model of one process by torch's operators, and no attention is computed twice."""

from __future__ import annotations

import os
from dataclasses import fields

import pytest
import torch
from kernel_checks import draws
from sequence_cases import compute, cut, make_inputs, make_model, summed
from sequence_pair import Pair, make_mesh
from torch import Tensor

pytest.importorskip("triton", reason="Triton runs on Linux only; pip install 'opensora-dist[kernels]'")

from opensora_dist.core.types import Thw
from opensora_dist.ops.choice import Choice, using
from opensora_dist.ops.frames import frames_attention
from opensora_dist.ops.samples import captions, cross_attention
from opensora_dist.parallel.recompute import recompute

GRID = Thw(3, 1, 2)
TRITON = Choice(kernels="triton")


def errors(pair: Pair) -> dict[str, tuple[float, float]]:
    """Of this rank's output and input gradient, and of all parameters' summed gradients: ours, and those of one process by torch.

    Both in float32, from float64, over the largest value of each.
    """
    assert os.environ["TRITON_INTERPRET"] == "1"
    inputs = make_inputs(pair.shape, group=0, dtype=torch.float32)
    doubled = {f.name: getattr(inputs, f.name) for f in fields(inputs)}
    doubled = {name: t.double() if t.is_floating_point() else t for name, t in doubled.items()}
    model, shard = make_model(pair.model, pair.shape, depth=1), pair.shard(make_mesh())
    exact = compute(model, type(inputs)(**doubled), shard=None)
    alone = compute(model.float(), inputs, shard=None)
    for block in model.blocks:
        block.recompute = pair.recompute
    with using(TRITON):
        found = compute(model, inputs, shard=shard)
    part = shard.region.times(Thw(1, 2, 2))  # the model's patch
    grads = summed(found.grads)
    of_all = {"output": (found.output, *(cut(one.output, part) for one in (alone, exact)))}
    of_all["dx"] = (found.dx, *(cut(one.dx, part) for one in (alone, exact)))
    of_all |= {name: (grads[name], alone.grads[name], exact.grads[name]) for name in grads}
    return {name: (_error(ours, right), _error(theirs, right)) for name, (ours, theirs, right) in of_all.items()}


def _error(found: Tensor, right: Tensor) -> float:
    return float((found - right).abs().max() / right.abs().max())


@pytest.mark.slow
@pytest.mark.parametrize("scheme, how", [("dsp", "none"), ("dsp", "selective"), ("ulysses", "selective")])
def test_ranks_that_share_a_sample_compute_the_model_of_one_process(ranks, scheme, how):
    for answer in ranks.run(errors, Pair(scheme, "stdit", GRID, recompute=how, heads=2, width=16), world=2):
        far = {name: both for name, both in answer.items() if both[0] > 1e-6 + 4 * both[1]}
        assert not far, far


class Counted:
    """A kernel that notes that it was launched."""

    def __init__(self, kernel, name: str, calls: list[str]) -> None:
        self._kernel, self._name, self._calls = kernel, name, calls

    def __getitem__(self, grid):
        self._calls.append(self._name)
        return self._kernel[grid]


def test_no_attention_runs_again_in_backward_under_selective_recomputation(monkeypatch):
    from opensora_kernels import short_attention, varlen_attention

    calls: list[str] = []
    for module in (short_attention, varlen_attention):
        name = module.__name__.rpartition(".")[2]
        monkeypatch.setattr(module, f"_{name}_forward", Counted(getattr(module, f"_{name}_forward"), name, calls))
    inputs = [t.requires_grad_() for t in draws(torch.float32, (1, 3, 2, 16), (48, 16), (1, 4, 2, 1, 16))]

    def region(x, weight, kv):
        attended = frames_attention((x @ weight.T).unflatten(-1, (3, 1, 16)))
        of = captions(None, samples=1, keys=4, device=kv.device)
        return cross_attention(attended.flatten(0, 2).unflatten(-1, (1, 16)), kv, of, runs=[(1, 6)]).square()

    found = {}
    with using(TRITON):
        for how in ("none", "selective", "full"):
            x, weight, kv = inputs
            calls.clear()
            if how == "none":
                out = region(x, weight, kv)
            else:
                out = recompute(lambda x, _tape: region(x, weight, kv), x, how=how)
            found[how] = torch.autograd.grad(out.sum(), inputs)
            twice = how == "full"
            assert sorted(calls) == sorted(["short_attention", "varlen_attention"] * (1 + twice)), how
    for how in ("selective", "full"):
        for one, other in zip(found[how], found["none"], strict=True):
            assert torch.equal(one, other)
