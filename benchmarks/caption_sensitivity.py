"""Which words of a toy caption does a model hear? The loss with a wrong word minus the loss with the right one, by noise level.

    python benchmarks/caption_sensitivity.py runs/toy data/toy-shards --out benchmarks/results/cpu/toy_caption_sensitivity.json

Near zero, the word changes nothing in what the model predicts, however well it draws. For rectified flow on toy video.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import torch

from opensora_dist.core.io import write_json
from opensora_dist.data.index import Index
from opensora_dist.data.reader import ShardReader
from opensora_dist.parallel.keys import Keys
from opensora_dist.recipes.sample import load_model
from opensora_dist.train.generate import pad_texts

OPPOSITE = {"left": "right", "right": "left", "up": "down", "down": "up"}
SIGMAS = (0.98, 0.9, 0.8, 0.6, 0.4)


def other_direction(caption: str) -> str:
    """The caption with every movement reversed."""
    what, moves = caption.split(" moves ")
    return f"{what} moves {', then '.join(OPPOSITE[m] for m in moves.split(', then '))}"


def other_colour(caption: str) -> str:
    """The caption with another colour."""
    words = caption.split()
    words[2] = "red" if words[2] == "blue" else "blue"
    return " ".join(words)


@torch.no_grad()
def sensitivity(run: Path, shards: Path, *, samples: int, seed: int) -> list[dict[str, Any]]:
    """One row per sigma, over the first ``samples`` samples of a data set."""
    loaded, index = load_model(run, device="cpu", weights="ema"), Index.open(shards)
    captions = pq.read_table(shards / "index.parquet", columns=["caption"]).column("caption").to_pylist()[:samples]
    raw = ShardReader(index).read(range(len(captions)))
    std, mean = (torch.tensor(v).view(1, -1, 1, 1, 1) for v in (index.spec.latent_std, index.spec.latent_mean))
    x0 = (torch.stack([torch.from_numpy(r.latents.astype("float32")).transpose(0, 1) for r in raw]) - mean) / std
    noise = torch.empty_like(x0).normal_(generator=Keys(seed).generator("caption_sensitivity"))
    rows = []
    for sigma in SIGMAS:
        losses = {}
        for name, change in (("right", str), ("direction", other_direction), ("colour", other_colour)):
            text, mask = pad_texts(loaded.text.encode([change(c) for c in captions]))
            velocity = loaded.model((1 - sigma) * x0 + sigma * noise, torch.full((len(x0),), 1000 * sigma), text, mask)
            losses[name] = float(((velocity - (x0 - noise)) ** 2).mean())
        rows.append(
            {
                "sigma": sigma,
                "loss": round(losses["right"], 5),
                "wrong_direction": round(losses["direction"] - losses["right"], 5),
                "wrong_colour": round(losses["colour"] - losses["right"], 5),
            }
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("shards", type=Path)
    parser.add_argument("--samples", type=int, default=192)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    rows = sensitivity(args.run, args.shards, samples=args.samples, seed=args.seed)
    for row in rows:
        print(row)
    write_json(args.out, {"run": args.run.name, "samples": args.samples, "rows": rows})


if __name__ == "__main__":
    main()
