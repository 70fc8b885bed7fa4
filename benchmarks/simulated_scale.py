"""What a rank of 8, 64 and 512 holds of STDiT-XL/2 in training: the formula beside a step simulated on fake tensors.

    python benchmarks/simulated_scale.py --out benchmarks/results/cpu/simulated_scale.json --page docs/scale.md

One process is rank 0 of a world whose other ranks don't exist; tensors have sizes and no memory. Prints a table, row by row, and puts it into a page.
"""

from __future__ import annotations

import argparse
from dataclasses import asdict
from pathlib import Path

import torch

from opensora_dist.config.train import ModelConfig, ParallelConfig, SpConfig, ZeroConfig
from opensora_dist.core.io import write_json
from opensora_dist.core.types import Thw
from opensora_dist.plan.memory import MemoryCase, estimate
from opensora_dist.recipes.bench.page import write_table
from opensora_dist.recipes.bench.scale import simulate_step

GIB = 2**30


def cases(depth: int) -> list[MemoryCase]:
    """bfloat16; 512 x 512 pixels."""
    rows = [  # ranks, ZeRO stage, sp degree, copies, recompute, frames
        (8, 2, 1, 1, "none", 16),
        (8, 3, 1, 1, "full", 64),
        (64, 2, 8, 1, "none", 64),
        (64, 3, 8, 1, "full", 64),
        (512, 2, 1, 8, "full", 16),
        (512, 3, 8, 1, "full", 64),
    ]
    return [
        MemoryCase(
            model=ModelConfig(size="XL", depth=depth),
            parallel=ParallelConfig(
                dp_replicate=copies, sp=SpConfig(degree=sp), recompute=recompute, zero=ZeroConfig(stage=stage)
            ),
            world=world,
            latent=Thw(frames, 64, 64),
            dtype="bfloat16",
        )
        for world, stage, sp, copies, recompute, frames in rows
    ]


def main() -> None:
    """Prints one row per layout, as Markdown."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--depth", type=int, default=28, help="blocks; fewer are faster")
    parser.add_argument("--out", type=Path, help="JSON of the rows")
    parser.add_argument("--page", type=Path, help="Markdown page whose table is replaced")
    args = parser.parse_args()
    lines, rows = [], []

    def say(line: str) -> None:
        print(line, flush=True)
        lines.append(line)

    say(f"STDiT-XL/2 of {args.depth} blocks, bfloat16, 512 x 512 pixels, one sample a rank; GiB; torch {torch.__version__}.\n")
    say(
        "| ranks | ZeRO | sp | copies | recompute | frames | weights, moments, EMA | activations | peak | simulated "
        "| formula / simulated |"
    )
    say("|" + " ---: |" * 11)
    for case in cases(args.depth):
        formula, measured = estimate(case), simulate_step(case)
        parallel, held = case.parallel, formula.parameters + formula.optimizer + formula.ema
        say(
            f"| {case.world} | {parallel.zero.stage} | {parallel.sp.degree} | {parallel.dp_replicate} | {parallel.recompute} | "
            f"{case.latent.t} | {held / GIB:.2f} | {formula.activations / GIB:.2f} | {formula.total / GIB:.2f} | "
            f"{measured.peak / GIB:.2f} | {formula.total / measured.peak:.3f} |"
        )
        rows.append({"case": repr(case), "formula": asdict(formula), "total": formula.total, "simulated": asdict(measured)})
    if args.out:
        write_json(args.out, {"torch": torch.__version__, "depth": args.depth, "rows": rows})
    if args.page:
        write_table(args.page, "\n".join(lines))


if __name__ == "__main__":
    main()
