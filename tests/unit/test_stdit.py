from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformer_reference import Case, assert_matches_reference, random_model, reference

from opensora_dist.config.train import ModelConfig
from opensora_dist.core.errors import ConfigError
from opensora_dist.core.types import Thw
from opensora_dist.models.base import ModelIo
from opensora_dist.models.registry import build_model
from opensora_dist.ops.samples import Captions
from opensora_dist.parallel.sequence.local import whole

IO = ModelIo(in_channels=3, out_channels=5, text_width=7, max_tokens=6)
TINY = ModelConfig(name="stdit", depth=2, width=16, heads=2, space_scale=0.5, time_scale=2 / 3)
XL_IO = ModelIo(in_channels=4, out_channels=8, text_width=4096, max_tokens=120)
HOLES = torch.tensor([[1, 0, 1, 1, 0], [0, 0, 0, 1, 0]]).bool()  # unequal captions whose valid tokens are no prefix


def case(batch: int, latent: tuple[int, int, int], *, tokens: int = 5, mask=None, drop=None, seed: int = 1) -> Case:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(batch, IO.in_channels, *latent, generator=generator, dtype=torch.float64)
    text = torch.randn(batch, tokens, IO.text_width, generator=generator, dtype=torch.float64)
    timestep = torch.tensor([999, 3, 500])[:batch]
    return Case(x=x, timestep=timestep, text=text, mask=mask, drop=drop)


def run(model, c: Case) -> torch.Tensor:
    return model(c.x, c.timestep, c.text, c.mask, drop_caption_B=c.drop)


@pytest.mark.parametrize(
    "config, c",
    [
        pytest.param(TINY, case(2, (3, 4, 6), mask=HOLES), id="non-square video, captions with holes"),
        pytest.param(TINY, case(2, (3, 6, 2)), id="one column, no mask"),
        pytest.param(TINY, case(2, (1, 4, 4), mask=HOLES, drop=torch.tensor([False, True])), id="one frame, one caption dropped"),
        pytest.param(TINY, case(3, (2, 2, 2), tokens=6, drop=torch.tensor([True, False, True])), id="one token per frame"),
        pytest.param(TINY.model_copy(update={"patch": (2, 1, 3)}), case(1, (4, 2, 6), mask=HOLES[:1]), id="patch in time"),
        pytest.param(
            TINY.model_copy(update={"temporal_positions": "residual"}), case(2, (3, 4, 4)), id="frames known from the input"
        ),
        pytest.param(
            TINY.model_copy(update={"pooled_text": True}),
            case(2, (3, 4, 4), mask=HOLES, drop=torch.tensor([False, True])),
            id="caption in the modulation",
        ),
        pytest.param(TINY, case(2, (2, 4, 4), mask=HOLES & torch.tensor([[True], [False]])), id="a caption without valid tokens"),
    ],
)
def test_outputs_and_all_gradients_equal_the_formulas(config, c):
    assert_matches_reference(config, IO, c)


def test_float32_outputs_are_within_1e_5_of_float64():
    model, c = random_model(TINY, IO), case(2, (3, 4, 6), mask=HOLES)
    # The published model computes the timestep's angles in float32; they are the larger error, so both runs are at timestep 0.
    c = replace(c, timestep=torch.zeros(2))
    exact = run(model, c)
    single = run(model.float(), replace(c, x=c.x.float(), text=c.text.float()))
    assert single.dtype == torch.float32
    torch.testing.assert_close(single.double(), exact, rtol=1e-5, atol=1e-5)


def test_timestep_angles_are_float32_in_the_published_order_whatever_precision_the_model_has():
    model = random_model(TINY, IO).bfloat16()
    seen = []
    model.t_embedder.mlp.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    model.t_embedder(torch.tensor([999.0]), dtype=torch.bfloat16)
    half = torch.exp(-torch.log(torch.tensor(10000.0)) * torch.arange(128) / 128)
    angle = 999 * half
    torch.testing.assert_close(seen[0], torch.cat([angle.cos(), angle.sin()])[None].bfloat16(), rtol=0, atol=4e-3)


def test_no_mask_means_all_tokens_and_integer_masks_are_read_as_bool():
    model, c = random_model(TINY, IO), case(2, (2, 4, 4))
    everything = torch.ones(2, 5, dtype=torch.bool)
    torch.testing.assert_close(run(model, replace(c, mask=everything)), run(model, c), rtol=1e-12, atol=1e-12)
    assert torch.equal(run(model, replace(c, mask=HOLES.long())), run(model, replace(c, mask=HOLES)))


@pytest.mark.parametrize("garbage", [1e30, float("inf"), float("nan")])
def test_padding_reaches_neither_output_nor_gradients(garbage):
    model, clean = random_model(TINY, IO), case(2, (2, 4, 4), mask=HOLES)
    dirty = replace(clean, text=clean.text.masked_fill(~HOLES[..., None], garbage).requires_grad_())
    expected = run(model, clean)
    out = run(model, dirty)
    assert torch.equal(out, expected)
    gradients = [torch.autograd.grad(o.square().sum(), list(model.parameters())) for o in (expected, out)]
    assert all(torch.equal(a, b) for a, b in zip(*gradients))


def test_a_sample_does_not_depend_on_its_batch():
    model, c = random_model(TINY, IO), case(2, (3, 4, 6), mask=HOLES, drop=torch.tensor([False, True]))
    alone = Case(x=c.x[1:], timestep=c.timestep[1:], text=c.text[1:], mask=c.mask[1:], drop=c.drop[1:])
    torch.testing.assert_close(run(model, alone), run(model, c)[1:], rtol=1e-12, atol=1e-12)


def test_a_caption_without_valid_tokens_leaves_the_projection_bias_only():
    model, c = random_model(TINY, IO), case(2, (2, 4, 4), mask=torch.zeros(2, 5, dtype=torch.bool))
    other = replace(c, text=c.text.flip(0) * 3, mask=c.mask)
    assert run(model, c).isfinite().all()
    assert torch.equal(run(model, c), run(model, other))
    attn = model.blocks[0].cross_attn
    x = torch.ones(2, 1, 3, 16).double()
    out = attn(
        x,
        shard=whole(Thw(1, 1, 3)),
        kv_BY2NK=attn.keys_and_values(torch.ones(2, 5, 16).double()),
        captions=Captions(mask_GY=c.mask),
    )
    torch.testing.assert_close(out, attn.proj.bias.expand_as(out), rtol=0, atol=0)


def test_a_dropped_caption_is_the_null_caption_under_the_samples_own_mask():
    model, c = random_model(TINY, IO), case(2, (2, 4, 4), mask=HOLES)
    dropped = run(model, replace(c, drop=torch.tensor([True, False])))
    by_hand = c.text.clone()
    by_hand[0] = model.y_embedder.y_embedding[:5]
    assert torch.equal(dropped, run(model, replace(c, text=by_hand)))
    assert not torch.allclose(dropped[0], run(model, c)[0])


def test_dropping_a_caption_longer_than_the_null_caption_is_refused_and_keeping_it_is_not():
    model, c = random_model(TINY, IO), case(2, (1, 2, 2), tokens=9)
    assert run(model, c).isfinite().all()
    with pytest.raises(ValueError, match="text has 9 tokens, the null caption 6"):
        run(model, replace(c, drop=torch.tensor([True, False])))


def test_one_model_takes_every_shape_in_turn():
    model = random_model(TINY, IO)
    parameters = {k: v.clone() for k, v in model.state_dict().items()}
    for latent in [(3, 4, 6), (1, 6, 4), (5, 2, 2), (3, 4, 6)]:
        c = case(1, latent)
        torch.testing.assert_close(run(model, c), reference(parameters, TINY, IO, c), rtol=1e-10, atol=1e-10)


def test_a_patch_that_does_not_divide_the_latents_is_named():
    model = random_model(TINY, IO)
    assert model.token_grid(Thw(3, 4, 6)) == Thw(3, 2, 3)
    with pytest.raises(ConfigError, match=r"model.patch=1x2x2 must divide .* 3x4x5"):
        run(model, case(1, (3, 4, 5)))


@pytest.mark.parametrize("mask", [None, HOLES], ids=["no mask", "mask"])
def test_bfloat16_runs_under_autocast_and_in_a_bfloat16_model_with_float32_out(mask):
    c = case(2, (2, 4, 4), mask=mask, drop=torch.tensor([True, False]))
    c = replace(c, x=c.x.float(), text=c.text.float())
    model = random_model(TINY, IO).float()
    exact = run(model, c)
    with torch.autocast("cpu", torch.bfloat16):
        cast = run(model, c)
    cast.square().sum().backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in model.parameters())
    half = run(model.bfloat16(), c)
    for out in (cast, half):
        assert out.dtype == torch.float32
        assert (out - exact).norm() < 0.1 * exact.norm()


@pytest.mark.parametrize("weights", [torch.float32, torch.bfloat16])
def test_the_residual_stream_is_float32_under_autocast_whatever_the_weights(weights):
    model, c = random_model(TINY, IO).to(weights), case(2, (2, 4, 4), mask=HOLES)
    seen = []
    for block in model.blocks:
        block.register_forward_hook(lambda module, args, out: seen.append(out.dtype))
    with torch.autocast("cpu", torch.bfloat16):
        run(model, replace(c, x=c.x.float(), text=c.text.float()))
    assert seen == [torch.float32] * 2


def test_sampling_in_inference_mode_leaves_nothing_that_training_trips_over():
    model, c = random_model(TINY, IO), case(1, (2, 4, 4))
    with torch.inference_mode():
        run(model, c)
    run(model, c).sum().backward()


def test_xl_2_has_the_published_number_of_parameters_and_names():
    with torch.device("meta"):
        model = build_model(ModelConfig(name="stdit", size="XL"), XL_IO)
    assert sum(p.numel() for p in model.parameters()) == 759_620_768
    assert sum(p.numel() for p in model.blocks[0].parameters()) == 26_568_576
    linears = [
        "x_embedder.proj",
        "t_embedder.mlp.0",
        "t_embedder.mlp.2",
        "t_block.1",
        "y_embedder.y_proj.fc1",
        "y_embedder.y_proj.fc2",
    ]
    inner = ["attn.qkv", "attn.proj", "attn_temp.qkv", "attn_temp.proj", "mlp.fc1", "mlp.fc2"]
    inner += ["cross_attn.q_linear", "cross_attn.kv_linear", "cross_attn.proj"]
    linears += [f"blocks.{i}.{name}" for i in range(28) for name in inner] + ["final_layer.linear"]
    names = {f"{n}.{kind}" for n, kind in itertools.product(linears, ["weight", "bias"])}
    names |= {f"blocks.{i}.scale_shift_table" for i in range(28)} | {"final_layer.scale_shift_table", "y_embedder.y_embedding"}
    assert set(model.state_dict()) == names


@pytest.mark.parametrize("size, depth, width", [("S", 12, 384), ("B", 12, 768), ("L", 24, 1024), ("XL", 28, 1152)])
def test_every_size_has_the_parameters_that_its_depth_and_width_imply(size, depth, width):
    with torch.device("meta"):
        model = build_model(ModelConfig(name="stdit", size=size), XL_IO)
    d = width
    # qkv and proj twice, q, kv and proj of cross-attention, two MLP layers of 4 D, and their biases; one table of 6
    block = (4 + 4 + 4 + 8) * d * d + (4 + 4 + 4 + 5) * d + 6 * d
    edges = (4 * 4 * d + d) + (256 * d + d + d * d + d) + (6 * d * d + 6 * d) + (4096 * d + d + d * d + d) + (d * 32 + 32 + 2 * d)
    assert sum(p.numel() for p in model.parameters()) == depth * block + edges


@pytest.mark.parametrize("latent, tokens", [(Thw(16, 32, 32), 120), (Thw(1, 8, 24), 7), (Thw(5, 6, 10), 300)])
def test_flops_are_those_that_torch_counts(latent, tokens):
    with torch.device("meta"):
        model = build_model(ModelConfig(name="stdit", size="XL"), XL_IO)
        args = torch.empty(1, 4, *latent), torch.empty(1), torch.empty(1, tokens, 4096), torch.ones(1, tokens, dtype=torch.bool)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(*args)
    assert model.flops(latent, text_tokens=tokens) == pytest.approx(counter.get_total_flops(), rel=1e-2)
