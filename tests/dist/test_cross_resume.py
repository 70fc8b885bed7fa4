"""A run goes on under any other backend, stage, number of ranks, sp degree and accumulation: the same tensors, the same samples."""

from __future__ import annotations

import math
import os
import re
from collections import Counter
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from unittest import mock

import promises
import pytest
import torch
from dataset_factory import write_dataset
from torch.distributed.tensor import DTensor
from training import GLOBAL_BATCH, SAMPLES, assert_same_tensors, events, metrics, overrides, tensors, train_here

from opensora_dist.checkpoint.store import read_tensors
from opensora_dist.models.init import assign_weights
from opensora_dist.recipes import build
from opensora_dist.train import loop, saving

PAGE = Path(__file__).parents[2] / "docs/cross_resume.md"

# float32: ranks, accumulation and backends sum in another order, and AdamW makes a step of about lr of a gradient that is all rounding.
TOLERANCE = 2e-5


@dataclass(frozen=True)
class Backend:
    """Who holds what."""

    name: str
    stage: int

    def __str__(self) -> str:
        return f"{self.name} {self.stage}"


@dataclass(frozen=True)
class Leg:
    """A part of a run."""

    world: int
    sp: int
    accum: int
    steps: int = 2

    def __str__(self) -> str:
        return f"{self.world} ranks, sp {self.sp}, accumulation {self.accum}"


BACKENDS = [Backend(name, stage) for name in ("native", "deepspeed") for stage in range(4)]
# The first and third under one backend, the second and fourth under the other.
CHAIN = [Leg(world=4, sp=2, accum=2), Leg(world=2, sp=1, accum=1), Leg(world=1, sp=1, accum=4), Leg(world=4, sp=1, accum=1)]
STEPS = sum(leg.steps for leg in CHAIN)

PAIRS = list(product(BACKENDS, BACKENDS))
# Each backend and stage once, with another stage of the other library: it reads what that wrote, and the other way round.
QUICK = [(BACKENDS[one], BACKENDS[other]) for one, other in ((0, 5), (1, 4), (2, 7), (3, 6))]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    path = tmp_path_factory.mktemp("cross") / "data"
    write_dataset(path, samples=SAMPLES)
    return path


@pytest.fixture(scope="module")
def whole(ranks, data, tmp_path_factory):
    """The run that was never stopped, on one rank: its directory, and the samples of each step."""
    run_dir = tmp_path_factory.mktemp("whole")
    ((samples, _),) = ranks.run(_leg, _args(data, run_dir, BACKENDS[0], Leg(world=1, sp=1, accum=1), upto=STEPS), world=1)
    return run_dir, {step: Counter(keys) for step, keys in samples.items()}


def _args(data, run_dir, backend, leg, *, upto):
    return overrides(
        data,
        run_dir,
        f"run.steps={upto}",
        f"parallel.zero.backend={backend.name}",
        f"parallel.zero.stage={backend.stage}",
        f"parallel.sp.degree={leg.sp}",
        f"parallel.grad_accum={leg.accum}",
        "optim.weight_decay=0.01",
    )


def _leg(args):
    """One rank's part of a leg: the keys of the samples that it saw, by step; and names of tensors that were not loaded exactly."""
    seen, inexact = {}, []
    with ExitStack() as stack:
        stack.enter_context(_weights_drawn())
        stack.enter_context(_samples_noted(seen))
        stack.enter_context(_loads_compared(inexact))
        train_here(args)
    return seen, inexact


@contextmanager
def _weights_drawn():
    """Every parameter is drawn: gates that start at zero would hide what is behind them."""
    real = build.init_weights

    def init_weights(model, keys):
        real(model, keys)
        g = torch.Generator().manual_seed(7)
        shapes = sorted((name, p.shape) for name, p in model.named_parameters())
        assign_weights(model, {name: torch.randn(shape, generator=g) * 0.1 for name, shape in shapes})

    with mock.patch.object(build, "init_weights", init_weights):
        yield


@contextmanager
def _samples_noted(seen):
    real = loop.train_step

    def train_step(backend, data, **kwargs):
        seen[data.step] = [key for micro in data.micros for key in micro.keys]
        return real(backend, data, **kwargs)

    with mock.patch.object(loop, "train_step", train_step):
        yield


@contextmanager
def _loads_compared(inexact):
    """Holds what a backend has after a load, gathered from all ranks, against the files."""
    real = saving.Saver.load

    def load(self, folder, backend, ema, **kwargs):
        state = real(self, folder, backend, ema, **kwargs)
        held = {n: t.full_tensor() if isinstance(t, DTensor) else t for n, t in backend.state_dict(ema=ema.shadow).items()}
        stored = read_tensors(folder / saving.TENSORS_DIR)
        inexact.extend(sorted(held.keys() ^ stored.keys()))
        inexact.extend(n for n, t in held.items() if n in stored and not torch.equal(t.cpu(), stored[n]))
        if backend.optimizer_steps() != state.optimizer_steps:
            inexact.append("optimizer_steps")
        return state

    with mock.patch.object(saving.Saver, "load", load):
        yield


@dataclass
class Found:
    """Of one chain, the largest differences from the run that was never stopped: of a loss, right after a resume and anywhere."""

    next_loss: float = 0.0
    loss: float = 0.0
    weights: float = 0.0


def _follow(ranks, data, whole, run_dir, pair):
    """Runs a chain; fails where a load is not exact, or a sample is lost or seen twice."""
    whole_dir, whole_samples = whole
    upto, samples = 0, {}
    for number, leg in enumerate(CHAIN):
        upto += leg.steps
        by_rank = ranks.run(_leg, _args(data, run_dir, pair[number % 2], leg, upto=upto), world=leg.world)
        assert [inexact for _, inexact in by_rank] == [[]] * leg.world, (number, by_rank)
        for step in range(upto - leg.steps, upto):
            # Ranks that share samples are next to each other; each has the keys of all of its group.
            samples[step] = Counter(key for seen, _ in by_rank[:: leg.sp] for key in seen[step])
    assert samples == whole_samples
    assert all(sum(keys.values()) == GLOBAL_BATCH for keys in samples.values())
    assert [e["step"] for e in events(run_dir, "resume")] == [sum(leg.steps for leg in CHAIN[:n]) for n in range(1, len(CHAIN))]
    ours, theirs = metrics(run_dir), metrics(whole_dir)
    for name in ("step", "batch_digest", "samples", "tokens", "epoch"):
        assert [m[name] for m in ours] == [m[name] for m in theirs], name
    found = Found()
    after_resume = {sum(leg.steps for leg in CHAIN[:n]) + 1 for n in range(1, len(CHAIN))}
    for one, other in zip(ours, theirs, strict=True):
        error = abs(one["loss"] - other["loss"]) / abs(other["loss"])
        found.loss = max(found.loss, error)
        if one["step"] in after_resume:
            found.next_loss = max(found.next_loss, error)
    mine, others = tensors(run_dir), tensors(whole_dir)
    assert mine.keys() == others.keys()
    parameters = [n for n in mine if n.startswith("model.")]
    found.weights = max(float((mine[n] - others[n]).norm() / (others[n].norm() + 1e-12)) for n in parameters)
    return found


def _id(pair):
    return "->".join(map(str, pair)).replace(" ", "-")


@pytest.mark.parametrize("pair", QUICK, ids=_id)
def test_a_run_goes_on_under_another_backend_and_layout_with_the_same_tensors_and_samples(
    ranks, data, whole, tmp_path, pair, promise
):
    found = _follow(ranks, data, whole, tmp_path, pair)
    assert found.loss <= TOLERANCE, found
    promise(promises.ELSEWHERE).measured(f"losses within {TOLERANCE:.0e}, tensors bitwise as saved, samples of each step equal")


def test_on_the_same_layout_two_legs_are_one_bitwise(ranks, data, tmp_path):
    leg = Leg(world=2, sp=1, accum=1)
    for backend in (Backend("native", 3), Backend("deepspeed", 2)):
        one, two = tmp_path / f"one-{backend}", tmp_path / f"two-{backend}"
        ranks.run(_leg, _args(data, one, backend, leg, upto=4), world=2)
        for upto in (2, 4):
            ranks.run(_leg, _args(data, two, backend, leg, upto=upto), world=2)
        assert [m["loss"] for m in metrics(one)] == [m["loss"] for m in metrics(two)]
        assert_same_tensors(tensors(one), tensors(two))


# --- the table


def _row(one, found):
    return f"| {one} | " + " | ".join(f"{found[one, other].next_loss:.0e}" for other in BACKENDS) + " |"


def _table(found):
    """Largest relative difference of the loss right after a resume, by the backends of a chain."""
    head = "| legs 1 and 3 | " + " | ".join(f"legs 2 and 4: {other}" for other in BACKENDS) + " |"
    return "\n".join([head, "| --- " * (len(BACKENDS) + 1) + "|", *(_row(one, found) for one in BACKENDS)])


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_every_pair_of_backends_goes_on_from_the_other_and_is_what_the_docs_list(ranks, data, whole, tmp_path):
    """Writes the docs' table into the file that OPENSORA_CROSS_RESUME_TABLE names, if it does."""
    found = {}
    for pair in PAIRS:
        found[pair] = _follow(ranks, data, whole, tmp_path / _id(pair), pair)
        assert found[pair].loss <= TOLERANCE, (pair, found[pair])
    if path := os.environ.get("OPENSORA_CROSS_RESUME_TABLE"):
        head, end = "<!-- the table below is written by the test -->\n", "<!-- end of the table -->"
        text = Path(path).read_text()
        Path(path).write_text(f"{text.split(head)[0]}{head}\n{_table(found)}\n\n{end}{text.split(end)[1]}")


def test_the_table_in_the_docs_has_every_pair():
    rows = re.findall(r"^\| ((?:native|deepspeed) \d) \| (.*) \|$", PAGE.read_text(), re.MULTILINE)
    assert [name for name, _ in rows] == [str(backend) for backend in BACKENDS]
    cells = [cell for _, row in rows for cell in row.split(" | ")]
    errors = [float(cell) for cell in cells if cell != "not run"]
    assert len(cells) == len(PAIRS) and all(math.isfinite(error) and error <= TOLERANCE for error in errors)
    # The page says how many are still to be run; a table made anew has none.
    left = cells.count("not run")
    assert not left or f"{left} have not been run here yet" in " ".join(PAGE.read_text().split())


def test_the_quick_pairs_have_every_backend_with_the_other_library():
    assert {backend for pair in QUICK for backend in pair} == set(BACKENDS)
    assert all(one.name != other.name for one, other in QUICK)
