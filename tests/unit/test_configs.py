"""Recipes load, and the docs say nothing that isn't there: commands parse, files and tests named exist, tables are complete."""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import re
import shlex
import sys
from pathlib import Path

import pytest
import torch

from opensora_dist.cli.arguments import config_of, overrides_of
from opensora_dist.cli.main import _VERBS
from opensora_dist.cli.submit import parse_command
from opensora_dist.codecs.registry import build_codec
from opensora_dist.config.bench import SWEEPS, sweep_problems
from opensora_dist.config.codec import DctCodecConfig
from opensora_dist.config.load import load_config
from opensora_dist.config.prepare import PrepareConfig
from opensora_dist.config.rules import prepare_problems, train_problems
from opensora_dist.config.site import load_site
from opensora_dist.config.train import TrainConfig
from opensora_dist.core.index import COLUMNS
from opensora_dist.core.types import Thw
from opensora_dist.diffusion.registry import build_objective
from opensora_dist.models.base import ModelIo
from opensora_dist.models.registry import build_model
from opensora_dist.observe.metrics import StepMetrics
from opensora_dist.parallel.sequence.layout import scheme_problems

ROOT = Path(__file__).parents[2]
PREPARE = sorted(ROOT.glob("configs/prepare/*.yaml"))
TRAIN = sorted(ROOT.glob("configs/train/*.yaml"))
SITE = sorted(ROOT.glob("configs/site/*.yaml"))
BENCH = sorted(ROOT.glob("configs/bench/*.yaml"))
DOCS = [*sorted(ROOT.glob("*.md")), *sorted(ROOT.glob("docs/*.md"))]
BENCHMARKS = ROOT / "benchmarks/README.md"
LONG = "open_sora_1_0_64x512x512.yaml"
PUBLISHED = ("open_sora_1_0_stage2_16x256x256.yaml", "open_sora_1_0_stage3_16x512x512.yaml")


def _name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def test_every_recipe_is_of_a_known_kind():
    assert {*PREPARE, *TRAIN, *SITE, *BENCH} == set(ROOT.glob("configs/**/*.yaml"))
    assert len(PREPARE) > 3 and len(TRAIN) > 2 and len(SITE) > 3


@pytest.mark.parametrize("path", [*PREPARE, *TRAIN, *SITE, *BENCH], ids=_name)
def test_a_recipe_starts_by_saying_what_it_is_for(path):
    assert path.read_text().startswith("# ")


@pytest.mark.parametrize("path", PREPARE, ids=_name)
def test_a_preparation_recipe_lacks_nothing_but_its_folders(path, tmp_path):
    overrides = [f"input.path={tmp_path}", f"output.path={tmp_path}"]
    config = load_config(PrepareConfig, path, overrides=overrides, rules=prepare_problems)
    if isinstance(config.codec, DctCodecConfig):
        codec = build_codec(config.codec, device=torch.device("cpu"))
        for bucket in config.clip.buckets:
            codec.latent_shape(Thw(*bucket))


@pytest.mark.parametrize("path", TRAIN, ids=_name)
def test_a_training_recipe_lacks_nothing_but_data_and_weights(path, tmp_path):
    overrides = [f"data.path={tmp_path}"]
    if load_config(TrainConfig, path).model.init_from is not None:
        weights = tmp_path / "weights.safetensors"
        weights.touch()
        overrides.append(f"model.init_from.path={weights}")
    world = 64 if path.name in (*PUBLISHED, LONG) else 1
    load_config(TrainConfig, path, overrides=overrides, rules=lambda config: train_problems(config, world=world))


@pytest.mark.parametrize("name, latent", list(zip(PUBLISHED, (Thw(16, 32, 32), Thw(16, 64, 64)))))
def test_the_published_recipes_train_the_published_model(name, latent):
    config = load_config(TrainConfig, ROOT / "configs/train" / name)
    objective = build_objective(config.objective, spatial_factor=8)
    io = ModelIo(in_channels=4, out_channels=4 * objective.channel_multiplier, text_width=4096, max_tokens=120)
    with torch.device("meta"):
        model = build_model(config.model, io)
    assert sum(p.numel() for p in model.parameters()) == 759_620_768
    assert model.token_grid(latent) == Thw(16, latent.h // 2, latent.w // 2)
    assert (config.optim.lr, config.optim.clip_norm, config.optim.ema_decay, config.optim.weight_decay) == (
        2e-5,
        1.0,
        0.9999,
        0.0,
    )
    assert (config.data.global_batch, config.parallel.zero.stage, config.run.dtype) == (512, 2, "bfloat16")


def test_the_recipe_of_long_videos_cuts_their_tokens_into_eight_parts_by_the_rules_of_its_scheme():
    config = load_config(TrainConfig, ROOT / "configs/train" / LONG)
    with torch.device("meta"):
        model = build_model(config.model, ModelIo(in_channels=4, out_channels=8, text_width=4096, max_tokens=120))
    grid, sp = model.token_grid(Thw(64, 64, 64)), config.parallel.sp
    assert grid == Thw(64, 32, 32) and sp.degree == 8 and config.parallel.recompute == "full"
    assert not scheme_problems(sp, grid, heads=config.model.shape.heads, joint=False)


# --- docs


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(exit_on_error=False)
    verbs = parser.add_subparsers(dest="verb", required=True)
    for verb in _VERBS:
        importlib.import_module(f"opensora_dist.cli.{verb}").add_parser(verbs)
    return parser


def _commands(path: Path) -> list[str]:
    """Our commands in fenced blocks of a page, or in the comments of a recipe, without the program's own name."""
    text = path.read_text()
    if path.suffix == ".md":
        lines = [line for block in re.findall(r"```sh\n(.*?)```", text, flags=re.DOTALL) for line in block.splitlines()]
    else:
        lines = [line.removeprefix("#   ") for line in text.splitlines() if line.startswith("#   ")]
    ours = (
        r"(?:opensora-dist|torchrun .*-m opensora_dist|docker run .* opensora-dist|launch/torchrun\.sh(?: --[\w-]+[ =]\S+)*) (.*)"
    )
    found = [re.match(ours, line.strip()) for line in lines]
    return [match[1] for match in found if match]


COMMANDS = [
    (_name(path), command) for path in (*DOCS, BENCHMARKS, *PREPARE, *TRAIN, *SITE, *BENCH) for command in _commands(path)
]


def test_commands_are_found_in_every_place_that_should_have_some():
    assert {"README.md", "docs/toy.md", "docs/parallel.md", *map(_name, (*PREPARE, *TRAIN, *SITE, *BENCH))} <= {
        page for page, _ in COMMANDS
    }


@pytest.mark.parametrize("page, command", COMMANDS, ids=lambda value: value[:60])
def test_a_command_in_the_docs_parses_and_its_files_and_keys_exist(page, command):
    words = shlex.split(command, comments=True)
    if {"--help", "--version"} & set(words):
        return
    args = _parser().parse_args(words)
    if getattr(args, "sweep", None) is not None:
        load_config(SWEEPS[args.action], ROOT / args.sweep, rules=sweep_problems)
    if args.verb == "submit":
        load_site(ROOT / args.site if args.site else None)
        words = args.command[args.command[0] == "--" :]
        assert parse_command(words).words == tuple(words)
        args = _parser().parse_args(words)
    if not hasattr(args, "config") or "run.nmae=x" in words:  # the page on mistakes makes some
        return
    schema = PrepareConfig if args.verb == "data" else TrainConfig
    config = config_of(args)
    load_config(schema, ROOT / config if config else None, overrides=overrides_of(args))


@pytest.mark.parametrize("page", DOCS, ids=_name)
def test_files_functions_and_tests_named_in_the_docs_exist(page):
    text = page.read_text()
    missing = []
    for path, name in re.findall(r"`((?:opensora_dist|tests|configs|docs)/[\w/.]+\.\w+)(?:::(\w+))?`", text):
        if not (ROOT / path).is_file():
            missing.append(path)
        elif name and not re.search(rf"^def {name}\(", (ROOT / path).read_text(), flags=re.MULTILINE):
            missing.append(f"{path}::{name}")
    missing += [link for link in re.findall(r"\]\(([\w/.-]+)\)", text) if not (page.parent / link).exists()]
    assert not missing


def test_the_way_of_a_sample_names_functions_that_its_files_define():
    rows = [line.split("|")[2:4] for line in (ROOT / "CONTRIBUTING.md").read_text().splitlines() if line.startswith("| ")]
    steps = [(re.findall(r"`([\w/.]+\.py)`", files), re.findall(r"`(\w+)`", names)) for files, names in rows]
    steps = [step for step in steps if all(step)]
    assert len(steps) > 20
    for files, names in steps:
        code = "\n".join((ROOT / file).read_text() for file in files)
        assert not [n for n in names if not re.search(rf"^\s*def {n}\(", code, flags=re.MULTILINE)], (files, names)


def test_the_index_and_the_metrics_are_documented_column_by_column():
    columns = set(re.findall(r"`(\w+)`", (ROOT / "docs/data-format.md").read_text()))
    assert {*COLUMNS.names} <= columns
    layout = (ROOT / "README.md").read_text().split("## A run directory")[1]
    assert not [name for name in StepMetrics.__dataclass_fields__ if name != "extra" and name not in layout]


def test_the_parity_table_lists_the_layouts_that_are_tested():
    spec = importlib.util.spec_from_file_location("trajectory", ROOT / "tests/dist/test_trajectory.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["trajectory"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    rows = [
        tuple(cell.strip(" `") for cell in line.split("|")[1:-1])
        for line in (ROOT / "docs/parallel.md").read_text().splitlines()
        if line.startswith("| `dp")
    ]
    wanted = [
        (
            str(layout),
            *map(str, (layout.world, layout.sp, layout.scheme if layout.sp > 1 else "", layout.stage, layout.accum)),
            str(layout.dp_replicate),
            " and ".join(layout.models),
        )
        for layout in module.LAYOUTS
    ]
    assert rows == wanted
