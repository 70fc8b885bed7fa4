from __future__ import annotations

import pytest
import torch
from test_stdit import HOLES, IO, XL_IO, case, run
from torch.utils.flop_counter import FlopCounterMode
from transformer_reference import assert_matches_reference, random_model

from opensora_dist.config.train import ModelConfig
from opensora_dist.core.errors import ConfigError
from opensora_dist.core.types import Thw
from opensora_dist.models.registry import MODELS, build_model

TINY = ModelConfig(name="dit", depth=2, width=16, heads=2, space_scale=0.5, time_scale=2 / 3)


@pytest.mark.parametrize(
    "config, c",
    [
        pytest.param(TINY, case(2, (3, 4, 6), mask=HOLES, drop=torch.tensor([False, True])), id="non-square video"),
        pytest.param(TINY, case(1, (1, 2, 4)), id="one frame, no mask"),
        pytest.param(TINY.model_copy(update={"patch": (2, 1, 3)}), case(1, (4, 2, 6), mask=HOLES[:1]), id="patch in time"),
    ],
)
def test_outputs_and_all_gradients_equal_the_formulas(config, c):
    assert_matches_reference(config, IO, c)


def test_a_frame_sees_the_others_at_every_place():
    model, c = random_model(TINY, IO), case(1, (3, 4, 4))
    x = c.x.clone().requires_grad_()
    out = model(x, c.timestep, c.text, None)
    (grad,) = torch.autograd.grad(out[0, 0, 0, 0, 0], x)
    assert (grad.abs().amax(dim=(0, 1)) > 0).all()


def test_one_frame_of_it_is_stdit_without_temporal_attention():
    dit = random_model(TINY, IO)
    stdit = random_model(TINY.model_copy(update={"name": "stdit"}), IO)
    stdit.load_state_dict(dit.state_dict(), strict=False)
    for block in stdit.blocks:
        torch.nn.init.zeros_(block.attn_temp.proj.weight)
        torch.nn.init.zeros_(block.attn_temp.proj.bias)
    c = case(2, (1, 4, 4), mask=HOLES)
    # On frame 0 the temporal position that dit adds is the constant [0, 1]; take it out of the patch bias.
    dit.x_embedder.proj.bias.data[8:] -= 1
    torch.testing.assert_close(run(dit, c), run(stdit, c), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("size, depth, width", [("S", 12, 384), ("B", 12, 768), ("L", 24, 1024), ("XL", 28, 1152)])
def test_every_size_has_stdits_parameters_less_temporal_attention(size, depth, width):
    with torch.device("meta"):
        dit, stdit = (build_model(ModelConfig(name=name, size=size), XL_IO) for name in ("dit", "stdit"))
    temporal = depth * (4 * width * width + 4 * width)
    assert sum(p.numel() for p in dit.parameters()) + temporal == sum(p.numel() for p in stdit.parameters())
    assert set(dit.state_dict()) == {name for name in stdit.state_dict() if ".attn_temp." not in name}


def test_flops_are_those_that_torch_counts():
    with torch.device("meta"):
        model = build_model(ModelConfig(name="dit", size="B"), XL_IO)
        args = torch.empty(1, 4, 5, 6, 10), torch.empty(1), torch.empty(1, 120, 4096), torch.ones(1, 120, dtype=torch.bool)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(*args)
    assert model.flops(Thw(5, 6, 10), text_tokens=120) == pytest.approx(counter.get_total_flops(), rel=1e-2)


def test_an_unknown_model_is_refused_with_those_that_exist():
    assert MODELS.names() == ["dit", "stdit"]
    with pytest.raises(ConfigError, match=r"model.name='stdlt' is not known; use one of: dit, stdit; did you mean 'stdit'"):
        MODELS.get("stdlt")
