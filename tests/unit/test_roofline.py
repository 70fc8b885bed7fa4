"""The least time of a step: its operators are the model's own FLOPs, and the page says what was measured and what was not."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest

from opensora_dist.config.bench import StepSweep
from opensora_dist.config.load import load_config
from opensora_dist.config.train import ModelConfig, ParallelConfig
from opensora_dist.core.io import write_json
from opensora_dist.core.types import Thw
from opensora_dist.plan.hardware import gpu_of
from opensora_dist.plan.memory import MemoryCase, estimate
from opensora_dist.recipes.bench.kinds import IDLE, KINDS, KindTimes
from opensora_dist.recipes.bench.roofline import ATTENTION, COPIES, GELU, NORMS, OPTIMIZER, PRODUCTS, limit_s, step_operators
from opensora_dist.recipes.bench.roofline_page import best_mfu, page, published_cases, stored_results
from opensora_dist.recipes.bench.step import FormResult, StepOptions, Variant
from opensora_dist.recipes.bench.step_show import step_record, work_of

ROOT = Path(__file__).parents[2]


def _case(**changed):
    case = MemoryCase(
        model=ModelConfig(size="S"), parallel=ParallelConfig(), world=1, latent=Thw(4, 8, 8), dtype="bfloat16", micro_batch=3
    )
    return dataclasses.replace(case, **changed)


@pytest.mark.parametrize("name", ["stdit", "dit"])
def test_the_operators_of_a_step_do_the_flops_of_the_models_formula(name):
    case = _case(model=ModelConfig(name=name, size="S"))
    operators = step_operators(case)
    assert sum(op.forward_flops for op in operators) == case.micro_batch * work_of(case, peak_flops=None).flops
    assert {op.kind for op in operators} == {PRODUCTS, ATTENTION, NORMS, GELU, COPIES, OPTIMIZER} <= set(KINDS)
    # Scores are computed once more in backward, and nothing else is.
    extra = 0.5 * sum(op.forward_flops for op in operators if op.kind == ATTENTION)
    assert sum(op.flops for op in operators) == pytest.approx(3 * sum(op.forward_flops for op in operators) + extra)


def test_recomputation_and_micro_batches_cost_what_they_are():
    none, selective, full = (
        step_operators(_case(parallel=ParallelConfig(recompute=how))) for how in ("none", "selective", "full")
    )
    block = [op.forward_flops for op in none if op.kind == ATTENTION]
    assert sum(op.flops for op in full) - sum(op.flops for op in selective) == pytest.approx(sum(block))
    gpu = gpu_of("h100")
    assert limit_s(none, gpu) < limit_s(selective, gpu) < limit_s(full, gpu)
    twice = step_operators(_case(parallel=ParallelConfig(grad_accum=2)))
    once = {op.name: op.times for op in none}
    assert {op.name for op in twice if op.times == once[op.name]} == {"clip, AdamW, average"}


def test_each_operator_takes_the_longer_of_its_arithmetic_and_its_traffic_and_the_best_mfu_is_below_one():
    """By hand: XL/2 at 64x512x512 has 65,536 tokens of width 1152, 28 blocks, bf16 beside a float32 residual stream."""
    gpu, cases = gpu_of("a100"), published_cases()
    flops_per_s, bytes_per_s = gpu.flops_per_s, gpu.memory_bytes_per_s
    stream = 65_536 * 1152
    by_hand = {
        # x in, 2 bytes out; gradient in, x, a gradient added to: 4 each.
        "norm and modulation": 28 * stream * (4 + 2 + 3 * 4 + 2) / bytes_per_s,
        "MLP, in": 28 * 3 * 2 * stream * 4608 / flops_per_s,
        # 1024 tokens of a frame: two products forward, five backward, of 2 FLOPs each.
        "attention, space": 28 * 7 * 2 * stream * 1024 / flops_per_s,
        # Over 64 frames it is traffic: q, k, v, out, and in backward as much twice; log-sum-exps of 16 heads.
        "attention, time": 28 * (3 * 4 * 2 * stream + 2 * 4 * 65_536 * 16) / bytes_per_s,
    }
    found = {op.name: op.limit_s(gpu) for op in step_operators(cases["64x512x512"])}
    assert {name: found[name] for name in by_hand} == pytest.approx(by_hand)
    assert all(0.5 < best_mfu(step_operators(case), gpu) < 1 for case in cases.values())


def test_the_page_says_that_no_gpu_has_run_it_until_one_has(tmp_path):
    assert stored_results(tmp_path) == []
    empty = page([])
    assert "Nothing: no GPU has run it." in empty and "arithmetic, not measured" in empty
    _store(tmp_path / "h100" / "step_a.json", gpus=["NVIDIA H100 80GB HBM3"])
    _store(tmp_path / "cpu" / "step_b.json", gpus=[])
    (measured,) = stored_results(tmp_path)
    assert measured.case == _case()
    text = page([measured])
    operators = step_operators(_case())
    least = 1e3 * limit_s(operators, gpu_of("h100"))
    assert "no GPU has run it" not in text and "### NVIDIA H100 80GB HBM3: stdit (12 blocks, width 384)" in text
    assert f"| the step, unwatched | {least:.3g} | 100 ({100 / least:.3g}) |" in text
    attention = 1e3 * sum(op.limit_s(gpu_of("h100")) for op in operators if op.kind == ATTENTION)
    assert f"| attention | {attention:.3g} | 20 ({20 / attention:.3g}) |" in text


def test_forms_by_torch_and_by_kernels_stand_beside_each_other(tmp_path):
    for form in ("eager", "ours"):
        _store(tmp_path / "h100" / f"step_{form}.json", gpus=["NVIDIA H100 80GB HBM3"], form=form)
    text = page(stored_results(tmp_path))
    assert text.count("### NVIDIA H100") == 1 and "| eager, ms (x limit) | ours, ms (x limit) |" in text


def test_a_step_of_another_format_is_refused_and_the_page_left(tmp_path):
    write_json(tmp_path / "h100" / "step_a.json", {"format": 1, "kind": "step", "results": []})
    write_json(tmp_path / "h100" / "share.json", {"format": 1, "kind": "share"})
    command = [
        sys.executable,
        str(ROOT / "benchmarks/roofline.py"),
        "--results",
        str(tmp_path),
        "--page",
        str(tmp_path / "page.md"),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 2 and "step_a.json is no step that this version measured" in done.stderr
    assert not (tmp_path / "page.md").exists()


def _store(path, *, gpus, form="eager"):
    result = FormResult(
        form=form,
        variant=Variant(case=_case()),
        difference=0.0,
        memory_bytes=1,
        kinds=KindTimes(milliseconds={"attention": 20.0, IDLE: 5.0}),
        seconds=(0.1, 0.1),
    )
    record = step_record(
        [result], options=StepOptions(), works=[work_of(_case(), peak_flops=1e15)], device="cuda" if gpus else "cpu"
    )
    record["environment"]["gpus"] = gpus
    write_json(path, json.loads(json.dumps(record, allow_nan=False)))


@pytest.mark.parametrize("path", sorted(ROOT.glob("configs/bench/gpu_*.yaml")), ids=lambda path: path.stem)
def test_micro_batches_of_the_sweeps_for_one_gpu_fit_80_gb_but_for_large_models_without_recomputation(path):
    sweep = load_config(StepSweep, path)
    limit = 0.9 * gpu_of("h100").memory_bytes
    too_large = set()
    for values in sweep.grid.points:
        case = MemoryCase(
            model=ModelConfig(name=values["model"], size=values["size"]),
            parallel=ParallelConfig(recompute=values["recompute"]),
            world=1,
            latent=Thw(*map(int, values["clip"].split("x"))),
            dtype=values["dtype"],
            micro_batch=values["batch"],
        )
        if estimate(case).total > limit:
            too_large.add((values["size"], values["recompute"]))
    assert too_large == ({("L", "none"), ("XL", "none")} if "64x512" in path.stem else set())
    assert len(sweep.grid.points) == 24 and sweep.forms == ("eager", "compile", "ours")
