"""What a scheduler is to run: a command of this program, checked for the ranks it will have, with everything it needs in one config."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from opensora_dist.config.base import Section
from opensora_dist.config.load import Problem, dump_yaml, expand, load_config
from opensora_dist.config.prepare import PrepareConfig
from opensora_dist.config.rules import prepare_problems
from opensora_dist.config.train import TrainConfig
from opensora_dist.core.errors import ConfigError
from opensora_dist.core.layout import CONFIG_NAME
from opensora_dist.core.urls import is_remote
from opensora_dist.launch.job import Kind
from opensora_dist.launch.records import LAUNCH_DIR
from opensora_dist.recipes.checks import submitted_problems

S = TypeVar("S", bound=Section)
_PATHS = ("path", "layout", "network", "nvme_path", "clip_model", "aesthetic_head", "model", "words", "save")


@dataclass(frozen=True, kw_only=True)
class Command:
    """``opensora-dist train ...``, ``data prepare ...`` or ``bench ...``, as it was typed and parsed.

    Args:
        kind: Which of them.
        words: As typed.
        config: Its config file, if it has one.
        overrides: Of that.
        out: Of a benchmark: where results go.
        paths: Those of its words that name files or folders.
        part: ``--part`` of a preparation.
    """

    kind: Kind
    words: tuple[str, ...]
    config: Path | None = None
    overrides: tuple[str, ...] = ()
    out: Path | None = None
    paths: tuple[str, ...] = ()
    part: str | None = None


@dataclass(frozen=True, kw_only=True)
class Machines:
    """How much is asked for; each number at least what a job can have."""

    nodes: int
    gpus_per_node: int
    ranks_per_node: int
    array: int | None


@dataclass(frozen=True, kw_only=True)
class Payload:
    """A command that can be handed on.

    Args:
        name: Of the run, for people.
        run_dir: Of the run, absolute.
        words: What comes before the config's path, or everything where there is none.
        config_text: The resolved config; None where there is none.
        rounds: As of ``Job``.
        warnings: What can't be known here, or is not so here.
    """

    name: str
    run_dir: Path
    words: tuple[str, ...]
    config_text: str | None
    rounds: int
    warnings: tuple[str, ...]

    def argv(self, folder: Path) -> tuple[str, ...]:
        """Of ``opensora-dist``, with the config in ``folder``."""
        return self.words if self.config_text is None else (*self.words, str(folder / CONFIG_NAME))


def load_payload(command: Command, machines: Machines, *, more: Callable[[Payload], list[str]]) -> Payload:
    """Checks and resolves a command.

    Args:
        more: Further problems of what came of it, so that all are said at once.
    Raises:
        ConfigError: Every problem.
    """
    if command.kind == "train":
        return _training(command, machines, more)
    if command.kind == "prepare":
        return _preparation(command, machines, more)
    return _benchmark(command, machines, more)


def _training(command: Command, machines: Machines, more: Callable[[Payload], list[str]]) -> Payload:
    def problems(config: TrainConfig) -> list[Problem]:
        found = submitted_problems(
            config,
            nodes=machines.nodes,
            ranks_per_node=machines.ranks_per_node,
            gpus_per_node=machines.gpus_per_node,
        )
        if machines.array is not None:
            message = f"--array {machines.array} is of `data prepare`, whose parts need nothing of each other; leave it out"
            found.append(Problem(fields=(), message=message))
        return found

    def payload(config: TrainConfig, warnings: Sequence[str]) -> Payload:
        # On a node whose driver is broken, `auto` would train on the CPU.
        device = "cuda" if machines.gpus_per_node else "cpu"
        run_dir = _absolute(config.run.dir)
        run = config.run.model_copy(update={"dir": str(run_dir), "device": device})
        resolved = _with_absolute_paths(config).model_copy(update={"run": run})
        return Payload(
            name=config.run.name,
            run_dir=run_dir,
            words=("train",),
            config_text=dump_yaml(resolved),
            rounds=1,
            warnings=tuple(warnings),
        )

    return _resolved(TrainConfig, command, problems, payload, about=("run.dir", "run.name"), more=more)


def _preparation(command: Command, machines: Machines, more: Callable[[Payload], list[str]]) -> Payload:
    def problems(config: PrepareConfig) -> list[Problem]:
        found = prepare_problems(config)
        if machines.nodes > 1 or machines.ranks_per_node > 1:
            message = (
                f"`data prepare` on {machines.nodes} nodes x {machines.ranks_per_node} ranks: it is one process with one GPU at most; use "
                "--nodes 1 --gpus-per-node 1, and --array N to prepare N parts at once"
            )
            found.append(Problem(fields=(), message=message))
        if command.part is not None and machines.array is not None:
            message = f"--part {command.part} with --array {machines.array}, whose jobs take a part each; leave out one of them"
            found.append(Problem(fields=(), message=message))
        return found

    def payload(config: PrepareConfig, warnings: Sequence[str]) -> Payload:
        output, part = _absolute(config.output.path or ""), command.part
        resolved = _with_absolute_paths(config)
        resolved = resolved.model_copy(update={"output": resolved.output.model_copy(update={"path": str(output)})})
        several = machines.array is not None and config.filter.duplicates is not None
        return Payload(
            name="prepare",
            # Parts that are submitted one by one are runs of their own.
            run_dir=output if part is None else output / LAUNCH_DIR / f"part-{part.replace('/', '-of-')}",
            words=("data", "prepare", *([] if part is None else ["--part", part])),
            config_text=dump_yaml(resolved),
            rounds=2 if several else 1,
            warnings=tuple(warnings),
        )

    return _resolved(PrepareConfig, command, problems, payload, about=("output.path",), more=more)


def _benchmark(command: Command, machines: Machines, more: Callable[[Payload], list[str]]) -> Payload:
    problems = []
    if machines.array is not None:
        problems.append(f"--array {machines.array} is of `data prepare`; leave it out")
    if command.out is None:
        problems.append("the benchmark has no --out, where its results and what is submitted are kept; add --out DIR")
        raise ConfigError(problems)
    words = tuple(str(Path(word).absolute()) if word in command.paths else word for word in command.words)
    payload = Payload(name="bench", run_dir=command.out.absolute(), words=words, config_text=None, rounds=1, warnings=())
    problems += more(payload)
    if problems:
        raise ConfigError(problems)
    return payload


def _resolved(
    schema: type[S],
    command: Command,
    problems: Callable[[S], list[Problem]],
    payload: Callable[[S, Sequence[str]], Payload],
    *,
    about: tuple[str, ...],
    more: Callable[[Payload], list[str]],
) -> Payload:
    """Problems that another machine may not have are warnings here.

    Args:
        about: The fields that ``more`` looks at.
    """
    warnings: list[str] = []

    def rules(config: S) -> list[Problem]:
        found = problems(config)
        warnings.extend(p.message for p in found if p.here)
        # Where one of its fields is wrong, a default stands in its place, of which nothing need be said.
        found += [Problem(fields=about, message=said) for said in more(payload(config, ()))]
        return [p for p in found if not p.here]

    config = load_config(schema, command.config, overrides=command.overrides, rules=rules)
    return payload(config, warnings)


def _absolute(path: str) -> Path:
    return expand(path).absolute()


def _with_absolute_paths(config: S) -> S:
    """What lies here is named so that it doesn't matter where it is read. A name of a hub stays, and ``$NAME``, which is the nodes' own."""
    values: dict[str, object] = {}
    for name in type(config).model_fields:
        value = getattr(config, name)
        if isinstance(value, Section):
            values[name] = _with_absolute_paths(value)
        elif isinstance(value, tuple) and value and all(isinstance(v, Section) for v in value):
            values[name] = tuple(_with_absolute_paths(v) for v in value)
        elif (
            name in _PATHS
            and isinstance(value, str)
            and not is_remote(value)
            and (value.endswith(".tar") or Path(value).exists())
        ):
            values[name] = str(Path(value).absolute())
    return config.model_copy(update=values)
