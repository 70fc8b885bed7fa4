"""Tiny training runs for tests: inside the ranks of ``rank_pool``, or in this process, and what they left in their run directory."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist

from opensora_dist.checkpoint.commit import resolve
from opensora_dist.checkpoint.store import read_tensors
from opensora_dist.config.load import load_config
from opensora_dist.config.train import TrainConfig
from opensora_dist.core.errors import OpensoraError
from opensora_dist.observe.jsonl import read_records
from opensora_dist.parallel.failures import lost_contact_said
from opensora_dist.parallel.mesh import build_mesh
from opensora_dist.recipes.train import train_rank
from opensora_dist.train import loop, saving, step

GLOBAL_BATCH = 4
# Two shapes, one of a single frame; counts that leave tails.
SAMPLES = {(3, 32, 48): 11, (1, 48, 32): 9}
MODEL = ["model.depth=2", "model.width=16", "model.heads=2"]
_QUICK = [
    *MODEL,
    "objective.name=rectified_flow",
    "objective.caption_dropout=0.3",
    f"data.global_batch={GLOBAL_BATCH}",
    "optim.lr=1e-3",
    "optim.ema_decay=0.9",
    "run.log_every=4",
    "run.device=cpu",
]


def overrides(data: Path, run_dir: Path, *more: str) -> list[str]:
    """The command line of a tiny run."""
    return [f"data.path={data}", f"run.dir={run_dir}", *_QUICK, *more]


def train_here(given: list[str], hook: Callable[..., Any] | None = None, *args: Any) -> None:
    """One rank of a run, in the process group of the caller. ``hook(*args)`` is a context manager that stays open around it."""
    config = load_config(TrainConfig, None, overrides=given)
    mesh = build_mesh(
        torch.device("cpu"), dp_replicate=config.parallel.dp_replicate, sp=config.parallel.sp, tp=config.parallel.tp, timeout_s=60
    )
    with lost_contact_said(timeout_s=60), hook(*args) if hook is not None else nullcontext():
        train_rank(config, mesh)


def refused(given: list[str], hook: Callable[..., Any] | None = None, *args: Any) -> str:
    """What a run that must fail says on this rank; ``hook`` as in ``train_here``."""
    try:
        train_here(given, hook, *args)
    except OpensoraError as error:
        return str(error)
    raise AssertionError("the run did not fail")


def signal_at(rank: int, at_step: int) -> Any:
    """Rank ``rank`` gets SIGTERM in the middle of a step."""
    real = loop.train_step

    def train_step(backend: Any, data: Any, **kwargs: Any) -> Any:
        if dist.get_rank() == rank and data.step == at_step:
            os.kill(os.getpid(), signal.SIGTERM)
        return real(backend, data, **kwargs)

    return mock.patch.object(loop, "train_step", train_step)


def signal_in_last_save(rank: int, last: int) -> Any:
    """Rank ``rank`` gets SIGTERM while the checkpoint of step ``last`` is written."""
    real = saving.Saver.begin

    def begin(self: Any, backend: Any, ema: Any, state: Any) -> None:
        if dist.get_rank() == rank and state.step == last:
            os.kill(os.getpid(), signal.SIGTERM)
        real(self, backend, ema, state)

    return mock.patch.object(saving.Saver, "begin", begin)


def nan_at(rank: int, at_step: int) -> Any:
    """Rank ``rank`` has a loss that is not a number in one step."""
    real = step.micro_loss

    def micro_loss(*args: Any, **kwargs: Any) -> Any:
        loss = real(*args, **kwargs)
        return loss * float("nan") if dist.get_rank() == rank and kwargs["step"] == at_step else loss

    return mock.patch.object(step, "micro_loss", micro_loss)


def metrics(run_dir: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl."""
    return read_records(run_dir / "metrics.jsonl")


def curve(run_dir: Path) -> list[tuple[Any, ...]]:
    """What must not depend on how a run came about, per step."""
    names = ("step", "loss", "grad_norm", "lr", "tokens", "epoch", "batch_digest", "skipped")
    return [tuple(m[n] for n in names) for m in metrics(run_dir)]


def losses(run_dir: Path) -> list[float]:
    """One per step."""
    return [m["loss"] for m in metrics(run_dir)]


def events(run_dir: Path, name: str) -> list[dict[str, Any]]:
    """Events of one name."""
    return [e for e in read_records(run_dir / "events.jsonl") if e["event"] == name]


def tensors(run_dir: Path) -> dict[str, torch.Tensor]:
    """Weights, moments and average of the newest checkpoint."""
    return read_tensors(resolve(run_dir) / "tensors")


def assert_same_tensors(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    """Bitwise."""
    assert one.keys() == other.keys()
    differ = [name for name in one if not torch.equal(one[name], other[name])]
    assert not differ, differ
