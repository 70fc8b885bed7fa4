"""What is compiled between communications, and under FSDP2, gives the gradients of one uncompiled process."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.distributed as dist
from sequence_cases import Shape, compute, difference, make_inputs, make_model
from sequence_pair import Pair, errors, whole

from opensora_dist.config.train import OptimConfig, ParallelConfig, SpConfig, ZeroConfig
from opensora_dist.core.types import Thw
from opensora_dist.models.tensor import share_blocks
from opensora_dist.ops.choice import Choice, using
from opensora_dist.ops.compiled import Compilations, using_backend
from opensora_dist.parallel.mesh import build_mesh
from opensora_dist.parallel.tensor.linear import copy_whole, packed_parts
from opensora_dist.parallel.zero.native import NativeBackend

CPU = torch.device("cpu")
TOLERANCE = 1e-10
pytestmark = pytest.mark.slow  # a compiler's time on each rank, in every test
COMPILED = Choice(compile="blocks", dynamic_shapes=True)
SHAPE = Shape(Thw(5, 4, 3), batch=2)


def _counted(function, *args):
    """What it gives while blocks are compiled, and how many graphs that took."""
    torch._dynamo.reset()
    compilations = Compilations()
    compilations.start()
    try:
        with using(COMPILED), using_backend("aot_eager"):
            return function(*args), compilations.sofar.graphs
    finally:
        compilations.stop()


def _sequence(pairs):
    for pair in pairs:
        whole(pair.model, pair.shape)  # kept: the one process is not compiled
    return _counted(errors, pairs)


@pytest.mark.parametrize(
    "scheme, recompute",
    [("dsp", "selective"), ("dsp", "none"), ("ulysses", "full")],
)
def test_where_two_ranks_share_a_sample_the_work_between_messages_is_compiled(ranks, scheme, recompute):
    pairs = [Pair(scheme, "stdit", Thw(5, 4, 3), recompute=recompute, chunks=2 if scheme == "dsp" else 1)]
    for found, graphs in ranks.run(_sequence, pairs, world=2):
        assert max(found.values()) <= TOLERANCE, found
        assert graphs >= 4, "norms, gates, GELU and the final layer"


def _fsdp(stage, recompute):
    """The largest difference of a gradient, summed over two ranks with the same samples, from twice that of one process."""
    mesh = build_mesh(CPU, dp_replicate=1, sp=SpConfig(), timeout_s=60)
    whole = make_model("stdit", SHAPE, depth=3)
    inputs = make_inputs(SHAPE, group=0)
    wanted = compute(whole, inputs, shard=None)
    state = whole.state_dict()
    model = copy.deepcopy(whole).to("meta")
    for block in model.blocks:
        block.recompute = recompute

    @torch.no_grad()
    def init(module):
        for name, tensor in module.state_dict(keep_vars=True).items():
            copy_whole(tensor.detach(), state[name], parts=1)

    backend = NativeBackend(
        model,
        mesh=mesh,
        units=list(model.blocks),
        init=init,
        parallel=ParallelConfig(recompute=recompute, zero=ZeroConfig(stage=stage)),
        optim=OptimConfig(),
        compute_dtype=torch.float64,
    )

    def step():
        with backend.forward_context(last_micro=True):
            out = backend.model(
                inputs.x_BCTHW, inputs.timestep_B, inputs.text_BYE, inputs.text_mask_BY, drop_caption_B=inputs.drop_caption_B
            )
            backend.backward((out * inputs.weight_BCTHW).sum())

    _, graphs = _counted(step)
    found = {n: p.grad.full_tensor() if stage else p.grad for n, p in model.named_parameters()}
    return max(difference(found[n], 2 * grad, scale=2 * grad) for n, grad in wanted.grads.items()), graphs


@pytest.mark.parametrize(
    "stage, recompute",
    [(3, "none"), (0, "none"), (3, "full"), (3, "selective")],
)
def test_blocks_whose_weights_are_gathered_share_a_graph(ranks, stage, recompute):
    for error, graphs in ranks.run(_fsdp, stage, recompute, world=2):
        assert error <= TOLERANCE
        assert graphs == 4, "the first block, which adds positions, all others, the final layer, the caption's MLP"


def _tensor(name, recompute):
    mesh = build_mesh(CPU, dp_replicate=1, sp=SpConfig(), tp=dist.get_world_size(), timeout_s=60)
    whole = make_model(name, SHAPE, depth=2)
    inputs = make_inputs(SHAPE, group=0)
    wanted = compute(whole, inputs, shard=None)
    shared = copy.deepcopy(whole).to("meta")
    share_blocks(shared, mesh)
    shared.to_empty(device="cpu")
    packed = packed_parts(shared)
    for key, tensor in shared.state_dict().items():
        copy_whole(tensor.detach(), whole.state_dict()[key], parts=packed.get(key, 1))
    for block in shared.blocks:
        block.recompute = recompute
    found, graphs = _counted(lambda: compute(shared, inputs, shard=None))
    return max(
        difference(found.output, wanted.output, scale=wanted.output), difference(found.dx, wanted.dx, scale=wanted.dx)
    ), graphs


@pytest.mark.parametrize("recompute", ["none", "selective"])
def test_where_two_ranks_share_linears_the_work_between_sums_is_compiled(ranks, recompute):
    for error, graphs in ranks.run(_tensor, "stdit", recompute, world=2):
        assert error <= TOLERANCE and graphs >= 4
