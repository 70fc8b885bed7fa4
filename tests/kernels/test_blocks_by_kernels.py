"""Blocks by kernels: what they want to know of samples is made once, and compiled they are what they are uncompiled."""

from __future__ import annotations

import pytest
import torch
from kernel_checks import draws
from sequence_cases import Shape, compute, make_inputs, make_model
from tiny_kernels import TinyKernels

pytest.importorskip("triton", reason="Triton runs on Linux only; pip install 'opensora-dist[kernels]'")

from opensora_dist.config.train import ParallelConfig
from opensora_dist.core.types import Thw
from opensora_dist.models.levers import set_levers
from opensora_dist.ops import samples
from opensora_dist.ops.choice import Choice, using
from opensora_dist.ops.compiled import Compilations, using_backend

SHAPES = [Shape(Thw(3, 2, 2), batch=2, heads=2, width=16), Shape(Thw(2, 3, 2), batch=3, heads=2, width=16)]
CPU = torch.device("cpu")


@pytest.mark.parametrize("packed", [False, True])
def test_where_samples_end_is_made_once_for_all_blocks(packed):
    inputs = [make_inputs(shape, group=0, dtype=torch.float32) for shape in SHAPES[: 1 + packed]]
    of = [torch.cat([getattr(one, name) for one in inputs]) for name in ("timestep_B", "text_BYE", "text_mask_BY")]
    xs = [one.x_BCTHW for one in inputs]
    made = []
    for depth in (1, 3):
        model = make_model("stdit", SHAPES[0], depth=depth).float()
        with using(Choice(kernels="triton")), torch.no_grad(), TinyKernels() as counted:
            model(xs if packed else xs[0], *of)
        made.append(counted.made)
    assert made[0] and made[0] == made[1], "of one block, and of three"


def test_packs_of_short_sequences_are_for_kernels_before_flash_attn_and_others_for_it(monkeypatch):
    qkv, runs = draws(torch.bfloat16, (2 * 6 + 9, 3, 2, 16))[0], [(2, 6), (1, 9)]
    wanted = samples.packed_attention(qkv, runs=runs, ends=samples.Ends())
    monkeypatch.setattr(samples, "flash_varlen", lambda *args, **kwargs: "by flash-attn")
    with using(Choice(kernels="triton", attention="flash_attn_2")):
        found = samples.packed_attention(qkv, runs=runs, ends=samples.Ends())
        monkeypatch.setattr(samples, "_SHORT", 8)
        assert samples.packed_attention(qkv, runs=runs, ends=samples.Ends()) == "by flash-attn"
    torch.testing.assert_close(found, wanted, rtol=2e-2, atol=2e-2)


@pytest.mark.slow
@pytest.mark.parametrize("name, recompute", [("dit", "none"), ("dit", "selective"), ("stdit", "selective")])
def test_compiled_blocks_by_kernels_are_torchs_and_another_shape_compiles_nothing(name, recompute):
    torch._dynamo.reset()
    model = make_model(name, SHAPES[0], depth=2).float()
    set_levers(model, ParallelConfig(recompute=recompute), device=CPU)
    compilations, graphs = Compilations(), []
    compilations.start()
    for shape in SHAPES:
        inputs = make_inputs(shape, group=0, dtype=torch.float32)
        wanted = compute(model, inputs, shard=None)
        with using(Choice(kernels="triton", compile="blocks", dynamic_shapes=True)), using_backend("aot_eager"):
            found = compute(model, inputs, shard=None)
        for one, other in ((found.output, wanted.output), (found.dx, wanted.dx)):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5 * float(other.abs().max()))
        graphs.append(compilations.sofar.graphs)
    compilations.stop()
    assert 0 < graphs[0] == graphs[1]
