"""``opensora-dist plan``: what a run will take, before GPUs are booked."""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path
from typing import Any

from opensora_dist.cli.arguments import add_config_arguments, config_of, overrides_of
from opensora_dist.core.errors import ConfigError
from opensora_dist.core.types import Thw


def add_parser(verbs: Any) -> None:
    """Adds the verb."""
    parser = verbs.add_parser(
        "plan",
        help="memory, time and money of a run on GPUs that aren't here",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description=(
            "Say which layouts of a run fit a number of GPUs, how long a step takes in each, what the run will cost, and why the others\n"
            "don't fit. Nothing is run.\n\n"
            "  opensora-dist plan configs/train/open_sora_1_0_64x512x512.yaml --gpus 64 --gpu h800 --latent 64x64x64\n"
            "  opensora-dist plan CONFIG data.global_batch=512 --gpus 512 --gpu h100 --dollars-per-gpu-hour 2.5 --json"
        ),
    )
    add_config_arguments(parser)
    parser.add_argument("--gpus", type=int, required=True, metavar="N", help="all of them")
    parser.add_argument("--gpu", required=True, metavar="NAME", help="a100, a800, h800, h100, h200, b200, ...")
    parser.add_argument("--per-node", type=int, default=8, metavar="N", help="GPUs of a node (default 8)")
    parser.add_argument(
        "--network-gbit", type=float, default=400.0, metavar="G", help="network of each GPU to other nodes, Gbit/s (default 400)"
    )
    parser.add_argument("--latent", metavar="TxHxW", help="of a sample (default: the largest of the config's data set)")
    parser.add_argument(
        "--use",
        type=float,
        metavar="SHARE",
        help="of the GPU's peak that a step reaches (default: measured, or else 0.45, assumed)",
    )
    parser.add_argument(
        "--measured",
        type=Path,
        metavar="PATH",
        help="steps that `bench step` timed on such a GPU, a file or a folder (default: benchmarks/results/GPU, where that is)",
    )
    parser.add_argument(
        "--dollars-per-gpu-hour", type=float, metavar="D", help="what a GPU costs; without it no money is reckoned"
    )
    parser.add_argument("--json", action="store_true", help="print all layouts as JSON")
    parser.set_defaults(run=_run)


def _run(args: argparse.Namespace) -> int:
    from opensora_dist.recipes.plan import PlanOptions, plan, record, show

    options = PlanOptions(
        gpu=args.gpu,
        gpus=args.gpus,
        per_node=args.per_node,
        network_gbit=args.network_gbit,
        latent=_latent(args.latent),
        use=args.use,
        measured=args.measured,
        dollars=args.dollars_per_gpu_hour,
    )
    made = plan(config_of(args), overrides=overrides_of(args), options=options)
    if args.json:
        print(json.dumps(record(made)))
    else:
        show(made)
    return 0 if made.totals is not None else 1


def _latent(text: str | None) -> Thw | None:
    if text is None:
        return None
    match = re.fullmatch(r"(\d+)x(\d+)x(\d+)", text)
    if not match or "0" in match.groups():
        raise ConfigError(f"--latent {text!r} is not FRAMESxHEIGHTxWIDTH, each 1 or more; write e.g. 64x64x64")
    return Thw(*map(int, match.groups()))
