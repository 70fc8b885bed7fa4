"""bench step: the training's own step, in forms that are held to each other, with and without what it sends."""

from __future__ import annotations

import argparse
import ast
import dataclasses
import json
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import get_args

import pytest
import torch
import torch.distributed as dist
from rich.console import Console

import opensora_dist
from opensora_dist.cli import bench as bench_cli
from opensora_dist.cli.main import main
from opensora_dist.config.train import SIZES, ModelConfig, ModelName, ParallelConfig, SchemeName, SizeName, SpConfig, ZeroConfig
from opensora_dist.core.errors import ConfigError, OpensoraError
from opensora_dist.core.types import Thw
from opensora_dist.ops.compiled import region, using_backend
from opensora_dist.parallel.sequence.registry import SCHEMES
from opensora_dist.parallel.sequence.traffic import SentBytes
from opensora_dist.plan.memory import MemoryCase, estimate
from opensora_dist.recipes.bench.kinds import IDLE, KindTimes
from opensora_dist.recipes.bench.show import megabytes
from opensora_dist.recipes.bench.speed import Work, speed
from opensora_dist.recipes.bench.step import FormResult, StepOptions, Variant, bench_step, silence_problem
from opensora_dist.recipes.bench.step_forms import FORMS
from opensora_dist.recipes.bench.step_inputs import step_case, step_inputs
from opensora_dist.recipes.bench.step_show import print_step_table, step_figures, step_record, work_of
from opensora_dist.recipes.bench.training import Training, samples_of

CPU = torch.device("cpu")
QUICK = StepOptions(rounds=2, warmup=0, steps=1)


def _case(world=2, *, stage=0, sp=1, scheme="dsp", batch=1, accum=1, dtype="float32", **parallel):
    return MemoryCase(
        model=ModelConfig(depth=2, width=32, heads=4),
        parallel=ParallelConfig(
            sp=SpConfig(degree=sp, scheme=scheme), zero=ZeroConfig(stage=stage), grad_accum=accum, timeout_s=60, **parallel
        ),
        world=world,
        latent=Thw(5, 8, 8),
        dtype=dtype,
        micro_batch=batch,
        text_width=16,
        text_tokens=4,
        max_tokens=4,
    )


def _step_of(case):
    """Loss over all ranks and gradient norm, of a step; and the least largest value of a parameter."""
    training = Training(case, CPU)
    result = training.step()
    loss = result.loss.double().clone()
    dist.all_reduce(loss)
    largest = [weight.abs().max() for weight in training.backend.weights.values() if weight.numel()]
    return loss.item(), result.grad_norm.item(), torch.stack(largest).min().item()


def test_the_step_is_the_same_global_batch_under_every_layout(ranks):
    alone, norm, least = ranks.run(_step_of, _case(1, batch=2, dtype="float64"), world=1)[0]
    assert least > 0  # no gate that keeps work from mattering
    for case in (
        _case(2, dtype="float64"),
        _case(2, sp=2, batch=2, dtype="float64"),
        _case(2, sp=2, batch=1, accum=2, stage=3, dtype="float64"),
        _case(2, stage=2, dtype="float64"),
    ):
        assert samples_of(case) == 2
        for found in ranks.run(_step_of, case, world=2):
            assert found[:2] == pytest.approx((alone, norm), rel=1e-10)


def _silence(case):
    """Bytes of a step, of a silenced one and of one after it; and whether what these two compute is the same."""
    training = Training(case, CPU)
    first = training.step()
    counts = []
    for silent in (False, True, False):
        with SentBytes() as sent:
            if silent:
                with training.silenced():
                    quiet = training.step()
            else:
                last = training.step()
        counts.append(sent.by_collective)
    same = torch.equal(first.loss, last.loss) and torch.equal(first.grad_norm, last.grad_norm)
    return counts, same, bool(torch.isfinite(quiet.loss)) and bool(torch.isfinite(quiet.grad_norm))


@pytest.mark.parametrize(
    "case",
    [
        _case(),
        _case(stage=1, accum=2),
        _case(stage=2, sp=2),
        _case(stage=3, sp=2, scheme="ring"),
        _case(stage=3, dtype="bfloat16"),
    ],
    ids=["0", "1", "2 dsp", "3 ring", "3 bf16"],
)
def test_a_silenced_step_sends_nothing_but_what_ranks_agree_by_and_leaves_the_next_step_as_it_was(case, ranks):
    for (before, silent, after), same, finite in ranks.run(_silence, case, world=2):
        assert before == after and same and finite
        assert sum(before.values()) > 10_000
        # The gradient norm's one number, and what ranks that share samples tell each other about them.
        assert set(silent) <= {"allreduce_", "allgather_"} and sum(silent.values()) < 1000


def test_where_communication_cannot_be_silenced_it_is_left_out_and_said(ranks):
    assert silence_problem(_case(1)) == "one rank sends nothing"
    assert "dp_replicate" in silence_problem(_case(4, stage=2, dp_replicate=2))
    assert "tp" in silence_problem(_case(2, stage=2, tp=2))
    deepspeed = dataclasses.replace(_case(), parallel=ParallelConfig(zero=ZeroConfig(backend="deepspeed")))
    assert "deepspeed sends by itself" in silence_problem(deepspeed)
    (result,) = ranks.run(_bench, [_case(2, stage=2, tp=2)], QUICK, world=2)[0]
    assert result.silent == () and len(result.seconds) == 2


def _bench(cases, options, forms=None):
    """With more forms, of those of this file, by name; compiled as far as a graph, which is quick."""
    variants = [Variant(case=case, changed={"case": str(i)} if i else {}) for i, case in enumerate(cases)]
    known = dict(FORMS)
    FORMS.update({name: _FORMS[name] for name in forms or ()})
    try:
        with using_backend("eager"):
            return bench_step(variants, device=CPU, options=options)
    except OpensoraError as error:
        return str(error)
    finally:
        FORMS.clear()
        FORMS.update(known)


@contextmanager
def _by_the_same_numbers(training):
    with torch.autograd.graph.save_on_cpu():
        yield


@contextmanager
def _half_a_gradient(training):
    backward = training.backend.backward
    training.backend.backward = lambda loss: backward(loss / 2)
    yield
    training.backend.backward = backward


_FORMS = {"same": _by_the_same_numbers, "wrong": _half_a_gradient}


def test_forms_take_turns_and_are_held_to_the_first(ranks):
    options = dataclasses.replace(QUICK, forms=("eager", "same"), rounds=3)
    for eager, same in ranks.run(_bench, [_case(sp=2)], options, ["same"], world=2):
        assert (eager.form, same.form) == ("eager", "same") and eager.difference == 0 and same.difference < 1e-6
        assert all(len(times) == 3 and min(times) > 0 for times in (eager.seconds, eager.silent, same.seconds, same.silent))
    for said in ranks.run(_bench, [_case()], dataclasses.replace(QUICK, forms=("eager", "wrong")), ["wrong"], world=2):
        assert said.startswith("wrong: loss or gradient norm differ from eager's by 0.5")


def test_cases_that_differ_in_recomputation_share_weights_and_take_turns_with_another_model(ranks):
    alone = _case(1)
    full = dataclasses.replace(alone, parallel=alone.parallel.model_copy(update={"recompute": "full"}))
    joint = dataclasses.replace(alone, model=alone.model.model_copy(update={"name": "dit"}))
    results = ranks.run(_bench, [alone, full, joint], QUICK, world=1)[0]
    assert [r.variant.case for r in results] == [alone, full, joint]
    assert all(r.difference < 1e-6 and len(r.seconds) == 2 and r.kinds.total_ms > 0 for r in results)
    for result in results:  # what the other model holds isn't in it
        assert result.memory_bytes == pytest.approx(estimate(result.variant.case).total, rel=0.15)


def test_a_compiled_form_is_timed_beside_the_eager_one_and_its_memory_on_a_cpu_is_not_made_up(ranks):
    options = dataclasses.replace(QUICK, forms=("eager", "compile"), rounds=1)
    eager, compiled = ranks.run(_bench, [_case(1)], options, world=1)[0]
    assert compiled.difference < 1e-6 and len(compiled.seconds) == 1
    assert eager.memory_bytes > 0 and compiled.memory_bytes is None


def test_what_can_not_be_compared_is_refused_with_a_way_out(capsys, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)  # set for this process where tests/kernels is collected, too
    words = "bench step --device cpu --forms ours --recompute full --compare recompute=none,full size=S depth=1,2 dtype"
    assert main(words.split()) == 2
    said = capsys.readouterr().err
    assert "--forms ours: run.kernels=triton needs a GPU" in said
    assert "--compare recompute=none,full and --recompute full; give one of them" in said
    assert (
        "--compare size=S compares nothing" in said
        and "'depth=1,2' is not KEY=VALUE" in said
        and "'dtype' is not KEY=VALUE" in said
    )


def test_a_second_case_is_compiled_for_its_own_sizes():
    symbols = []

    def backend(graph, inputs):
        symbols.append([given for given in inputs if isinstance(given, torch.SymInt)])
        return graph.forward

    @region
    def twice(x):
        return x * 2

    training = SimpleNamespace(mesh=SimpleNamespace(device=CPU), case=_case(1))
    with using_backend(backend), FORMS["compile"](training):
        for width in (8, 16, 24, 8):
            twice(torch.ones(3, width))
    assert symbols == [[], [], []]


def test_the_peak_of_a_step_is_what_the_formula_says(ranks):
    for case in (_case(), _case(stage=3, batch=2)):
        (result,) = ranks.run(_bench, [case], QUICK, world=2)[0]
        assert result.memory_bytes == pytest.approx(estimate(case).total, rel=0.15)


def test_speed_is_of_what_it_says():
    work = Work(samples=8, tokens=1000, flops=10**12, world=4, peak_flops=1e14, dollars_per_gpu_hour=3.6)
    found = speed(0.5, work=work, exposed_s=0.1)
    assert found.samples_per_s == 16 and found.tokens_per_s_per_rank == 4000
    assert found.mfu == pytest.approx(3 * 8 * 1e12 / (0.5 * 4 * 1e14))
    assert found.exposed_share == pytest.approx(0.2)
    # Four GPUs for half a second, 3.6 dollars an hour each, for 8000 tokens.
    assert found.dollars_per_million_tokens == pytest.approx(4 * 0.5 * 3.6 / 3600 / 8000 * 1e6)
    bare = speed(0.5, work=dataclasses.replace(work, peak_flops=None, dollars_per_gpu_hour=None), exposed_s=None)
    assert (bare.mfu, bare.exposed_share, bare.dollars_per_million_tokens) == (None, None, None)
    assert speed(0.5, work=work, exposed_s=-0.01).exposed_share == 0


ONE = Variant(case=_case(1))


def test_figures_are_taken_round_by_round():
    eager = FormResult(form="eager", variant=ONE, difference=0, memory_bytes=1, seconds=(1.0, 2.0, 4.0), silent=(0.9, 1.8, 3.6))
    other = FormResult(form="other", variant=ONE, difference=0, memory_bytes=1, seconds=(0.5, 1.0, 2.0))
    work = Work(samples=1, tokens=1, flops=1, world=1, peak_flops=None)
    first, second = (step_figures(r, eager, work=work) for r in (eager, other))
    assert (
        first.ratio is None and first.exposed_ms.median == pytest.approx(200) and first.speed.exposed_share == pytest.approx(0.1)
    )
    assert (second.ratio.low, second.ratio.median, second.ratio.high) == (0.5, 0.5, 0.5) and second.exposed_ms is None


def test_record_and_table_hold_what_was_measured(tmp_path):
    case = _case(4, stage=2, sp=2)
    results = [
        FormResult(
            form=form,
            variant=Variant(case=case),
            difference=0.0,
            memory_bytes=5_000_000,
            kinds=KindTimes(milliseconds={"attention": 1.0, IDLE: 3.0}, unknown=("strange",)),
            seconds=(s, s, s),
            silent=(s, s, s),
        )
        for form, s in (("eager", 1.0), ("ours", 0.5))
    ]
    works = [work_of(case, peak_flops=1e12)] * 2
    made = json.loads(json.dumps(step_record(results, options=QUICK, works=works, device="cpu"), allow_nan=False))
    assert made["world"] == 4 and made["memory_by_formula"] == estimate(case).total and made["case"]["latent"] == [5, 8, 8]
    by_kernels = dataclasses.replace(case, kernels="triton")
    assert [r["case"]["kernels"] for r in made["results"]] == ["torch", "triton"] and made["device"] == "cpu"
    assert made["results"][1]["memory_by_formula"] == estimate(by_kernels).total < made["memory_by_formula"]
    assert made["results"][1]["figures"]["ratio"] == {"low": 0.5, "median": 0.5, "high": 0.5}
    with open(tmp_path / "table.txt", "w") as file:
        print_step_table(results, works=works, console=Console(file=file))
    text = (tmp_path / "table.txt").read_text()
    assert "ZeRO 2, dsp x 2" in text and "0.500 [0.500, 0.500]" in text
    assert "75%" in text and "ours: other: strange" in text


def test_the_command_writes_its_record(tmp_path, capsys):
    words = "bench step --nproc 1 --depth 1 --width 16 --heads 2 --clip 2x4x4 --text-tokens 3 --rounds 1 --warmup 0 --steps 2 --device cpu"
    assert main([*words.split(), "--out", str(tmp_path)]) == 0
    assert "one rank sends nothing" in capsys.readouterr().out
    made = json.loads((tmp_path / "step.json").read_text())
    (result,) = made["results"]
    assert result["figures"]["speed"]["tokens_per_s_per_rank"] > 0 and result["figures"]["speed"]["mfu"] > 0


def test_everything_wrong_with_a_case_is_said_at_once_in_the_words_of_the_command_line(capsys):
    words = "--nproc 2 --depth 0 --heads 7 --clip 4x8 --sp 3 --zero 4 --text-tokens 0 --rounds 0 --forms warp --dollars-per-gpu-hour 0"
    assert main(["bench", "step", *words.split()]) == 2
    said = capsys.readouterr().err
    assert "9 problems" in said and "--sp=3 must divide the 2 ranks" in said and "--heads=7 must divide --width=384" in said
    assert "parallel." not in said and "data." not in said


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"clip": "4x7x8"}, "model.patch"),
        ({"clip": "2x4x4", "sp": 4}, "--sp=4"),
        ({"sp": 4, "scheme": "ulysses", "heads": 6}, "--sp=4"),
        ({"scheme": "auto", "sp": 2}, "name a scheme"),
        ({"dp_replicate": 2}, "--zero=0"),
    ],
)
def test_a_case_that_its_shapes_forbid_is_refused(given, said):
    with pytest.raises(ConfigError) as caught:
        step_case(given, world=4, timeout_s=60)
    assert said in str(caught.value)


def test_defaults_are_those_of_a_training():
    measuring = {"forms": ["eager"], "rounds": 1, "warmup": 0, "steps": 1, "dollars_per_gpu_hour": None}
    (variant,), options = step_inputs({}, world=2, timeout_s=5.0, device=CPU, **measuring)
    case = variant.case
    assert (
        not variant.changed
        and case.model == ModelConfig()
        and case.parallel == ParallelConfig(timeout_s=5.0)
        and case.dtype == "float32"
    )
    assert options == StepOptions(rounds=1, warmup=0, steps=1)


def test_training_imports_nothing_that_is_private_to_fsdp2():
    """What is private changes with any release of torch; a benchmark's switch of its collectives may break by that, and no training."""
    folder = Path(opensora_dist.__file__).parent
    found = {}
    for path in folder.rglob("*.py"):
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
                found.setdefault(node.module, set()).add(str(path.relative_to(folder)))
    private = {name: places for name, places in found.items() if name.startswith("torch.distributed.fsdp._")}
    assert list(private.values()) == [{"parallel/zero/silent.py"}]
    assert "opensora_dist.parallel.zero.silent" not in found


def test_names_on_the_command_line_are_those_of_the_config():
    for action in ("step", "sequence"):
        for name, names in {"--model": ModelName, "--size": SizeName}.items():
            given = next((a for a in _options(action) if name in a.option_strings), None)
            assert given is None or tuple(given.choices) == get_args(names)
    assert set(get_args(SchemeName)) == set(SCHEMES) and set(get_args(SizeName)) == set(SIZES)


def _options(action):
    parser = argparse.ArgumentParser()
    bench_cli.add_parser(parser.add_subparsers())
    for word in ("bench", action):
        parser = next(a for a in parser._actions if isinstance(a, argparse._SubParsersAction)).choices[word]
    return parser._actions


def test_memory_that_nobody_knows_is_a_dash():
    assert (megabytes(None), megabytes(0), megabytes(5_000_000_000)) == ("-", "0.0", "5,000.0")
