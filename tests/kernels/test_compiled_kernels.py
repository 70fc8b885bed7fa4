"""Under ``run.compile=blocks`` a kernel is one node of a block's graph, forward and backward: compilation sees through to it, not into it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

import pytest
import torch
from functorch.compile import make_boxed_func
from sequence_cases import Shape, compute, make_inputs, make_model
from torch import nn
from torch._dynamo.backends.common import aot_autograd

pytest.importorskip("triton", reason="Triton runs on Linux only; pip install 'opensora-dist[kernels]'")

from opensora_dist.core.types import Thw
from opensora_dist.ops.choice import Choice, using
from opensora_dist.ops.compiled import using_backend

SHAPE = Shape(Thw(2, 1, 3), batch=2, heads=2, width=16)
FORWARD = {"norm_modulate", "add_norm_modulate", "gated", "bias_gelu", "varlen_attention"}
OF_MODEL = {"dit": FORWARD, "stdit": FORWARD | {"short_attention"}}


@pytest.fixture
def nodes() -> Iterator[Counter[str]]:
    """Operators of this project in the graphs that were compiled, once more for each node."""
    torch._dynamo.reset()
    found: Counter[str] = Counter()

    def record(graph: torch.fx.GraphModule, _example):
        found.update(node.target._opname for node in graph.graph.nodes if getattr(node.target, "namespace", "") == "opensora")
        return make_boxed_func(graph.forward)

    with using_backend(aot_autograd(fw_compiler=record, bw_compiler=record)):
        yield found


def results(model: nn.Module, *, choice: Choice) -> dict[str, torch.Tensor]:
    inputs = make_inputs(SHAPE, group=0, dtype=torch.float32)
    with using(choice):
        found = compute(model, inputs, shard=None)
    return {"output": found.output, "dx": found.dx, **found.grads}


@pytest.mark.parametrize("name", OF_MODEL)
def test_each_kernel_is_a_node_of_the_graphs_of_a_block_and_gives_what_it_gives_uncompiled(name, nodes):
    model = make_model(name, SHAPE, depth=1).float()
    wanted = results(model, choice=Choice(kernels="triton"))
    assert not nodes
    found = results(model, choice=Choice(kernels="triton", compile="blocks"))
    assert set(nodes) == {f"{kernel}{way}" for kernel in OF_MODEL[name] for way in ("", "_backward")}, nodes
    assert all(nodes[f"{kernel}_backward"] == nodes[kernel] for kernel in OF_MODEL[name]), nodes
    for part, value in wanted.items():
        torch.testing.assert_close(found[part], value, rtol=1e-5, atol=1e-6 * float(value.abs().max()), msg=part)
