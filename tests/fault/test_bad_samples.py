"""Samples that can't be read: others take their places, on all ranks that share them; it is told once, counted, and has a limit."""

from __future__ import annotations

import shutil
from contextlib import ExitStack
from dataclasses import replace
from typing import Any
from unittest import mock

import numpy as np
import promises
import pytest
import torch
import torch.distributed as dist
from dataset_factory import write_dataset
from torch.distributed.tensor import DTensor, distribute_tensor
from training import assert_same_tensors, curve, events, losses, metrics, overrides, refused, tensors, train_here

from opensora_dist.config.train import SpConfig
from opensora_dist.core.io import read_json, write_json
from opensora_dist.data.index import Index, Place
from opensora_dist.data.order import Order
from opensora_dist.parallel.keys import Keys
from opensora_dist.parallel.mesh import build_mesh
from opensora_dist.parallel.sequence.agree import Agreement
from opensora_dist.recipes import train
from opensora_dist.train import loop, quarantine

LONG, STILL = (3, 32, 48), (1, 48, 32)
STEPS = 12
RUN = (f"run.steps={STEPS}", "run.dtype=float64", "checkpoint.every_steps=6", "optim.betas=[0.9,0.95]")
TP = ("parallel.tp=2",)
DSP = ("parallel.sp.degree=2", "parallel.sp.scheme=dsp")


def _randomise(model):
    """Every parameter: zeros would hide what a wrong sample does."""
    for name, tensor in model.state_dict().items():
        full = torch.empty(tensor.shape, dtype=tensor.dtype).normal_(std=0.1, generator=Keys(7).generator(f"test:{name}"))
        if isinstance(tensor, DTensor):
            full = distribute_tensor(full, tensor.device_mesh, tensor.placements, src_data_rank=None).to_local()
            tensor = tensor.to_local()
        tensor.copy_(full)


def _watched(kept: str, planned: str | None = None) -> Any:
    """All parameters random; the keys of what is trained on go to a file; ``planned`` names one that says what the plan is to be."""
    real, seen = loop.train_step, {}

    def train_step(backend: Any, data: Any, **kwargs: Any) -> Any:
        result = real(backend, data, **kwargs)
        seen[data.step] = [key for micro in data.micros for key in micro.keys]
        write_json(f"{kept}-{dist.get_rank()}.json", seen)
        return result

    stack = ExitStack()
    stack.enter_context(mock.patch.object(train, "initialiser", return_value=torch.no_grad()(_randomise)))
    stack.enter_context(mock.patch.object(loop, "train_step", train_step))
    if planned is not None:
        plan, batch = read_json(planned), Order.batch

        def rows(self: Order, step: int) -> Any:
            place = {key: row for row, key in enumerate(self._index.key)}
            return replace(batch(self, step), units=tuple((place[key],) for key in plan[str(step)]))

        stack.enter_context(mock.patch.object(Order, "batch", rows))
    return stack


def _end(place: Place) -> int:
    return place.offset + place.num_bytes


def _flip(index: Index, row: int, offset: int) -> None:
    content = bytearray(index.shard_path(row).read_bytes())
    content[offset] ^= 1
    index.shard_path(row).write_bytes(content)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    path = tmp_path_factory.mktemp("bad") / "whole"
    write_dataset(path, samples={LONG: 20, STILL: 16}, shard_samples=4)
    return path


@pytest.fixture(scope="module")
def damaged(whole):
    """One of each: a byte of the last frame of a sample (the second of two ranks has it), a byte of a text, a cut, a gone shard."""
    path = whole.with_name("damaged")
    shutil.copytree(whole, path)
    index = Index.open(path)
    long = [row for row in index.buckets[LONG] if index.shard[row] not in (2, 5)]
    _flip(index, long[0], _end(index.latents_place(long[0])) - 3)
    _flip(index, long[1], index.text_place(long[1]).offset)
    cut = max(index.latents_place(row).offset for row in np.flatnonzero(index.shard == 2)) + 7
    with open(path / index.shards[2].name, "r+b") as handle:
        handle.truncate(cut)
    (path / index.shards[5].name).unlink()
    ends = np.array([_end(index.text_place(row)) for row in range(len(index))])  # after the latents
    lost = (index.shard == 5) | ((index.shard == 2) & (ends > cut))
    lost[long[:2]] = True
    return path, {index.key[row] for row in np.flatnonzero(lost)}


def _told(run_dir):
    return {(e["step"], e["key"], e["shard"], e["substitute"]) for e in events(run_dir, "sample_quarantined")}


@pytest.fixture(scope="module")
def one_process(ranks, damaged, tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("one")
    ranks.run(train_here, overrides(damaged[0], run_dir, *RUN), _watched, str(run_dir / "keys"), world=1)
    return run_dir


def test_each_kind_of_damage_is_found_told_once_and_counted(one_process, damaged, promise):
    bad, counted = events(one_process, "sample_quarantined"), {m["step"]: m["bad_samples"] for m in metrics(one_process)}
    assert {e["key"] for e in bad} <= damaged[1]
    reasons = " ".join(e["reason"] for e in bad)
    for kind in ("latents, frame 2 at offset", "text at offset", "the file ends after", "No such file"):
        assert kind in reasons, kind
    assert len({(e["step"], e["key"]) for e in bad}) == len(bad)
    substitutes = {(e["step"], e["substitute"]) for e in bad}
    first = [e for e in bad if (e["step"], e["key"]) not in substitutes]
    assert counted == {step: sum(e["step"] == step for e in first) for step in range(1, STEPS + 1)}
    assert events(one_process, "end")[0]["bad_samples"] == len({e["key"] for e in bad})
    trained = read_json(f"{one_process / 'keys'}-0.json")
    assert not {key for keys in trained.values() for key in keys} & {e["key"] for e in bad if e["substitute"]}
    assert all(len(set(keys)) == len(keys) for keys in trained.values())
    promise(promises.BAD_SAMPLE).measured(f"{sum(counted.values())} replaced in {STEPS} steps: flipped, cut and gone")


def test_training_is_that_of_an_order_planned_with_the_substitutes_on_whole_data(ranks, whole, one_process, tmp_path):
    planned = f"{one_process / 'keys'}-0.json"
    ranks.run(train_here, overrides(whole, tmp_path, *RUN), _watched, str(tmp_path / "keys"), planned, world=1)
    assert not any(m["bad_samples"] for m in metrics(tmp_path))
    torch.testing.assert_close(losses(tmp_path), losses(one_process), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(tensors(tmp_path), tensors(one_process), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(
    "shared, stage",
    [
        pytest.param((), 0, id="dp2-0"),
        pytest.param((), 3, id="dp2-3", marks=pytest.mark.slow),
        pytest.param(("parallel.grad_accum=2",), 0, id="dp2-accum2-0", marks=pytest.mark.slow),
        pytest.param(("parallel.grad_accum=2",), 3, id="dp2-accum2-3"),
        pytest.param(DSP, 0, id="sp2-0", marks=pytest.mark.slow),
        pytest.param(DSP, 3, id="sp2-3"),
    ],
)
def test_two_ranks_take_the_same_substitutes_as_one_process(ranks, damaged, one_process, tmp_path, shared, stage, promise):
    args = overrides(damaged[0], tmp_path, *RUN, *shared, f"parallel.zero.stage={stage}")
    ranks.run(train_here, args, _watched, str(tmp_path / "keys"), world=2)
    assert _told(tmp_path) == _told(one_process)
    assert [m["bad_samples"] for m in metrics(tmp_path)] == [m["bad_samples"] for m in metrics(one_process)]
    torch.testing.assert_close(losses(tmp_path), losses(one_process), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(tensors(tmp_path), tensors(one_process), rtol=1e-10, atol=1e-10)
    trained, mine, other = (
        read_json(f) for f in (f"{one_process / 'keys'}-0.json", *(f"{tmp_path / 'keys'}-{r}.json" for r in (0, 1)))
    )
    assert trained == (mine if shared == DSP else {step: mine[step] + other[step] for step in mine}) and (mine == other) == (
        shared == DSP
    )
    if shared == DSP:
        frame = [
            e["rank"]
            for e in events(tmp_path, "sample_quarantined")
            if "latents, frame 2" in e["reason"] and "xxh3" in e["reason"]
        ]
        assert frame and set(frame) == {1}, "rank 0 has no part of what is damaged"
    promise(promises.BAD_SAMPLE).measured(
        f"{'sp' if shared == DSP else 'dp'} 2, stage {stage}: the losses of one process to 1e-10"
    )


@pytest.mark.parametrize("shared", [(), DSP, TP], ids=["dp2", "sp2", "tp2"])
def test_what_one_rank_alone_cant_read_is_replaced_on_all_that_share_it(ranks, whole, tmp_path, shared):
    args = overrides(whole, tmp_path, *RUN, *shared, "fault.bad_sample=1@step3", "parallel.zero.stage=2")
    ranks.run(train_here, args, _watched, str(tmp_path / "keys"), world=2)
    bad, trained = events(tmp_path, "sample_quarantined"), [read_json(f"{tmp_path / 'keys'}-{rank}.json") for rank in (0, 1)]
    assert (bad[0]["step"], bad[0]["rank"]) == (3, 1) and "fault.bad_sample" in bad[0]["reason"]
    assert len({e["key"] for e in bad}) == 1 and {e["rank"] for e in bad} == {1}
    assert {m["step"]: m["bad_samples"] for m in metrics(tmp_path)} == {
        s: sum(e["step"] == s for e in bad) for s in range(1, STEPS + 1)
    }
    if shared:
        assert trained[0] == trained[1]
    assert trained[1]["2"][0] == bad[0]["substitute"] != bad[0]["key"]


def test_a_resume_on_damaged_data_is_bitwise_the_run_that_went_on(ranks, damaged, tmp_path):
    for name, parts in (("whole", (STEPS,)), ("parts", (STEPS // 2, STEPS))):
        for steps in parts:
            args = overrides(damaged[0], tmp_path / name, *RUN, *DSP, "parallel.zero.stage=3", f"run.steps={steps}")
            ranks.run(train_here, args, _watched, str(tmp_path / f"{name}-keys"), world=2)
    assert curve(tmp_path / "parts") == curve(tmp_path / "whole")
    assert _told(tmp_path / "parts") == _told(tmp_path / "whole")
    assert_same_tensors(tensors(tmp_path / "parts"), tensors(tmp_path / "whole"))


@pytest.fixture
def flipped(whole, tmp_path):
    """Damage that sizes don't show: a byte of every other sample."""
    path = tmp_path / "flipped"
    shutil.copytree(whole, path)
    index = Index.open(path)
    for row in range(0, len(index), 2):
        _flip(index, row, index.latents_place(row).offset)
    return path


@pytest.mark.parametrize("limit", [0, 3])
def test_too_many_bad_samples_end_all_ranks_with_the_way_out_and_no_checkpoint_of_them(ranks, flipped, tmp_path, limit, promise):
    run_dir = tmp_path / "run"
    args = overrides(flipped, run_dir, *RUN, f"resilience.max_bad_samples={limit}", "run.log_every=100")
    for said in ranks.run(refused, args, _watched, str(tmp_path / "keys"), world=2):
        assert f"more than resilience.max_bad_samples={limit}" in said and "shard-0000" in said and "data prepare" in said
    assert [m["step"] for m in metrics(run_dir)] == list(range(1, 7))  # up to the save, which is not made
    assert not list((run_dir / "checkpoints").glob("step-*")) and events(run_dir, "sample_quarantined")
    promise(promises.BAD_SAMPLE).measured("over the limit: both ranks end before the next save")


def test_shards_that_lost_more_samples_than_the_limit_are_refused_at_the_start(ranks, damaged, tmp_path):
    for limit in (0, 2):
        args = overrides(damaged[0], tmp_path, *RUN, f"resilience.max_bad_samples={limit}")
        (said,) = ranks.run(refused, args, world=1)
        assert "2 of 9 shards are not as the index says" in said and "samples are lost" in said
        assert (f"more than resilience.max_bad_samples={limit}" in said) == (limit > 0)


@pytest.mark.parametrize("shared", [(), DSP], ids=["dp2", "sp2"])
def test_a_sample_that_nothing_can_stand_in_for_weighs_nothing(ranks, tmp_path, shared):
    data = tmp_path / "data"
    write_dataset(data, samples={LONG: 4})
    index = Index.open(data)
    _flip(index, 2, _end(index.latents_place(2)) - 1)
    for name, world in (("one", 1), ("two", 2)):
        args = overrides(data, tmp_path / name, *RUN, *(shared if world == 2 else ()))
        ranks.run(train_here, args, _watched, str(tmp_path / f"{name}-keys"), world=world)
    for name in ("one", "two"):
        told = events(tmp_path / name, "sample_quarantined")
        assert [(e["step"], e["key"], e["substitute"]) for e in told] == [(s, index.key[2], None) for s in range(1, STEPS + 1)]
    torch.testing.assert_close(losses(tmp_path / "one"), losses(tmp_path / "two"), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(tensors(tmp_path / "one"), tensors(tmp_path / "two"), rtol=1e-10, atol=1e-10)


def test_where_fewer_ranks_share_a_shape_only_these_replace_its_samples(ranks):
    assert ranks.run(_bad_in_pairs, world=4) == [
        ([False, False], True),
        ([False, False], False),
        ([True, False], True),
        ([True, False], False),
    ]


def _bad_in_pairs() -> tuple[list[bool] | None, bool]:
    sp = SpConfig(degree=4, scheme="auto", min_degree=2)
    agreement = Agreement(build_mesh(torch.device("cpu"), dp_replicate=1, sp=sp, timeout_s=20))
    found = agreement.bad_anywhere([dist.get_rank() == 3, False], sharing=2)
    assert agreement.bad_anywhere([False, False], sharing=2) is None
    return found, agreement.answers(sharing=2)


def test_nothing_more_is_sent_where_nothing_is_bad(ranks, whole, tmp_path):
    sent = ranks.run(_count_gathers, overrides(whole, tmp_path, *RUN, *DSP), world=2)
    assert sent == [{"check": STEPS, "bad_anywhere": 0, "gather_text": 0}] * 2


def _count_gathers(args: list[str]) -> dict[str, int]:
    calls = {"check": 0, "bad_anywhere": 0, "gather_text": 0}

    def counted(owner: Any, name: str) -> Any:
        real = getattr(owner, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            calls[name] += 1
            return real(*args, **kwargs)

        return mock.patch.object(owner, name, call)

    with counted(Agreement, "check"), counted(Agreement, "bad_anywhere"), counted(quarantine, "gather_text"):
        train_here(args)
    return calls
