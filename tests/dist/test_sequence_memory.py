"""What a graph holds between forward and backward under recomputation, and that it can be gone through twice."""

from __future__ import annotations

import gc
import itertools
import time
from unittest import mock

import pytest
import torch
from sequence_cases import cut, make_inputs
from sequence_pair import TOLERANCE, Pair, make_mesh

from opensora_dist.core.types import Thw
from opensora_dist.parallel.recompute import Tape
from opensora_dist.parallel.sequence.registry import SCHEMES

GRIDS = (Thw(5, 4, 3), Thw(1, 5, 4))  # uneven frames; one frame, so by rows
SLACK_BYTES = 64
"""Less than one token of the residual stream takes."""


def _pairs(scheme, *, overlap=(True, False), **options):
    models = ("stdit",) if scheme == "dsp" else ("stdit", "dit")
    return [
        Pair(scheme, model, grid, overlap=hides, chunks=2, **options)
        for model, grid, hides in itertools.product(models, GRIDS, overlap)
    ]


def _forward(model, pair, shard):
    inputs = make_inputs(pair.shape, group=0)
    part = shard.region.times(Thw(*(n // g for n, g in zip(inputs.x_BCTHW.shape[2:], pair.grid))))
    x = cut(inputs.x_BCTHW, part).clone().requires_grad_()
    out = model(x, inputs.timestep_B, inputs.text_BYE, inputs.text_mask_BY, shard=shard)
    return x, (out * cut(inputs.weight_BCTHW, part)).sum()


# --- memory


def _storages(tensors):
    """Bytes of each storage once, by its address."""
    return {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}


def _held(pairs):
    """(bytes of what was made in all blocks and lives after them, bytes of their outputs and tapes)."""
    mesh, found = make_mesh(), []
    for pair in pairs:
        model, tapes, outputs, real = pair.network(), [], [], Tape.__init__

        def noted(self, store=None, *, tapes=tapes, real=real):
            real(self, store)
            tapes.append(self)

        def begin(*_):
            gc.collect()
            gc.freeze()  # tensors from before the blocks

        def end(*_, tapes=tapes, outputs=outputs):
            kept = {tensor.untyped_storage().data_ptr(): tensor.nbytes for tape in tapes for tensor in tape._kept}
            allowed = _storages(outputs) | kept
            for _ in range(40):  # a thread of gloo may hold what it has sent until it comes to run again
                gc.collect()
                living = _storages(thing for thing in gc.get_objects() if issubclass(type(thing), torch.Tensor))
                if sum(living.values()) <= sum(allowed.values()) + SLACK_BYTES:
                    break
                time.sleep(0.05)
            assert kept and living.keys() >= allowed.keys(), "something isn't seen"
            found.append((sum(living.values()), sum(allowed.values())))

        for block in model.blocks:
            block.register_forward_hook(lambda _block, _args, out, outputs=outputs: outputs.append(out))
        model.blocks[0].register_forward_pre_hook(begin)
        model.blocks[-1].register_forward_hook(end)
        try:
            with mock.patch.object(Tape, "__init__", noted):
                _, loss = _forward(model, pair, pair.shard(mesh))
        finally:
            gc.unfreeze()
        assert len(tapes) == len(model.blocks)
        loss.backward()
    return found


@pytest.mark.parametrize("scheme", sorted(SCHEMES))
def test_under_recomputation_only_a_blocks_inputs_and_its_tape_live_until_backward(ranks, scheme):
    pairs = [*_pairs(scheme, recompute="full"), *_pairs(scheme, overlap=(True,), recompute="selective")[:1]]
    for found in ranks.run(_held, pairs, world=3):
        for pair, (held, allowed) in zip(pairs, found, strict=True):
            assert held <= allowed + SLACK_BYTES, (pair, held, allowed)


# --- backward twice


def _twice(pairs):
    """Of each pair the largest difference of a second backward's gradients from the first's, over their largest value."""
    mesh, found = make_mesh(), []
    for pair in pairs:
        model = pair.network()
        x, loss = _forward(model, pair, pair.shard(mesh))
        loss.backward(retain_graph=True)
        leaves = [leaf for leaf in (x, *model.parameters()) if leaf.grad is not None]
        once = [leaf.grad.clone() for leaf in leaves]
        loss.backward()
        found.append(
            max(
                ((leaf.grad - 2 * grad).abs().max() / grad.abs().max().clamp(min=1e-300)).item()
                for leaf, grad in zip(leaves, once, strict=True)
            )
        )
    return found


@pytest.mark.parametrize("scheme", sorted(SCHEMES))
def test_backward_twice_gives_every_gradient_twice(ranks, scheme):
    pairs = [pair for recompute in ("none", "full") for pair in _pairs(scheme, recompute=recompute)]
    pairs += _pairs(scheme, overlap=(True,), recompute="selective", offload=True, tile_tokens=7)[:1]
    for found in ranks.run(_twice, pairs, world=3):
        assert len(found) == len(pairs) and max(found) <= TOLERANCE, dict(zip(pairs, found))
