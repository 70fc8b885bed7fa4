"""The published model, written a second time: one sample, one token, one head at a time, from the formulas and nothing else.

Everything is float64 and plain indexing, so that a mistake in a reshape, a split or a broadcast can't be made the same way twice.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from opensora_dist.config.train import ModelConfig
from opensora_dist.models.base import ModelIo, VideoTransformer
from opensora_dist.models.registry import build_model


@dataclass(frozen=True, kw_only=True)
class Case:
    """Inputs of one forward."""

    x: Tensor
    timestep: Tensor
    text: Tensor
    mask: Tensor | None
    drop: Tensor | None = None


def random_model(config: ModelConfig, io: ModelIo, *, seed: int = 0) -> VideoTransformer:
    """A float64 model in which nothing is zero: zero-initialised branches would hide what is wrong behind them."""
    model = build_model(config, io).double()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for tensor in model.state_dict().values():
            # about unit variance from layer to layer, so that no softmax saturates and hides what is behind it
            tensor.normal_(std=0.3 if tensor.dim() == 1 else tensor.flatten(1).shape[1] ** -0.5, generator=generator)
    return model


def sincos(index: int, *, width: int, scale: float) -> list[float]:
    """[sin, cos] of index / scale."""
    half = width // 2
    angles = [index / scale / 10000 ** (i / half) for i in range(half)]
    return [math.sin(a) for a in angles] + [math.cos(a) for a in angles]


def linear(p: dict[str, Tensor], name: str, x: Tensor) -> Tensor:
    return torch.einsum("...i,oi->...o", x, p[f"{name}.weight"]) + p[f"{name}.bias"]


def gelu(x: Tensor) -> Tensor:
    return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def silu(x: Tensor) -> Tensor:
    return x / (1 + torch.exp(-x))


def norm(x: Tensor) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    return centred / torch.sqrt((centred**2).mean(-1, keepdim=True) + 1e-6)


def heads_attention(q: Tensor, k: Tensor, v: Tensor, *, heads: int) -> Tensor:
    """Rows of q look at rows of k; head n owns channels n K to (n + 1) K. Without keys the result is zero."""
    size = q.shape[1] // heads
    out = []
    for n in range(heads):
        part = slice(n * size, (n + 1) * size)
        score = torch.einsum("lk,mk->lm", q[:, part], k[:, part]) / math.sqrt(size)
        weight = torch.exp(score - torch.logsumexp(score, dim=1, keepdim=True)) if len(k) else score
        out.append(torch.einsum("lm,mk->lk", weight, v[:, part]))
    return torch.cat(out, dim=1)


def self_attention(p: dict[str, Tensor], name: str, x: Tensor, *, heads: int) -> Tensor:
    width = x.shape[1]
    qkv = linear(p, f"{name}.qkv", x)
    q, k, v = (qkv[:, i * width : (i + 1) * width] for i in range(3))
    return linear(p, f"{name}.proj", heads_attention(q, k, v, heads=heads))


def timestep_vector(p: dict[str, Tensor], timestep: Tensor) -> Tensor:
    angles = [float(timestep) * math.exp(-math.log(10000) * i / 128) for i in range(128)]
    embedding = torch.tensor([math.cos(a) for a in angles] + [math.sin(a) for a in angles], dtype=torch.float64)
    return linear(p, "t_embedder.mlp.2", silu(linear(p, "t_embedder.mlp.0", embedding)))


def cross_and_mlp(
    p: dict[str, Tensor], i: int, x: Tensor, text: Tensor, shift: Tensor, scale: Tensor, gate: Tensor, *, heads: int
) -> Tensor:
    """The half of a block that both models share, on [tokens, D]."""
    width = x.shape[1]
    q, kv = linear(p, f"blocks.{i}.cross_attn.q_linear", x), linear(p, f"blocks.{i}.cross_attn.kv_linear", text)
    x = x + linear(p, f"blocks.{i}.cross_attn.proj", heads_attention(q, kv[:, :width], kv[:, width:], heads=heads))
    hidden = gelu(linear(p, f"blocks.{i}.mlp.fc1", norm(x) * (1 + scale) + shift))
    return x + gate * linear(p, f"blocks.{i}.mlp.fc2", hidden)


def reference(p: dict[str, Tensor], config: ModelConfig, io: ModelIo, case: Case) -> Tensor:
    """The model's output for a batch, one sample at a time."""
    return torch.stack([_one_sample(p, config, io, case, b) for b in range(len(case.x))])


def _one_sample(p: dict[str, Tensor], config: ModelConfig, io: ModelIo, case: Case, b: int) -> Tensor:
    depth, width, heads = config.shape
    pt, ph, pw = config.patch
    x_CTHW = case.x[b]
    T, H, W = x_CTHW.shape[1] // pt, x_CTHW.shape[2] // ph, x_CTHW.shape[3] // pw
    places = list(itertools.product(range(T), range(H), range(W)))
    time = torch.tensor([sincos(f, width=width, scale=config.time_scale) for f in range(T)], dtype=torch.float64)

    tokens = []
    for f, r, c in places:
        patch = x_CTHW[:, f * pt : (f + 1) * pt, r * ph : (r + 1) * ph, c * pw : (c + 1) * pw]
        token = torch.einsum("cthw,dcthw->d", patch, p["x_embedder.proj.weight"]) + p["x_embedder.proj.bias"]
        place = [s for i in (c, r) for s in sincos(i, width=width // 2, scale=config.space_scale)]
        tokens.append(token + torch.tensor(place, dtype=torch.float64))
    x = torch.stack(tokens)
    time_in_residual = config.name == "dit" or config.temporal_positions == "residual"
    if time_in_residual:
        x = x + torch.stack([time[f] for f, _, _ in places])

    caption = case.text[b]
    if case.drop is not None and case.drop[b]:
        caption = p["y_embedder.y_embedding"][: len(caption)]
    if case.mask is not None:
        caption = caption[case.mask[b].nonzero()[:, 0]]
    t = timestep_vector(p, case.timestep[b])
    if config.pooled_text:
        t = t + linear(p, "y_pool", caption.mean(dim=0))
    modulation = linear(p, "t_block.1", silu(t))
    text = linear(p, "y_embedder.y_proj.fc2", gelu(linear(p, "y_embedder.y_proj.fc1", caption)))

    for i in range(depth):
        m = [p[f"blocks.{i}.scale_shift_table"][j] + modulation[j * width : (j + 1) * width] for j in range(6)]
        shift_msa, scale_msa, gate_msa, shift_mlp, scale_mlp, gate_mlp = m
        attn_in = norm(x) * (1 + scale_msa) + shift_msa
        if config.name == "dit":
            x = x + gate_msa * self_attention(p, f"blocks.{i}.attn", attn_in, heads=heads)
        else:
            frames = [[n for n, place in enumerate(places) if place[0] == f] for f in range(T)]
            out = torch.zeros_like(x)
            for rows in frames:
                out = out.index_put((torch.tensor(rows),), self_attention(p, f"blocks.{i}.attn", attn_in[rows], heads=heads))
            x = x + gate_msa * out
            out = torch.zeros_like(x)
            for s in range(H * W):
                rows = [frames[f][s] for f in range(T)]
                temporal_in = x[rows] + time if i == 0 and not time_in_residual else x[rows]
                out = out.index_put((torch.tensor(rows),), self_attention(p, f"blocks.{i}.attn_temp", temporal_in, heads=heads))
            x = x + gate_msa * out
        x = cross_and_mlp(p, i, x, text, shift_mlp, scale_mlp, gate_mlp, heads=heads)

    shift, scale = (p["final_layer.scale_shift_table"][j] + t for j in range(2))
    values = linear(p, "final_layer.linear", norm(x) * (1 + scale) + shift)
    out_CTHW = torch.zeros(io.out_channels, *x_CTHW.shape[1:], dtype=torch.float64)
    for n, (f, r, c) in enumerate(places):
        for j, (df, dr, dc, channel) in enumerate(itertools.product(range(pt), range(ph), range(pw), range(io.out_channels))):
            out_CTHW[channel, f * pt + df, r * ph + dr, c * pw + dc] = values[n, j]
    return out_CTHW


def assert_matches_reference(config: ModelConfig, io: ModelIo, case: Case) -> None:
    """Output and every gradient (parameters, latents, text) of the model equal the reference's to 1e-10."""
    model = random_model(config, io)
    weight = torch.Generator().manual_seed(9)

    def run(forward, parameters: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        x, text = case.x.clone().requires_grad_(), case.text.clone().requires_grad_()
        out = forward(Case(x=x, timestep=case.timestep, text=text, mask=case.mask, drop=case.drop))
        leaves = {"x": x, "text": text, **parameters}
        factor = torch.randn(out.shape, generator=weight.manual_seed(9), dtype=torch.float64)
        grads = torch.autograd.grad((out * factor).sum(), list(leaves.values()), materialize_grads=True)
        return out.detach(), dict(zip(leaves, grads))

    plain = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
    leaves = {name: plain[name].requires_grad_() for name, _ in model.named_parameters()}
    expected, expected_grads = run(lambda c: reference(plain, config, io, c), leaves)
    got, grads = run(lambda c: model(c.x, c.timestep, c.text, c.mask, drop_caption_B=c.drop), dict(model.named_parameters()))
    assert got.abs().max() > 0.1
    torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-10)
    assert grads.keys() == expected_grads.keys()
    for name, grad in expected_grads.items():
        error, size = float((grads[name] - grad).abs().max()), float(grad.abs().max())
        assert error <= 1e-10 * max(1.0, size), f"gradient of {name} is off by {error} of {size}"
