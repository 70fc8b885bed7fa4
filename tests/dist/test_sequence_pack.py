"""A pack whose samples are spread over ranks is its samples, under every scheme; dsp sends the tokens of all of them at once."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from sequence_cases import TOLERANCE, difference, gradient_errors, summed, worst

from opensora_dist.config.train import ModelConfig, ParallelConfig, SpConfig
from opensora_dist.core.types import Axis, Thw
from opensora_dist.models.base import ModelIo
from opensora_dist.models.levers import set_levers
from opensora_dist.models.registry import build_model
from opensora_dist.models.tensor import share_blocks
from opensora_dist.parallel.keys import Keys
from opensora_dist.parallel.mesh import build_mesh, sp_ulysses
from opensora_dist.parallel.sequence.dsp_parts import bytes_of_parts
from opensora_dist.parallel.sequence.layout import SequenceParallel
from opensora_dist.parallel.sequence.registry import SCHEMES
from opensora_dist.parallel.sequence.traffic import SentBytes
from opensora_dist.parallel.tensor.linear import copy_whole, packed_parts

IO = ModelIo(in_channels=2, out_channels=2, text_width=6, max_tokens=5)
# Latents by shape, and samples of each: uneven frames; one frame, cut into rows; two samples; frames fewer than three ranks.
PACK = {Thw(5, 4, 6): 1, Thw(1, 10, 4): 2, Thw(4, 6, 4): 2, Thw(2, 6, 2): 1}
WIDTH, HEADS = 24, 12


@dataclass(frozen=True)
class Case:
    scheme: str
    model: str
    size: int
    tp: int = 1
    recompute: str = "none"

    def __str__(self):
        again = "" if self.recompute == "none" else f"-{self.recompute}"
        return f"{self.scheme}-{self.model}-sp{self.size}" + (f"-tp{self.tp}" if self.tp > 1 else "") + again

    @property
    def parallel(self):
        return ParallelConfig(sp=SpConfig(degree=self.size, scheme=self.scheme), tp=self.tp, recompute=self.recompute)


def _model(name):
    config = ModelConfig(name=name, depth=2, width=WIDTH, heads=HEADS, patch=(1, 2, 2), mlp_ratio=2, pooled_text=True)
    return build_model(config, IO)


def _randomise(model):
    with torch.no_grad():
        for key, tensor in model.state_dict().items():
            tensor.normal_(std=0.1, generator=Keys(1).generator(key))


def _inputs(dtype):
    def normal(what, *size):
        return torch.empty(size, dtype=torch.float64).normal_(generator=Keys(2).generator(what)).to(dtype)

    B = sum(PACK.values())
    xs = [normal(f"x {latent}", count, 2, *latent) for latent, count in PACK.items()]
    weights = [normal(f"weight {x.shape}", *x.shape) / x[0].numel() for x in xs]
    mask = torch.arange(5) < torch.tensor([3, 5, 1, 4, 2, 5])[:, None]
    return xs, weights, torch.linspace(0, 999, B).to(dtype), normal("text", B, 5, 6), mask, torch.arange(B) % 3 == 0


def _alone(model):
    """Each sample by itself, in one process: outputs, gradients of the latents, and of the parameters."""
    xs, weights, timestep, text, mask, drop = _inputs(torch.float64)
    model.zero_grad()
    outputs, grads, first = [], [], 0
    for x, weight in zip(xs, weights, strict=True):
        x = x.clone().requires_grad_()
        of = []
        for b in range(len(x)):
            at = slice(first + b, first + b + 1)
            of.append(model(x[b : b + 1], timestep[at], text[at], mask[at], drop_caption_B=drop[at]))
        out = torch.cat(of)
        (out * weight).sum().backward()
        outputs.append(out.detach())
        grads.append(x.grad)
        first += len(x)
    return outputs, grads, {n: p.grad.clone() for n, p in model.named_parameters()}


def _packed(model, sequences, dtype=torch.float64, between=lambda: None):
    xs, weights, *rest, mask, drop = _inputs(dtype)
    shards = [sequences.shard(model.token_grid(latent)) for latent in PACK]
    parts = [shard.region.times(model.patch) for shard in shards]
    cut = [x[:, :, part.t0 : part.t1, part.h0 : part.h1].clone().requires_grad_() for x, part in zip(xs, parts, strict=True)]
    model.zero_grad()
    outputs = model(cut, *rest, mask, drop_caption_B=drop, shard=shards)
    weights = [w[:, :, part.t0 : part.t1, part.h0 : part.h1] for w, part in zip(weights, parts, strict=True)]
    loss = sum((out * w).sum() for out, w in zip(outputs, weights, strict=True))
    between()
    loss.backward()
    grads = {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in model.named_parameters()}
    return [out.detach() for out in outputs], [x.grad for x in cut], grads, shards, parts


def compare(chosen):
    found, meshes, alone = [], {}, {}
    for case in chosen:
        sp = case.parallel.sp
        key = (sp.degree, sp_ulysses(sp), case.tp)
        if key not in meshes:
            meshes[key] = build_mesh(torch.device("cpu"), dp_replicate=1, sp=sp, tp=case.tp, timeout_s=60)
        if case.model not in alone:
            model = _model(case.model).double()
            _randomise(model)
            alone[case.model] = (model, *_alone(model))
        model, outputs, dx, grads = alone[case.model]
        if case.tp > 1:  # gradients of parts of parameters are compared in test_packed
            model = _with_tp(case.model, meshes[key])
        set_levers(model, case.parallel, device=torch.device("cpu"))
        got_outputs, got_dx, got_grads, _, parts = _packed(model, SequenceParallel(meshes[key], sp))
        wrong = []
        for wanted, got in ((outputs, got_outputs), (dx, got_dx)):
            for whole, here, part in zip(wanted, got, parts, strict=True):
                wrong.append(difference(here, whole[:, :, part.t0 : part.t1, part.h0 : part.h1], scale=whole))
        if case.tp == 1:
            wrong += gradient_errors(summed(got_grads), grads).values()
        found.append(worst(wrong))
    return found


def _with_tp(name, mesh):
    with torch.device("meta"):
        model = _model(name).double()
    share_blocks(model, mesh)
    model.to_empty(device="cpu")
    packed = packed_parts(model)
    with torch.no_grad():
        for key, tensor in model.state_dict().items():
            full = torch.empty(tensor.shape, dtype=torch.float64).normal_(std=0.1, generator=Keys(1).generator(key))
            copy_whole(tensor, full, parts=packed.get(key, 1))
    return model


CASES = [
    Case(scheme, model, size, recompute=recompute)
    for scheme, model, size, recompute in itertools.product(SCHEMES, ("stdit", "dit"), (2, 3, 4), ("none", "selective", "full"))
    if not (scheme == "dsp" and model == "dit")
]
TP = [Case("dsp", "stdit", 2, tp=2, recompute="selective"), Case("ulysses", "dit", 2, tp=2)]
_QUICK = [case for case in CASES if case.size == 2 and (case.recompute == "selective" or (case.scheme == "dsp"))]


@pytest.mark.parametrize("world, chosen", [(2, _QUICK), (4, TP), (3, [Case("dsp", "stdit", 3, recompute="selective")])])
def test_a_pack_spread_over_ranks_gives_what_each_sample_gives_alone(ranks, world, chosen):
    for errors in ranks.run(compare, chosen, world=world):
        assert all(error <= TOLERANCE for error in errors), dict(zip(map(str, chosen), errors, strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("world", (2, 3, 4))
@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_pack_gives_what_its_samples_give_in_the_full_grid(ranks, scheme, world):
    chosen = [case for case in CASES if (case.size, case.scheme) == (world, scheme)]
    for errors in ranks.run(compare, chosen, world=world):
        assert all(error <= TOLERANCE for error in errors), dict(zip(map(str, chosen), errors, strict=True))


# --- what is sent


def count(size, recompute, overlap, autocast):
    """Calls and bytes of all-to-alls of two blocks on this rank, forward and backward, and the sum of the parts' formula."""
    sp = SpConfig(degree=size, scheme="dsp", overlap=overlap)
    mesh = build_mesh(torch.device("cpu"), dp_replicate=1, sp=sp, timeout_s=60)
    dtype = torch.float32 if autocast else torch.float64
    model = _model("stdit").to(dtype)
    _randomise(model)
    set_levers(model, ParallelConfig(sp=sp, recompute=recompute), device=torch.device("cpu"))
    calls, marks, real = [], [], dist.all_to_all_single
    with mock.patch.object(dist, "all_to_all_single", lambda *a, **k: (calls.append(1), real(*a, **k))[1]), SentBytes() as sent:
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            between = lambda: marks.append((len(calls), sent.total))  # noqa: E731
            *_, shards, _ = _packed(model, SequenceParallel(mesh, sp), dtype, between)
    formula = [0, 0]
    for axis in (Axis.SPACE, Axis.TIME):
        crossing = [(shard, batch) for shard, batch in zip(shards, PACK.values(), strict=True) if shard.crosses(axis)]
        whose, batches = zip(*crossing, strict=True)
        traffic = bytes_of_parts(whose, axis, batches=batches, width=WIDTH, element_bytes=2 if autocast else 8)
        formula = [formula[0] + 2 * traffic.forward, formula[1] + 2 * traffic.backward]
    assert sent.by_collective.keys() == {"alltoall_base_"}
    return marks[0], (len(calls) - marks[0][0], sent.total - marks[0][1]), tuple(formula)


@pytest.mark.parametrize("size", (2, 3))
@pytest.mark.parametrize("autocast", (False, True), ids=("float64", "bfloat16"))
def test_dsp_sends_the_tokens_of_all_parts_of_a_pack_in_one_all_to_all_each_way(ranks, size, autocast):
    """Two blocks; in each one attention crosses ranks for clips, and the other one for those that are cut into rows."""
    for recompute, overlap in (("none", True), ("selective", True), ("full", False)):
        for forward, backward, formula in ranks.run(count, size, recompute, overlap, autocast, world=size):
            assert (forward[0], backward[0]) == (2 * 2 * 2, 2 * 2 * 2), "blocks x attentions x there and back"
            assert (forward[1], backward[1]) == formula


def owners(size, pictures):
    """Bytes that this rank sends for pictures alone."""
    mesh = build_mesh(torch.device("cpu"), dp_replicate=1, sp=SpConfig(degree=size), timeout_s=60)
    shard = SequenceParallel(mesh, SpConfig(degree=size)).shard(Thw(1, 2 * size, 3))
    return bytes_of_parts([shard] * len(pictures), Axis.SPACE, batches=pictures, width=1, element_bytes=1).forward


def test_sequences_of_the_pictures_of_a_pack_are_dealt_out_over_its_ranks(ranks):
    """A picture is one sequence, with one owner; six of them, of whatever shapes, are two for each of three ranks."""
    for pictures in ([6], [1, 1, 1, 1, 1, 1], [2, 1, 3]):
        # Of each picture its owner sends outputs for two thirds of its 18 tokens, and the others their third of the input.
        assert ranks.run(owners, 3, pictures, world=3) == [2 * 12 + 4 * 6] * 3


# --- bfloat16


def rounding(schemes, size):
    """Of each: the largest difference of outputs from float64's, over the largest output; and of all gradients, by their norm."""
    exact, found = {}, []
    for scheme in schemes:
        sp = SpConfig(degree=size, scheme=scheme)
        mesh = build_mesh(torch.device("cpu"), dp_replicate=1, sp=sp, timeout_s=60)
        name = "stdit" if scheme == "dsp" else "dit"
        if name not in exact:
            model = _model(name).double()
            _randomise(model)
            exact[name] = (model.state_dict(), *_alone(model))
        state, outputs, _, grads = exact[name]
        model = _model(name)
        model.load_state_dict(state)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            got, dx, got_grads, _, parts = _packed(model, SequenceParallel(mesh, sp), torch.float32)
        assert all(out.dtype == torch.float32 for out in (*got, *dx))
        of_outputs = worst(
            difference(here.double(), whole[:, :, part.t0 : part.t1, part.h0 : part.h1], scale=whole)
            for whole, here, part in zip(outputs, got, parts, strict=True)
        )
        total = summed({n: g.double() for n, g in got_grads.items()})
        wrong, norm = (
            torch.cat([g.flatten() for g in of]).norm() for of in ([total[n] - g for n, g in grads.items()], grads.values())
        )
        found.append((of_outputs, (wrong / norm).item()))
    return found


def test_a_pack_under_bfloat16_autocast_is_off_by_rounding_alone(ranks):
    for of_rank in ranks.run(rounding, list(SCHEMES), 2, world=2):
        assert all(outputs < 0.02 and grads < 0.02 for outputs, grads in of_rank), dict(zip(SCHEMES, of_rank, strict=True))
