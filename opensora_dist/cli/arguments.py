"""The arguments every verb with a config takes: one YAML file, which may be left out, and ``section.key=value`` overrides."""

from __future__ import annotations

import argparse
import re
from pathlib import Path
from typing import Any, get_args

from opensora_dist.config.train import SpConfig
from opensora_dist.core.errors import ConfigError
from opensora_dist.core.types import Thw

_OVERRIDE = re.compile(r"[A-Za-z_][\w.]*=")


def add_config_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds ``[CONFIG] [section.key=value ...]``."""
    parser.add_argument(
        "config",
        nargs="*",
        metavar="CONFIG | section.key=value",
        help="a YAML file (`extends: OTHER.yaml` in it names a parent), then overrides, in order; their values are YAML",
    )


def config_of(args: argparse.Namespace) -> Path | None:
    """The file, or None where the first argument is an override already."""
    return Path(args.config[0]) if args.config and not _OVERRIDE.match(args.config[0]) else None


def overrides_of(args: argparse.Namespace) -> list[str]:
    """Everything after the file."""
    return list(args.config if config_of(args) is None else args.config[1:])


def add_sampling_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the checkpoint and how to draw from it."""
    parser.add_argument(
        "checkpoint", type=Path, metavar="CKPT", help="a run directory, its checkpoints folder, or one step folder"
    )
    parser.add_argument("--clip", metavar="TxHxW", help="frames, height and width in pixels (default: as trained)")
    parser.add_argument("--sampler", choices=["ddpm", "ddim", "dpm_solver", "flow_euler"], help="default: the objective's")
    # No defaults of these here: SamplingOptions has them, and importing it for every --help would load torch.
    parser.add_argument("--steps", type=int, help="model evaluations per video (default 30)")
    parser.add_argument("--cfg-scale", type=float, help="classifier-free guidance; 1 turns it off (default 3.0)")
    parser.add_argument("--guided-channels", type=int, help="guide the first N latent channels only (Open-Sora 1.0: 3)")
    parser.add_argument("--seed", type=int, default=0, help="default 0")
    parser.add_argument("--batch", type=int, default=8, help="videos drawn at once; changes speed only (default 8)")
    parser.add_argument("--weights", choices=["ema", "model"], default="ema", help="averaged (default) or raw weights")
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto", help="default auto")
    parser.add_argument(
        "--nproc", type=int, default=1, metavar="N", help="ranks of this machine that share each video (default 1, or torchrun's)"
    )
    schemes = [name for name in get_args(SpConfig.model_fields["scheme"].annotation) if name != "auto"]
    parser.add_argument("--scheme", choices=schemes, help="how they share it (default: as the run, or the one with fewest bytes)")


def sampling_options(args: argparse.Namespace) -> dict[str, Any]:
    """What ``add_sampling_arguments`` parsed, as keywords of the recipes.

    Raises:
        ConfigError: All arguments that are out of range.
    """
    from opensora_dist.train.generate import SamplingOptions

    given = {name: value for name in ("steps", "cfg_scale") if (value := getattr(args, name)) is not None}
    options = SamplingOptions(sampler=args.sampler, guided_channels=args.guided_channels, **given)
    problems = []
    for flag, value in (("steps", options.steps), ("batch", args.batch), ("nproc", args.nproc)):
        if value < 1:
            problems.append(f"--{flag}={value} must be at least 1")
    if options.cfg_scale < 1:
        problems.append(f"--cfg-scale={options.cfg_scale} must be at least 1, which turns guidance off")
    if args.seed < 0:
        problems.append(f"--seed={args.seed} must be 0 or more")
    clip = None
    if args.clip is not None:
        try:
            clip = parse_clip(args.clip)
        except ConfigError as error:
            problems += error.problems
    if problems:
        raise ConfigError(problems)
    return {
        "clip": clip,
        "options": options,
        "seed": args.seed,
        "batch": args.batch,
        "device": args.device,
        "weights": args.weights,
        "scheme": args.scheme,
    }


def start_ranks(args: argparse.Namespace) -> int | None:
    """``recipes.sharing.start_ranks`` for the command that was parsed: the exit code, or None where this process does the work."""
    from opensora_dist.recipes import sharing

    given = {name: value for name, value in sampling_options(args).items() if name in ("clip", "options", "device", "scheme")}
    return sharing.start_ranks(args.argv, nproc=args.nproc, checkpoint=args.checkpoint, **given)


def parse_clip(text: str) -> Thw:
    """``16x64x96`` to frames, height, width.

    Raises:
        ConfigError: It is not three whole numbers of 1 or more.
    """
    match = re.fullmatch(r"(\d+)x(\d+)x(\d+)", text)
    if not match or "0" in match.groups():
        raise ConfigError(f"clip {text!r} is not FRAMESxHEIGHTxWIDTH, each 1 or more; write e.g. 16x64x64")
    return Thw(*map(int, match.groups()))
