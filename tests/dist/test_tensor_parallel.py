"""Tensor parallelism beside the trajectories (``test_trajectory``, whose layouts have ``tp``): bytes, checkpoints, whole runs."""

from __future__ import annotations

import copy
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from dataset_factory import write_dataset
from sequence_cases import Shape, compute, make_inputs, make_model
from training import SAMPLES, assert_same_tensors, curve, events, losses, overrides, tensors, train_here

from opensora_dist.checkpoint.store import load_tensors, read_tensors, save_tensors
from opensora_dist.config.train import ModelConfig, OptimConfig, ParallelConfig, SpConfig, ZeroConfig
from opensora_dist.core.types import Thw
from opensora_dist.core.video import read_video
from opensora_dist.models.base import ModelIo, VideoTransformer
from opensora_dist.models.registry import build_model
from opensora_dist.models.tensor import share_blocks
from opensora_dist.parallel.keys import Keys
from opensora_dist.parallel.mesh import build_mesh
from opensora_dist.parallel.sequence.traffic import SentBytes
from opensora_dist.parallel.tensor.linear import copy_whole, packed_parts
from opensora_dist.parallel.zero.native import NativeBackend

CPU = torch.device("cpu")
SHAPE = Shape(Thw(5, 3, 2), batch=2)
BRANCHES = {"stdit": 4, "dit": 3}
"""Space and time, or both at once; the caption; the MLP."""
TEXT_TOKENS = 5


# --- bytes


def _count(name, recompute, autocast):
    """Bytes of tp that this rank sends in forward and in backward of a model of two blocks."""
    mesh = build_mesh(CPU, dp_replicate=1, sp=SpConfig(), tp=dist.get_world_size(), timeout_s=60)
    dtype = torch.float32 if autocast else torch.float64
    whole = make_model(name, SHAPE, depth=2).to(dtype)
    shared = _shared_copy(whole, mesh)
    for block in shared.blocks:
        block.recompute = recompute
    marks = []
    with SentBytes() as sent, torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        compute(shared, make_inputs(SHAPE, group=0, dtype=dtype), shard=None, between=lambda: marks.append(sent.total))
    assert set(sent.by_collective) == {"allreduce_"}
    return marks[0], sent.total - marks[0]


def _shared_copy(whole, mesh):
    model = copy.deepcopy(whole).to("meta")
    share_blocks(model, mesh)
    model.to_empty(device="cpu")
    packed = packed_parts(model)
    for key, tensor in model.state_dict().items():
        copy_whole(tensor.detach(), whole.state_dict()[key], parts=packed.get(key, 1))
    return model


@pytest.mark.parametrize(
    "world, name, recompute, autocast",
    [
        (2, "stdit", "none", False),
        (3, "stdit", "full", True),
        (2, "dit", "full", False),
        *(
            pytest.param(*c, marks=pytest.mark.slow)
            for c in ((3, "stdit", "none", False), (2, "stdit", "full", True), (3, "dit", "full", False))
        ),
    ],
)
def test_a_branch_sends_one_sum_in_forward_and_one_in_backward_and_a_replay_none(ranks, name, recompute, autocast, world):
    # An all-reduce is counted as a ring's. In backward the caption's gradient is summed once for all blocks.
    ring = 2 * (world - 1) / world * SHAPE.width * (2 if autocast else 8) * SHAPE.batch
    forward = 2 * BRANCHES[name] * SHAPE.grid.volume * ring
    for found in ranks.run(_count, name, recompute, autocast, world=world):
        assert found == (forward, forward + TEXT_TOKENS * ring)


# --- checkpoints


def _backend(tp, stage, draw):
    """A model whose every number is drawn by name, or a zero."""
    world = dist.get_world_size()
    parallel = ParallelConfig(tp=tp, zero=ZeroConfig(stage=stage))
    mesh = build_mesh(CPU, dp_replicate=1, sp=parallel.sp, tp=tp, timeout_s=60)
    io = ModelIo(in_channels=2, out_channels=2, text_width=6, max_tokens=5)
    with torch.device("meta"):
        model = build_model(ModelConfig(depth=2, width=24, heads=4, patch=(1, 2, 2)), io)
    share_blocks(model, mesh)
    assert world % tp == 0
    backend = NativeBackend(
        model,
        mesh=mesh,
        units=list(model.blocks),
        init=torch.no_grad()(lambda m: [p.zero_() for p in m.state_dict().values()]),
        parallel=parallel,
        optim=OptimConfig(),
        compute_dtype=torch.float32,
    )
    ema = {name: torch.zeros_like(w) for name, w in backend.weights.items()}
    if draw:
        state = backend.state_dict(ema=ema)
        for name, tensor in state.items():
            copy_whole(tensor.detach(), _drawn(name, tensor.shape), parts=1)
        backend.load_state_dict(state, ema=ema, steps=7)
    return backend, ema


def _drawn(name, shape):
    return torch.empty(shape).normal_(generator=Keys(5).generator(f"test:{name}"))


def _move(source: str | None, target: str, tp: int, stage: int):
    """Reads a checkpoint (without one, draws it) and writes it again."""
    backend, ema = _backend(tp, stage, draw=source is None)
    if source is not None:
        state = backend.state_dict(ema=ema)
        load_tensors(state, Path(source))
        backend.load_state_dict(state, ema=ema, steps=7)
    save_tensors(backend.state_dict(ema=ema), Path(target))
    return backend.optimizer_steps()


def test_a_checkpoint_is_the_same_bits_whatever_tp_wrote_it_and_any_other_reads_it(ranks, tmp_path):
    layouts = [(2, 2, 1), (1, 1, 0), (4, 2, 3), (4, 4, 2), (1, 1, 3), (3, 1, 2), (2, 2, 3)]  # world, tp, stage
    source = None
    for i, (world, tp, stage) in enumerate(layouts):
        target = str(tmp_path / str(i))
        assert set(ranks.run(_move, source, target, tp, stage, world=world)) == {7}
        found = read_tensors(Path(target))
        assert_same_tensors(found, {name: _drawn(name, t.shape) for name, t in found.items()})
        source = target


# --- whole runs


def _normal(self, name, tensor, generator):
    tensor.normal_(std=0.2, generator=generator)


def _random_start():
    """No parameter starts at zero, which would hide what is wrong behind it."""
    return mock.patch.object(VideoTransformer, "init_parameter", _normal)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    path = tmp_path_factory.mktemp("tensor") / "data"
    write_dataset(path, samples=SAMPLES)
    return path


def _close(one: Path, other: Path):
    for a, b in zip(curve(one), curve(other), strict=True):
        assert a[:1] + a[3:] == b[:1] + b[3:]
        torch.testing.assert_close(a[1:3], b[1:3], rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(tensors(one), tensors(other), rtol=1e-10, atol=1e-10)


def test_a_run_goes_on_under_another_tp_as_if_nothing_had_changed(ranks, data, tmp_path):
    def run(name, steps, world, *layout):
        given = overrides(data, tmp_path / name, f"run.steps={steps}", "run.dtype=float64", *layout)
        ranks.run(train_here, given, _random_start, world=world)

    run("one", 6, 1)
    run("parts", 2, 2, "parallel.tp=2", "parallel.zero.stage=2")
    run("parts", 3, 1)
    run("parts", 6, 4, "parallel.tp=2", "parallel.zero.stage=3", "parallel.sp.degree=2", "parallel.recompute=full")
    assert [e["step"] for e in events(tmp_path / "parts", "resume")] == [2, 3]
    _close(tmp_path / "parts", tmp_path / "one")
    said = [e["mesh_table"] for e in events(tmp_path / "parts", "start")]
    assert [sum(line[:1].isdigit() for line in table) for table in said] == [2, 1, 4]


def test_ranks_of_tp_draw_each_validation_video_together_and_one_writes_it(ranks, data, tmp_path):
    drawn = ["validation.every_steps=1", "validation.prompts=[red, a blue square]", "validation.sampling_steps=2"]
    for name, world, layout in (("one", 1, []), ("shared", 2, ["parallel.tp=2", "parallel.zero.stage=3"])):
        given = overrides(data, tmp_path / name, "run.steps=1", "run.dtype=float64", *drawn, *layout)
        ranks.run(train_here, given, _random_start, world=world)
    for i in range(2):
        names = (tmp_path / run / "samples" / "step-00000001" / f"{i:03d}.mp4" for run in ("one", "shared"))
        one, together = (read_video(name)[0].astype(int) for name in names)
        assert abs(one - together).max() <= 1, i
    assert events(tmp_path / "shared", "end")[0]["validation_failures"] == 0


@pytest.mark.parametrize("more", [[], ["parallel.recompute=selective", "parallel.tile_tokens=5"]], ids=["plain", "levers"])
def test_bfloat16_with_tp_trains_as_float32_does(ranks, data, more, tmp_path):
    tp = ["parallel.tp=2", "parallel.zero.stage=2", "parallel.grad_accum=2", *more]
    for name, world, layout in (("one", 1, []), ("shared", 2, ["run.dtype=bfloat16", *tp])):
        given = overrides(data, tmp_path / name, "run.steps=5", "optim.lr=1e-2", *layout)
        ranks.run(train_here, given, _random_start, world=world)
    torch.testing.assert_close(losses(tmp_path / "shared"), losses(tmp_path / "one"), rtol=1e-2, atol=0)
    assert {t.dtype for t in tensors(tmp_path / "shared").values()} == {torch.float32}
