from __future__ import annotations

import math

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.testing._internal.distributed.fake_pg import FakeStore

from opensora_dist.config.train import ModelConfig
from opensora_dist.models.base import ModelIo
from opensora_dist.models.init import assign_weights, init_weights
from opensora_dist.models.registry import build_model
from opensora_dist.parallel.keys import Keys

IO = ModelIo(in_channels=4, out_channels=8, text_width=96, max_tokens=11)
CONFIG = ModelConfig(name="stdit", depth=2, width=128, heads=4)


def built(config: ModelConfig = CONFIG, *, seed: int = 0, dtype: torch.dtype = torch.float32):
    with torch.device("meta"):
        model = build_model(config, IO).to(dtype)
    model.to_empty(device="cpu")
    init_weights(model, Keys(seed))
    return model


def test_every_parameter_starts_as_the_published_model_starts_it():
    for name, tensor in built().state_dict().items():
        spread = float(tensor.std())
        if name.endswith("scale_shift_table"):
            expected = 128**-0.5
        elif name == "y_embedder.y_embedding":
            expected = 96**-0.5
        elif name.endswith(".bias") or name.endswith(
            ("attn_temp.proj.weight", "cross_attn.proj.weight", "final_layer.linear.weight")
        ):
            assert not tensor.any(), name
            continue
        elif name.startswith(("t_embedder", "t_block", "y_embedder.y_proj")):
            expected = 0.02
        else:
            fan_out, fan_in = tensor.flatten(1).shape
            bound = math.sqrt(6 / (fan_in + fan_out))
            assert 0.98 * bound < tensor.abs().max() <= bound, name
            expected = bound / math.sqrt(3)
        assert spread == pytest.approx(expected, rel=0.1), name
        assert abs(tensor.mean()) < 0.1 * spread, name


def test_an_initial_value_depends_on_seed_and_name_only():
    small, again, other = built().state_dict(), built().state_dict(), built(seed=1).state_dict()
    deep = built(CONFIG.model_copy(update={"depth": 3})).state_dict()
    joint = built(CONFIG.model_copy(update={"name": "dit"})).state_dict()
    assert all(torch.equal(small[k], again[k]) and torch.equal(small[k], deep[k]) for k in small)
    assert all(torch.equal(small[k], joint[k]) for k in joint)
    drawn = [k for k in small if small[k].any()]
    assert not any(torch.equal(small[k], other[k]) for k in drawn)
    assert not torch.equal(small["blocks.0.attn.qkv.weight"], small["blocks.1.attn.qkv.weight"])


def test_a_float64_model_starts_from_the_float32_values():
    single, double = built().state_dict(), built(dtype=torch.float64).state_dict()
    assert all(torch.equal(single[k].double(), double[k]) for k in single)


def test_values_are_refused_before_memory_exists():
    with torch.device("meta"):
        model = build_model(CONFIG, IO)
    with pytest.raises(AssertionError, match="to_empty"):
        init_weights(model, Keys(0))


def test_a_rank_of_a_sharded_model_gets_its_part_of_the_same_values():
    # The other nine ranks don't exist: neither initialising nor assigning may need to talk to them. Five shards don't divide 128
    # rows, and this rank has the short one.
    rank = 4
    whole = built()
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=10)
    try:
        mesh = init_device_mesh("cpu", (2, 5), mesh_dim_names=("dp_replicate", "dp_shard"))
        with torch.device("meta"):
            model = build_model(CONFIG, IO)
        for block in model.blocks:
            fully_shard(block, mesh=mesh)
        fully_shard(model, mesh=mesh)
        model.to_empty(device="cpu")
        init_weights(model, Keys(0))

        def assert_shards(full: dict[str, torch.Tensor]) -> None:
            for name, tensor in model.state_dict().items():
                expected = full[name]
                if isinstance(tensor, DTensor):
                    assert tensor.placements == (Replicate(), Shard(0))
                    chunks = torch.chunk(expected, 5, dim=0)
                    part = rank % 5
                    expected = chunks[part] if part < len(chunks) else expected[:0]
                    tensor = tensor.to_local()
                assert torch.equal(tensor, expected), name

        assert_shards(whole.state_dict())
        other = built(seed=7).state_dict()
        assign_weights(model, other)
        assert_shards(other)
    finally:
        dist.destroy_process_group()
