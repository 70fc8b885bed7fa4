from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor
from transformer_reference import random_model, sincos

from opensora_dist.config.train import ModelConfig
from opensora_dist.core.errors import WeightsError
from opensora_dist.models.base import ModelIo
from opensora_dist.models.importers import read_open_sora, read_pixart
from opensora_dist.models.init import assign_weights, init_weights
from opensora_dist.models.registry import build_model
from opensora_dist.parallel.keys import Keys

IO = ModelIo(in_channels=4, out_channels=8, text_width=7, max_tokens=6)
CONFIG = ModelConfig(name="stdit", depth=2, width=16, heads=2, space_scale=0.5, time_scale=2 / 3)


def fresh(config: ModelConfig = CONFIG):
    with torch.device("meta"):
        model = build_model(config, IO)
    model.to_empty(device="cpu")
    init_weights(model, Keys(3))
    return model


def on_meta(config: ModelConfig = CONFIG):
    with torch.device("meta"):
        return build_model(config, IO)


def spatial_table(rows: int, columns: int, *, scale: float) -> Tensor:
    halves = [sincos(c, width=8, scale=scale) + sincos(r, width=8, scale=scale) for r in range(rows) for c in range(columns)]
    return torch.tensor(halves, dtype=torch.float32)[None]


def temporal_table(frames: int, *, scale: float) -> Tensor:
    return torch.tensor([sincos(f, width=16, scale=scale) for f in range(frames)], dtype=torch.float32)[None]


def open_sora_file(*, space_scale: float = 0.5, time_scale: float = 2 / 3) -> dict[str, Tensor]:
    weights = {k: v.float() for k, v in random_model(CONFIG, IO, seed=5).state_dict().items()}
    tables = {"pos_embed": spatial_table(3, 4, scale=space_scale), "pos_embed_temporal": temporal_table(5, scale=time_scale)}
    return weights | tables


def pixart_file() -> dict[str, Tensor]:
    weights = {k: v for k, v in open_sora_file().items() if ".attn_temp." not in k and k != "pos_embed_temporal"}
    return weights | {"x_embedder.proj.weight": weights["x_embedder.proj.weight"][:, :, 0]}


def save(tensors, path):
    if path.suffix == ".safetensors":
        save_file({k: v.contiguous() for k, v in tensors.items()}, path)
    else:
        torch.save(tensors, path)
    return path


@pytest.mark.parametrize("name, wrapped", [("w.safetensors", False), ("w.pth", False), ("w.pth", True)])
def test_open_sora_weights_arrive_whole(tmp_path, name, wrapped):
    weights = open_sora_file()
    path = save({"state_dict": weights} if wrapped else weights, tmp_path / name)
    tensors, report = read_open_sora(path, on_meta())
    assert (report.missing, report.unexpected, report.warnings) == ((), (), ())
    assert report.ignored == ("pos_embed", "pos_embed_temporal")
    model = fresh()
    assign_weights(model, tensors)
    state = model.state_dict()
    assert state.keys() == weights.keys() - {"pos_embed", "pos_embed_temporal"}
    assert all(torch.equal(state[k], weights[k]) for k in state)


def test_a_file_without_position_tables_is_whole_too(tmp_path):
    weights = {k: v for k, v in open_sora_file().items() if not k.startswith("pos_embed")}
    _, report = read_open_sora(save(weights, tmp_path / "w.safetensors"), on_meta())
    assert (report.ignored, report.warnings) == ((), ())


@pytest.mark.parametrize("rows, columns", [(3, 4), (4, 1), (1, 4), (1, 1)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_right_tables_are_recognised_on_any_grid_and_in_low_precision(tmp_path, rows, columns, dtype):
    weights = open_sora_file() | {"pos_embed": spatial_table(rows, columns, scale=0.5)}
    path = save({k: v.to(dtype) for k, v in weights.items()}, tmp_path / "w.safetensors")
    assert read_open_sora(path, on_meta())[1].warnings == ()


def test_tables_of_other_scales_are_reported_with_the_scales_that_match(tmp_path):
    path = save(open_sora_file(space_scale=1.0, time_scale=0.5), tmp_path / "w.safetensors")
    space, time = read_open_sora(path, on_meta())[1].warnings
    assert space == "the file's pos_embed is not what model.space_scale=0.5 gives: it matches model.space_scale=1"
    assert time == "the file's pos_embed_temporal is not what model.time_scale=0.666667 gives: it matches model.time_scale=0.5"


def test_tables_of_no_scale_are_reported_as_such(tmp_path):
    tables = {"pos_embed": torch.full((1, 12, 16), 0.3), "pos_embed_temporal": torch.zeros(1, 5, 12)}
    space, time = read_open_sora(save(open_sora_file() | tables, tmp_path / "w.safetensors"), on_meta())[1].warnings
    assert "nor what any scale does" in space
    assert time == "the file's pos_embed_temporal has shape (1, 5, 12), not [1, tokens, 16]: it can't be compared"


def test_every_missing_unexpected_and_misshapen_name_is_in_the_error(tmp_path):
    weights = open_sora_file()
    del weights["t_block.1.bias"], weights["blocks.1.attn_temp.proj.weight"]
    weights |= {"csize_embedder.mlp.0.weight": torch.zeros(3, 2), "final_layer.linear.bias": torch.zeros(16)}
    with pytest.raises(WeightsError) as caught:
        read_open_sora(save(weights, tmp_path / "w.safetensors"), on_meta())
    problems = str(caught.value).split("\n  ")[1:]
    assert problems == [
        "missing: t_block.1.bias",
        "missing: blocks.1.attn_temp.proj.weight",
        "unexpected: csize_embedder.mlp.0.weight (3, 2)",
        "other shape: final_layer.linear.bias is (16,), the model has (32,)",
    ]


def test_an_image_model_may_miss_temporal_attention_and_nothing_else(tmp_path):
    _, report = read_pixart(save(pixart_file(), tmp_path / "w.pth"), on_meta())
    kinds = [f"{part}.{kind}" for part in ("qkv", "proj") for kind in ("weight", "bias")]
    assert sorted(report.missing) == sorted(f"blocks.{i}.attn_temp.{kind}" for i in range(2) for kind in kinds)
    assert (report.ignored, report.unexpected, report.warnings) == (("pos_embed",), (), ())
    weights = pixart_file()
    del weights["blocks.0.attn.qkv.bias"]
    with pytest.raises(WeightsError, match=r"missing: blocks.0.attn.qkv.bias$"):
        read_pixart(save(weights, tmp_path / "v.pth"), on_meta())


def test_an_image_model_does_not_fit_patches_of_two_frames(tmp_path):
    model = on_meta(CONFIG.model_copy(update={"patch": (2, 2, 2)}))
    with pytest.raises(
        WeightsError, match=r"other shape: x_embedder.proj.weight is \(16, 4, 1, 2, 2\), the model has \(16, 4, 2, 2, 2\)"
    ):
        read_pixart(save(pixart_file(), tmp_path / "w.pth"), model)


def image_model(p: dict[str, Tensor], x_BCHW: Tensor, timestep: Tensor, text: Tensor, mask: Tensor) -> Tensor:
    """PixArt-alpha as its authors define it: a 2-D convolution, one attention per block, an image out."""
    heads, width = 2, 16

    def lin(name: str, x: Tensor) -> Tensor:
        return F.linear(x, p[f"{name}.weight"], p[f"{name}.bias"])

    def attend(q: Tensor, k: Tensor, v: Tensor, valid: Tensor | None = None) -> Tensor:
        q, k, v = (y.reshape(len(y), -1, heads, width // heads) for y in (q, k, v))
        score = torch.einsum("blnk,bmnk->bnlm", q, k) / math.sqrt(width // heads)
        if valid is not None:
            score = score.masked_fill(~valid[:, None, None], -math.inf)
        return torch.einsum("bnlm,bmnk->blnk", score.softmax(-1), v).flatten(2)

    rows, columns = x_BCHW.shape[2] // 2, x_BCHW.shape[3] // 2
    x = F.conv2d(x_BCHW, p["x_embedder.proj.weight"], p["x_embedder.proj.bias"], stride=2).flatten(2).transpose(1, 2)
    x = x + spatial_table(rows, columns, scale=0.5).to(x)
    angle = timestep[:, None] * torch.exp(-math.log(10000) * torch.arange(128, dtype=x.dtype) / 128)
    t = lin("t_embedder.mlp.2", F.silu(lin("t_embedder.mlp.0", torch.cat([angle.cos(), angle.sin()], 1))))
    t0 = lin("t_block.1", F.silu(t)).view(-1, 6, width)
    y = lin("y_embedder.y_proj.fc2", F.gelu(lin("y_embedder.y_proj.fc1", text), approximate="tanh"))
    for i in range(2):
        b = f"blocks.{i}"
        shift, scale, gate, shift_mlp, scale_mlp, gate_mlp = (p[f"{b}.scale_shift_table"] + t0).chunk(6, dim=1)
        q, k, v = lin(f"{b}.attn.qkv", F.layer_norm(x, (width,), eps=1e-6) * (1 + scale) + shift).chunk(3, dim=-1)
        x = x + gate * lin(f"{b}.attn.proj", attend(q, k, v))
        k, v = lin(f"{b}.cross_attn.kv_linear", y).chunk(2, dim=-1)
        x = x + lin(f"{b}.cross_attn.proj", attend(lin(f"{b}.cross_attn.q_linear", x), k, v, mask))
        hidden = F.gelu(
            lin(f"{b}.mlp.fc1", F.layer_norm(x, (width,), eps=1e-6) * (1 + scale_mlp) + shift_mlp), approximate="tanh"
        )
        x = x + gate_mlp * lin(f"{b}.mlp.fc2", hidden)
    shift, scale = (p["final_layer.scale_shift_table"] + t[:, None]).chunk(2, dim=1)
    x = lin("final_layer.linear", F.layer_norm(x, (width,), eps=1e-6) * (1 + scale) + shift)
    return torch.einsum("bhwpqc->bchpwq", x.view(-1, rows, columns, 2, 2, 8)).reshape(-1, 8, 2 * rows, 2 * columns)


@pytest.mark.parametrize("frames", [1, 3])
def test_at_step_0_every_frame_is_what_the_image_model_makes_of_it(tmp_path, frames):
    weights = {k: v.double() for k, v in pixart_file().items()}
    tensors, _ = read_pixart(save({"state_dict": weights}, tmp_path / "w.pth"), on_meta())
    model = fresh().double()
    assign_weights(model, tensors)
    g = torch.Generator().manual_seed(1)
    x = torch.randn(2, 4, frames, 6, 8, generator=g, dtype=torch.float64)
    text = torch.randn(2, 5, 7, generator=g, dtype=torch.float64)
    timestep, mask = torch.tensor([999.0, 20.0], dtype=torch.float64), torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]]).bool()
    video = model(x, timestep, text, mask)
    assert video.abs().max() > 0.1
    for f in range(frames):
        # The table is stored in float32, the model computes it in float64: hence not 1e-12.
        torch.testing.assert_close(video[:, :, f], image_model(weights, x[:, :, f], timestep, text, mask), rtol=1e-6, atol=1e-6)


def test_unreadable_files_are_named_with_a_way_out(tmp_path):
    model = on_meta()
    with pytest.raises(WeightsError, match=r"none.pth: no such file"):
        read_open_sora(tmp_path / "none.pth", model)
    with pytest.raises(WeightsError, match=r"none.safetensors: no such file"):
        read_open_sora(tmp_path / "none.safetensors", model)
    with pytest.raises(WeightsError, match=r"unknown suffix '.ckpt'; use .safetensors, .pth"):
        read_open_sora(tmp_path / "w.ckpt", model)
    for name in ("cut.safetensors", "cut.pth", "empty.pth"):
        whole = save(open_sora_file(), tmp_path / f"whole{(tmp_path / name).suffix}").read_bytes()
        (tmp_path / name).write_bytes(b"" if name == "empty.pth" else whole[: len(whole) // 2])
        with pytest.raises(WeightsError, match="unreadable, damaged or not a weights file"):
            read_open_sora(tmp_path / name, model)
    with pytest.raises(WeightsError, match="must be a dict of tensors"):
        read_open_sora(save({"epoch": 3}, tmp_path / "other.pth"), model)


def test_a_pickle_that_would_run_code_is_refused(tmp_path):
    class Evil:
        def __reduce__(self):
            return (exec, (f"open({str(tmp_path / 'ran')!r}, 'w')",))

    path = save({"state_dict": Evil()}, tmp_path / "evil.pth")
    with pytest.raises(WeightsError, match="damaged, or holds objects whose loading could run code"):
        read_open_sora(path, on_meta())
    assert not (tmp_path / "ran").exists()


def test_assigning_a_name_or_shape_that_the_model_lacks_is_refused():
    model = fresh()
    with pytest.raises(WeightsError, match=r"nope of shape \(2,\): the model has no such parameter"):
        assign_weights(model, {"nope": torch.zeros(2)})
    with pytest.raises(WeightsError, match=r"t_block.1.bias of shape \(2,\): the model has shape \(96,\)"):
        assign_weights(model, {"t_block.1.bias": torch.zeros(2)})
