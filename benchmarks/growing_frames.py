"""What factorised attention saves as videos grow: STDiT against joint attention (dit), forward and backward, at T frames.

    OMP_NUM_THREADS=2 python benchmarks/growing_frames.py --out benchmarks/results/cpu/growing_frames.json

One process, one sample, float32, the whole model. Both models take turns in every round; a ratio is of the two times of one round.
Beside what was measured stands what the models' own FLOPs say: of a forward (``flops``), and of a forward and backward in which
attention's backward is 2.5 times its forward (its scores are computed again) and every other one's twice. XL/2 at 64x64x64 latents
(64 frames of 512x512 pixels) is FLOPs only.
"""

# T latent frames, H, W latent rows and columns

from __future__ import annotations

import argparse
import os
import statistics
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from opensora_dist.config.train import ModelConfig
from opensora_dist.core.io import write_json
from opensora_dist.core.types import Axis, Thw
from opensora_dist.models.base import ModelIo, VideoTransformer
from opensora_dist.models.dit.model import DiTBlock
from opensora_dist.models.init import init_weights
from opensora_dist.models.layers import linear_flops
from opensora_dist.models.registry import build_model
from opensora_dist.models.stdit.model import STDiTBlock
from opensora_dist.observe.environment import describe_environment
from opensora_dist.parallel.keys import Keys

NAMES = ("stdit", "dit")
TEXT_TOKENS = 120
IO = ModelIo(in_channels=4, out_channels=4, text_width=4096, max_tokens=TEXT_TOKENS)  # T5-XXL's captions
XL_LATENT = Thw(64, 64, 64)


@dataclass(frozen=True)
class Flops:
    """Of one sample."""

    forward: int
    training: int


def build(config: ModelConfig) -> VideoTransformer:
    """Without values."""
    with torch.device("meta"):
        return build_model(config, IO)


def flops(model: VideoTransformer, latent: Thw) -> Flops:
    """Forward from ``model.flops``; backward from the part of it that is attention itself."""
    forward = model.flops(latent, text_tokens=TEXT_TOKENS)
    grid, block = model.token_grid(latent), model.blocks[0]
    if isinstance(block, STDiTBlock):
        attentions = [(block.attn, Axis.SPACE), (block.attn_temp, Axis.TIME)]
    else:
        assert isinstance(block, DiTBlock)
        attentions = [(block.attn, Axis.JOINT)]
    scores = sum(attn.flops(grid, axis=axis) - linear_flops(attn, tokens=grid.volume) for attn, axis in attentions)
    linears = linear_flops(block.cross_attn.q_linear, tokens=grid.volume) + linear_flops(
        block.cross_attn.proj, tokens=grid.volume
    )
    linears += linear_flops(block.cross_attn.kv_linear, tokens=TEXT_TOKENS)
    scores += block.cross_attn.flops(grid.volume, text_tokens=TEXT_TOKENS) - linears
    return Flops(forward, 3 * forward + len(model.blocks) * scores // 2)


def flops_ratios(size: dict[str, Any], latent: Thw) -> dict[str, float]:
    """dit over stdit."""
    stdit, dit = (flops(build(ModelConfig(name=name, **size)), latent) for name in NAMES)
    return {"forward": round(dit.forward / stdit.forward, 3), "training": round(dit.training / stdit.training, 3)}


def timed(model: VideoTransformer, latent: Thw) -> tuple[float, float]:
    """Seconds of a forward and of a backward."""
    keys = Keys(0)
    x = torch.empty(1, IO.in_channels, *latent).normal_(generator=keys.generator("x"))
    text = torch.empty(1, TEXT_TOKENS, IO.text_width).normal_(generator=keys.generator("text"))
    model.zero_grad(set_to_none=True)
    began = time.perf_counter()
    out = model(x, torch.tensor([500.0]), text, None)
    between = time.perf_counter()
    out.square().mean().backward()
    return between - began, time.perf_counter() - between


def spread(values: list[float]) -> dict[str, float]:
    """Median, least and most."""
    return {"median": round(statistics.median(values), 5), "min": round(min(values), 5), "max": round(max(values), 5)}


def measure(models: dict[str, VideoTransformer], latent: Thw, *, rounds: int) -> dict[str, Any]:
    """Of one latent shape: seconds of both models, and their ratio round by round."""
    for model in models.values():
        timed(model, latent)
    found = [{name: timed(model, latent) for name, model in models.items()} for _ in range(rounds)]
    seconds = {
        name: {
            "forward_s": spread([of[name][0] for of in found]),
            "backward_s": spread([of[name][1] for of in found]),
            "both_s": spread([sum(of[name]) for of in found]),
        }
        for name in models
    }
    ratios = {
        "forward": spread([of["dit"][0] / of["stdit"][0] for of in found]),
        "backward": spread([of["dit"][1] / of["stdit"][1] for of in found]),
        "both": spread([sum(of["dit"]) / sum(of["stdit"]) for of in found]),
    }
    return {"seconds": seconds, "ratio": ratios}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--frames", type=int, nargs="+", default=[4, 8, 16, 32, 64], help="latent frames")
    parser.add_argument("--latent", type=int, default=32, help="latent height and width; a token is 2x2")
    parser.add_argument("--depth", type=int, default=2)
    parser.add_argument("--width", type=int, default=384)
    parser.add_argument("--heads", type=int, default=6)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    size = {"depth": args.depth, "width": args.width, "heads": args.heads}
    models = {name: build(ModelConfig(name=name, **size)).to_empty(device="cpu") for name in NAMES}
    for model in models.values():
        init_weights(model, keys=Keys(0))
    print("frames  tokens   stdit ms    dit ms   ratio (min-max)    FLOPs ratio: training (forward)")
    rows = []
    for frames in args.frames:
        latent = Thw(frames, args.latent, args.latent)
        tokens = models["dit"].token_grid(latent).volume
        row = {"frames": frames, "tokens": tokens, **measure(models, latent, rounds=args.rounds)}
        row["flops_ratio"] = flops_ratios(size, latent)
        rows.append(row)
        both, expected = row["ratio"]["both"], row["flops_ratio"]
        ms = [row["seconds"][name]["both_s"]["median"] * 1000 for name in NAMES]
        measured = f"{both['median']:5.2f} ({both['min']:.2f}-{both['max']:.2f})"
        said = f"{expected['training']:.2f} ({expected['forward']:.2f})"
        print(f"{frames:6} {tokens:7} {ms[0]:10.1f} {ms[1]:9.1f}   {measured:18} {said}", flush=True)
    xl = flops_ratios({"size": "XL"}, XL_LATENT)
    print(f"FLOPs only, XL/2 at {XL_LATENT} latents: {xl['training']:.2f} ({xl['forward']:.2f})")
    if args.out is not None:
        environment = describe_environment()
        about = {key: environment[key] for key in ("cpu", "cpu_cores", "platform", "git")}
        about |= {"torch": torch.__version__, "threads": torch.get_num_threads(), "load_average": os.getloadavg()[0]}
        settings = {**size, "latent": args.latent, "rounds": args.rounds, "dtype": "float32", "text_tokens": TEXT_TOKENS}
        write_json(args.out, {**about, "settings": settings, "rows": rows, "xl_2_64x64x64_flops_only": xl})


if __name__ == "__main__":
    main()
