"""Compiled blocks are the eager model, in a number of graphs that doesn't grow with shapes or depth."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from sequence_cases import Shape, compute, difference, make_inputs, make_model
from torch._dynamo.callback import CallbackTrigger, callback_handler

from opensora_dist.config.rules import train_problems
from opensora_dist.config.train import FaultConfig, ParallelConfig, TrainConfig
from opensora_dist.core.errors import ConfigError
from opensora_dist.core.types import Thw
from opensora_dist.models.levers import set_levers
from opensora_dist.ops.choice import Choice, choose, using
from opensora_dist.ops.compiled import CACHE_VARIABLE, Compilations, keep_compiled, using_backend
from opensora_dist.recipes.guards import Compiling
from opensora_dist.resilience.faults import Faults
from opensora_dist.resilience.straggler import Probe

CPU = torch.device("cpu")
TOLERANCE = 1e-10
ONE_SHAPE, MANY_SHAPES = Choice(compile="blocks"), Choice(compile="blocks", dynamic_shapes=True)
SHAPE = Shape(Thw(5, 4, 3), batch=2)


@pytest.fixture(autouse=True)
def _nothing_compiled_before():
    torch._dynamo.reset()


def _model(name="stdit", *, depth=2, **levers):
    model = make_model(name, SHAPE, depth=depth)
    set_levers(model, ParallelConfig(**levers), device=CPU, min_offload_bytes=0)
    return model


def _errors(found, wanted):
    grads = {name: difference(found.grads[name], grad, scale=grad) for name, grad in wanted.grads.items()}
    output = difference(found.output, wanted.output, scale=wanted.output)
    return grads | {"output": output, "dx": difference(found.dx, wanted.dx, scale=wanted.dx)}


def _compare(model, shape, *, choice=MANY_SHAPES, backend="aot_eager"):
    """The largest differences from the same model uncompiled, and how many graphs that took."""
    inputs = make_inputs(shape, group=0)
    wanted = compute(model, inputs, shard=None)
    compilations = Compilations()
    compilations.start()
    with using(choice), using_backend(backend):
        found = compute(model, inputs, shard=None)
    compilations.stop()
    return max(_errors(found, wanted).values()), compilations.sofar.graphs


# The block of every model, with each way of recomputing; `slow` has the rest of the grid. One frame is in the dit case.
CASES = [("dit", "selective", Shape(Thw(5, 4, 3), batch=2))]
SLOW = [
    *(("stdit", recompute, Shape(Thw(5, 4, 3), batch=2)) for recompute in ("none", "selective", "full")),
    *(("dit", recompute, Shape(Thw(1, 3, 3))) for recompute in ("none", "full")),
    ("stdit", "none", Shape(Thw(1, 3, 3))),
]


@pytest.mark.parametrize(
    "name, recompute, shape", [*CASES, *(pytest.param(*case, marks=pytest.mark.slow) for case in SLOW)], ids=str
)
def test_a_compiled_model_gives_the_output_and_every_gradient_of_the_eager_one(name, recompute, shape):
    error, graphs = _compare(_model(name, recompute=recompute), shape)
    assert error <= TOLERANCE and graphs >= 2


@pytest.mark.slow
@pytest.mark.parametrize(
    "levers", [{"tile_tokens": 7}, {"tile_tokens": 7, "recompute": "selective"}, {"offload_activations": True}], ids=str
)
def test_levers_work_around_what_is_compiled(levers):
    error, graphs = _compare(_model(depth=3, **levers), SHAPE)
    assert error <= TOLERANCE and graphs >= 2


@pytest.mark.slow
@pytest.mark.parametrize("recompute", ["none", "selective"])
def test_a_pack_is_compiled_between_its_attentions(recompute):
    model = _model(recompute=recompute)
    grids = [Thw(5, 4, 3), Thw(1, 3, 3), Thw(2, 2, 3)]
    given = [make_inputs(Shape(grid, batch=1 + i % 2), group=0) for i, grid in enumerate(grids)]
    names = ("timestep_B", "text_BYE", "text_mask_BY", "drop_caption_B")
    timestep, text, mask, drop = (torch.cat([getattr(inputs, name) for inputs in given]) for name in names)

    def run():
        model.zero_grad()
        outputs = model([i.x_BCTHW for i in given], timestep, text, mask, drop_caption_B=drop)
        torch.stack([(out * i.weight_BCTHW).sum() for out, i in zip(outputs, given, strict=True)]).sum().backward()
        return [*(out.detach() for out in outputs), *(p.grad.clone() for p in model.parameters())]

    wanted = run()
    compilations = Compilations()
    compilations.start()
    with using(MANY_SHAPES), using_backend("aot_eager"):
        found = run()
    compilations.stop()
    errors = [difference(a, b, scale=b) for a, b in zip(found, wanted, strict=True)]
    assert max(errors) <= TOLERANCE and compilations.sofar.graphs >= 4


def test_the_seventh_bucket_and_the_hundredth_block_compile_nothing():
    """Under dynamo alone: which graphs there are is its to say."""
    model = _model("dit", depth=4)
    buckets = [(Thw(5, 4, 3), 2), (Thw(6, 4, 3), 3), (Thw(4, 2, 6), 2), (Thw(7, 3, 3), 2), (Thw(3, 5, 4), 3), (Thw(8, 2, 2), 4)]
    graphs = [_compare(model, Shape(grid, batch=batch), backend="eager")[1] for grid, batch in buckets]
    assert graphs == [3, 0, 0, 0, 0, 0], "one for all blocks, one for the final layer, one for the caption's MLP"
    assert _compare(model, Shape(Thw(9, 3, 5), batch=2), backend="eager") == (0.0, 0)


@pytest.mark.slow
def test_a_batch_of_one_and_a_single_frame_have_graphs_of_their_own_and_no_more():
    model = _model("dit", depth=2)
    shapes = [Shape(Thw(5, 4, 3), batch=2), Shape(Thw(5, 4, 3)), Shape(Thw(1, 4, 3)), Shape(Thw(6, 4, 2)), Shape(Thw(1, 5, 3))]
    assert [_compare(model, shape, backend="eager")[1] for shape in shapes] == [3, 3, 2, 0, 0]


@pytest.mark.slow
def test_the_first_block_of_stdit_which_adds_positions_has_one_more_graph_and_shares_it_between_shapes():
    model = _model("stdit", depth=3)
    shapes = [Shape(Thw(5, 4, 3), batch=2), Shape(Thw(6, 3, 3), batch=3)]
    assert [_compare(model, shape, backend="eager")[1] for shape in shapes] == [4, 0]


@pytest.mark.slow
def test_a_run_of_one_shape_has_graphs_of_its_sizes_and_of_symbols_once_another_comes():
    model = _model("dit", depth=2)
    shapes = [Shape(Thw(t, h, 3), batch=2) for t, h in ((5, 4), (6, 5), (7, 2), (8, 3))]
    assert [_compare(model, shape, choice=ONE_SHAPE, backend="eager")[1] for shape in shapes] == [3, 2, 0, 0]


@pytest.mark.slow
def test_a_watched_module_inside_of_a_compiled_block_breaks_no_graph_and_is_not_timed():
    model = _model("dit", depth=1)
    Faults(FaultConfig(slow_rank="0@x1.1"), run_dir=Path("unused"), rank=0).slow_down(model.blocks[0].mlp.fc2)
    probe = Probe(model.blocks[0].mlp.fc2, device=CPU)
    error, graphs = _compare(model, SHAPE)  # the eager one first: forward once
    assert error < TOLERANCE and graphs > 0
    probe.end_step()
    assert len(probe._steps[0]) == 1 and probe.read()[0][0] > 0


class _Events:
    def __init__(self):
        self.written = []

    def event(self, name, **fields):
        self.written.append((name, fields["step"], fields["seconds"]))


def test_recording_of_cuda_graphs_is_said_though_nothing_was_compiled():
    compilations, events = Compilations(), _Events()
    compiling = Compiling(compilations, logbook=events)
    compiling.start(step=0)
    note = SimpleNamespace(step=7)
    compiling.after_step(note)
    assert not events.written
    with callback_handler.install_callbacks(CallbackTrigger.CUDAGRAPH_RECORDING, "-1"):  # as torch does around one
        time.sleep(0.001)
    compiling.after_step(note)
    compiling.after_step(note)
    compiling.end()
    (said,) = events.written
    assert said[:2] == ("compiled", 7) and said[2] > 0 and compilations.sofar.graphs == 0


@pytest.mark.slow
def test_what_is_counted_is_what_was_compiled():
    compilations = Compilations()
    compilations.start()
    for batch in (2, 1):
        _compare(_model("dit", depth=1), Shape(Thw(2, 2, 2), batch=batch), backend="eager")
    compilations.stop()
    found = compilations.sofar
    assert (found.graphs, found.recompilations, found.from_cache) == (6, 3, 0) and found.seconds > 0
    assert "compiling 6 graphs, 0 of them" in str(found)
    _compare(_model("dit", depth=1), Shape(Thw(1, 2, 2), batch=2), backend="eager")
    assert compilations.sofar == found


# --- rules


def _problems(**overrides):
    config = TrainConfig.model_validate(overrides | {"data": {"path": "shards"} | overrides.get("data", {})})
    return [p for p in train_problems(config, world=2) if "run.compile" in p.fields]


@pytest.mark.parametrize(
    "field, overrides",
    [
        ("run.device", {"run": {"compile": "graphs", "device": "cpu"}}),
        ("parallel.zero.stage", {"parallel": {"zero": {"stage": 3}}}),
        ("parallel.sp.degree", {"parallel": {"sp": {"degree": 2}}}),
        ("parallel.offload_activations", {"parallel": {"offload_activations": True}}),
        ("parallel.tile_tokens", {"parallel": {"tile_tokens": 64}}),
        ("data.batching", {"data": {"batching": "packed", "unit_tokens": 64}}),
    ],
)
def test_graphs_are_refused_where_addresses_or_sizes_change(field, overrides):
    base = {"run": {"compile": "graphs", "device": "cuda"}, "parallel": {"zero": {"stage": 0}}}
    assert _problems(**base) == []
    (problem,) = _problems(**(base | {k: base.get(k, {}) | v for k, v in overrides.items()}))
    assert field in problem.fields and field in problem.message and "use run.compile=blocks" in problem.message


@pytest.mark.parametrize("backend", ["deepspeed", "colossalai"])
def test_backends_with_hooks_inside_of_blocks_are_not_compiled(backend):
    (problem,) = _problems(run={"compile": "blocks"}, parallel={"zero": {"backend": backend, "stage": 2}})
    assert f"parallel.zero.backend={backend}" in problem.message
    assert _problems(run={"compile": "off"}, parallel={"zero": {"backend": backend, "stage": 2}}) == []


def test_graphs_want_a_gpu_also_where_the_device_is_found_by_itself():
    with pytest.raises(ConfigError, match=r"run\.compile=graphs needs a GPU, and the run is on cpu"):
        choose("torch", device=CPU, dtype="bfloat16", compile="graphs")
    assert choose("torch", device=CPU, dtype="float32", compile="blocks").compile == "blocks"


# --- the cache


def test_the_cache_is_a_folder_that_only_its_owner_can_write(tmp_path, monkeypatch):
    monkeypatch.delenv(CACHE_VARIABLE, raising=False)
    folder = keep_compiled(tmp_path / "a" / "b")
    assert os.environ[CACHE_VARIABLE] == str(folder) and folder.stat().st_mode & 0o777 == 0o700
    assert keep_compiled(tmp_path / "other") == folder, "the environment goes first"
    folder.chmod(0o770)
    with pytest.raises(ConfigError, match="can be written by others than you"):
        keep_compiled(folder)


def test_nobody_else_can_put_another_folder_in_the_place_of_the_cache(tmp_path, monkeypatch):
    monkeypatch.delenv(CACHE_VARIABLE, raising=False)
    shared, own = tmp_path / "shared", tmp_path / "own"
    shared.mkdir()
    own.mkdir()
    (shared / "link").symlink_to(own)
    assert keep_compiled(shared / "link") == own.resolve() and os.environ[CACHE_VARIABLE] == str(own.resolve())
    monkeypatch.delenv(CACHE_VARIABLE)
    (shared / "cache").mkdir(mode=0o700)
    (own / "link").symlink_to(shared / "cache")
    shared.chmod(0o777)
    for folder in (shared / "cache", own / "link"):
        with pytest.raises(ConfigError, match=f"{shared} can be written by others"):
            keep_compiled(folder)
    assert CACHE_VARIABLE not in os.environ
    shared.chmod(0o1777)
    assert keep_compiled(shared / "cache") == (shared / "cache").resolve()


_RUN = """
import sys
from pathlib import Path
sys.path.insert(0, {tests!r})
import torch
from sequence_cases import Shape, compute, make_inputs, make_model
from opensora_dist.core.types import Thw
from opensora_dist.ops.choice import Choice, using
from opensora_dist.ops.compiled import Compilations, keep_compiled

keep_compiled(Path({cache!r}))
shape = Shape(Thw(3, 2, 2), batch=2)
compilations = Compilations()
compilations.start()
with using(Choice(compile="blocks")):
    found = compute(make_model("dit", shape, depth=1), make_inputs(shape, group=0), shard=None)
print(found.loss.item(), compilations.sofar.graphs, compilations.sofar.from_cache)
"""


@pytest.mark.slow
def test_a_restart_finds_what_was_compiled_and_computes_the_same(tmp_path):
    program = textwrap.dedent(_RUN).format(tests=os.path.dirname(os.path.dirname(__file__)), cache=str(tmp_path / "cache"))
    environment = {name: value for name, value in os.environ.items() if name != CACHE_VARIABLE}
    first, second = (
        subprocess.run(
            [sys.executable, "-c", program], env=environment, capture_output=True, text=True, timeout=280, check=True
        ).stdout.split()
        for _ in range(2)
    )
    assert first[1:] == ["3", "0"] and second == [first[0], "3", "3"]
    wanted = compute(
        make_model("dit", Shape(Thw(3, 2, 2), batch=2), depth=1), make_inputs(Shape(Thw(3, 2, 2), batch=2), group=0), shard=None
    )
    assert float(first[0]) == pytest.approx(wanted.loss.item(), rel=TOLERANCE)


def test_a_choice_says_whether_it_compiles():
    assert str(ONE_SHAPE).endswith("compiled: blocks") and str(replace(ONE_SHAPE, compile="off")).endswith("compiled: off")
