"""The planner: what it predicts follows from its formulas, it says what doesn't fit and why, and it is quick for large machines."""

from __future__ import annotations

import dataclasses
import json
import math
import re
import time
from pathlib import Path

import pytest
import torch

from opensora_dist.cli.main import main
from opensora_dist.config.load import load_config
from opensora_dist.config.train import TrainConfig
from opensora_dist.core.types import Thw
from opensora_dist.models.base import ModelIo
from opensora_dist.models.registry import build_model
from opensora_dist.plan.hardware import gpu_names, gpu_of
from opensora_dist.plan.layouts import Run, instead, judged, layouts, limit_bytes
from opensora_dist.plan.memory import MemoryCase, estimate
from opensora_dist.plan.sora import SoraAssumptions
from opensora_dist.plan.time import Machine, StepTime, step_time
from opensora_dist.recipes.auto import sample_cost

RECIPE = Path("configs/train/open_sora_1_0_64x512x512.yaml")
LATENT = Thw(64, 64, 64)


def run_of(*overrides: str, latent: Thw = LATENT) -> Run:
    config = load_config(TrainConfig, RECIPE, overrides=overrides)
    with torch.device("meta"):
        model = build_model(config.model, ModelIo(in_channels=4, out_channels=8, text_width=4096, max_tokens=120))
    return Run(
        model=config.model,
        parallel=config.parallel,
        global_batch=config.data.global_batch,
        latent=latent,
        dtype=config.run.dtype,
        cost=sample_cost(model, model.token_grid(latent), text_tokens=120),
        channels=4,
        text_width=4096,
        text_tokens=120,
    )


def machine_of(gpus: int, gpu: str = "h800", **changes) -> Machine:
    return dataclasses.replace(Machine(gpu=gpu_of(gpu), gpus=gpus), **changes)


def test_the_published_ends_of_the_estimate_for_sora():
    """Factorial Funds: 4,211 to 10,527 H100 months; 5 minutes of video an hour; as much drawn as trained after 15.3 to 38.2 M minutes."""
    little, much = SoraAssumptions(data=4), SoraAssumptions(data=10)
    assert [round(a.train_gpu_months) for a in (little, much)] == [4211, 10527]
    assert little.minutes_per_gpu_hour == pytest.approx(5.04, abs=0.005)
    assert [round(a.break_even_minutes / 1e6, 1) for a in (little, much)] == [15.3, 38.2]
    assert SoraAssumptions(use=0.4).train_gpu_months == pytest.approx(2.5 * little.train_gpu_months)


def test_gpus_are_known_by_name_and_each_has_a_source():
    for name in gpu_names():
        gpu = gpu_of(name.upper())
        assert gpu.source and gpu.flops_per_s > 1e14 and gpu.memory_bytes > 20e9 and gpu.link_bytes_per_s < gpu.memory_bytes_per_s
    assert gpu_of("h800").flops_per_s == gpu_of("h100").flops_per_s
    assert gpu_of("h800").link_bytes_per_s < gpu_of("h100").link_bytes_per_s / 2


def test_a_step_without_traffic_takes_its_flops():
    run, machine = run_of("parallel.sp.degree=1", "parallel.recompute=none", "parallel.zero.stage=0"), machine_of(1, use=0.5)
    case = MemoryCase(model=run.model, parallel=run.parallel, world=1, latent=LATENT, dtype="bfloat16")
    took = step_time(case, run.cost, machine)
    assert took.compute_s == pytest.approx(3 * run.cost.flops / (0.5 * 989.5e12))
    assert took.tokens_s == took.weights_s == took.offload_s == 0
    assert took.total_s == took.compute_s + took.optimizer_s


@pytest.mark.parametrize("change, slower", [({"recompute": "full"}, 4 / 3), ({"tile_tokens": 4096}, 1.05)])
def test_what_is_computed_again_takes_its_time(change, slower):
    run, machine = run_of("parallel.sp.degree=1", "parallel.recompute=none"), machine_of(8)
    times = [
        step_time(
            MemoryCase(model=run.model, parallel=run.parallel.model_copy(update=c), world=8, latent=LATENT, dtype="bfloat16"),
            run.cost,
            machine,
        ).compute_s
        for c in ({}, change)
    ]
    assert times[1] / times[0] >= slower * 0.999 and times[1] / times[0] < 1.4


def test_weights_cost_more_between_nodes_than_within_one_and_each_stage_what_it_sends():
    run = run_of("parallel.sp.degree=1", "parallel.recompute=none")

    def weights(stage: int, gpus: int, **more) -> float:
        zero = run.parallel.zero.model_copy(update={"stage": stage})
        parallel = run.parallel.model_copy(update={"zero": zero, **more})
        case = MemoryCase(model=run.model, parallel=parallel, world=gpus, latent=Thw(1, 8, 8), dtype="bfloat16")
        return step_time(
            case, dataclasses.replace(run.cost, flops=1, replicated_flops=0, scores_flops=0, then_flops=0), machine_of(gpus)
        ).weights_s

    assert weights(2, 16) > weights(2, 8) > 0
    assert weights(3, 8) > weights(2, 8)
    assert weights(2, 8, grad_accum=4) > weights(1, 8, grad_accum=4)
    numbers = 759_620_768 - 120 * 4096
    one_gather_one_sum = (2 + 4) * numbers * 7 / 8 / 200e9
    assert weights(2, 8) == pytest.approx(one_gather_one_sum * (1 + 1 / 28), rel=0.01)


def _step(run: Run, gpus: int, *, latent: Thw = LATENT, batch: int = 1, **changes) -> StepTime:
    """Of ``run`` without recomputation and sharing, under ``changes``; ``stage`` and ``offload`` are those of ZeRO."""
    zero = run.parallel.zero.model_copy(update={"stage": changes.pop("stage", 2), "offload": changes.pop("offload", "none")})
    parallel = run.parallel.model_copy(update={"zero": zero, **changes})
    case = MemoryCase(model=run.model, parallel=parallel, world=gpus, latent=latent, dtype="bfloat16", micro_batch=batch)
    return step_time(case, run.cost, machine_of(gpus))


def test_ranks_that_share_linears_send_two_sums_a_branch_and_compute_their_part():
    """The bytes that ``test_tensor_parallel`` counts: four branches of a block of stdit, and the caption once for all blocks."""
    run = run_of("parallel.sp.degree=1", "parallel.recompute=none")
    one, four, again = _step(run, 8), _step(run, 8, tp=4), _step(run, 8, tp=4, recompute="full")
    sums = (2 * 28 * 4 * run.grid.volume + 120) * 1152 * 2 * 2 * 3 / 4
    assert four.tensor_bytes == pytest.approx(sums, rel=0.01) and four.tensor_bytes == again.tensor_bytes
    assert one.tensor_bytes == one.tensor_s == 0 and four.tensor_s > four.tensor_bytes / gpu_of("h800").link_bytes_per_s
    assert one.compute_s / 4 < four.compute_s < one.compute_s / 3.9 and again.compute_s == pytest.approx(4 / 3 * four.compute_s)


def test_tiles_cost_a_rank_that_shares_linears_the_same_share_more():
    run = run_of("parallel.sp.degree=1", "parallel.recompute=none")
    more = [_step(run, 8, tp=tp, tile_tokens=4096).compute_s / _step(run, 8, tp=tp).compute_s for tp in (1, 8)]
    assert more[1] == pytest.approx(more[0], rel=0.01) and more[0] > 1.05


def test_weights_hide_under_compute_and_not_under_tokens_on_the_same_links():
    run = run_of("parallel.recompute=none")
    blocking, hidden = (
        _step(run, 64, sp=run.parallel.sp.model_copy(update={"degree": 64, "overlap": overlap})) for overlap in (False, True)
    )
    assert blocking.tokens_s != hidden.tokens_s and blocking.compute_s == hidden.compute_s
    assert blocking.weights_s == hidden.weights_s > 0


def test_copies_on_each_node_leave_sums_of_shards_to_the_network_and_gathers_to_the_node():
    run = run_of("parallel.sp.degree=1", "parallel.recompute=none")
    over_all, copies, accumulated = _step(run, 64), _step(run, 64, dp_replicate=8), _step(run, 64, dp_replicate=8, grad_accum=4)
    numbers = 759_620_768 - 120 * 4096 - 4 * 16 * 1153
    assert over_all.weights_bytes == pytest.approx((2 + 4) * numbers * 63 / 64, rel=0.01)
    between = 2 * 4 * numbers / 8 * 7 / 8
    assert copies.weights_bytes == pytest.approx((2 + 4) * numbers * 7 / 8 + between, rel=0.01)
    more = accumulated.weights_bytes - copies.weights_bytes
    assert more == pytest.approx(3 * 4 * numbers * 7 / 8, rel=0.01), "copies are summed once"
    assert copies.optimizer_s == pytest.approx(8 * over_all.optimizer_s)


def test_an_offloaded_optimizer_costs_the_way_to_cpu_memory_and_its_speed():
    run = run_of("parallel.sp.degree=1", "parallel.recompute=none")
    plain, optimizer, all_of_it = (_step(run, 8, stage=3, offload=how) for how in ("none", "optimizer", "all"))
    shard_bytes = 4 * (759_620_768 - 120 * 4096) / 8
    assert plain.offload_s == 0 and optimizer.offload_s == pytest.approx(2 * shard_bytes / 50e9, rel=0.01)
    assert optimizer.optimizer_s == all_of_it.optimizer_s > 20 * plain.optimizer_s
    image = Thw(1, 8, 8)
    little = _step(
        run_of("parallel.recompute=none", "parallel.sp.degree=1", latent=image), 8, stage=3, offload="all", latent=image
    )
    assert all_of_it.offload_s == 0 < little.offload_s, "beside enough work it is hidden"


def test_what_the_search_leaves_out_is_counted_and_none_of_it_is_faster_than_what_it_found():
    run, machine = run_of("data.global_batch=16"), machine_of(8)
    search = layouts(run, machine)
    assert search.needless > 1000
    best, p = search.layouts[0], search.layouts[0].parallel
    for offload in ("none", "optimizer", "all"):
        for activations, tile in ((True, None), (False, 16_384), (True, 16_384)):
            zero = p.zero.model_copy(update={"offload": offload})
            more = p.model_copy(update={"zero": zero, "offload_activations": activations, "tile_tokens": tile})
            assert judged(run, more, machine).step.total_s >= best.step.total_s


def test_what_does_not_fit_says_what_it_needs_and_what_each_lever_would_make_of_it():
    run, machine = run_of("parallel.sp.degree=1", "parallel.recompute=none", "data.global_batch=8"), machine_of(8)
    asked = judged(run, run.parallel, machine)
    assert asked.problem is not None and "GiB of 72" in asked.problem and asked.memory is not None
    levers = dict(instead(run, asked, machine))
    assert set(levers) >= {"sp 2", "sp 4", "sp 8", "recompute full", "zero 3", "offloaded activations"}
    for name in ("sp 4", "recompute full", "offloaded activations"):
        assert levers[name].problem is None and levers[name].memory.total < limit_bytes(machine) < asked.memory.total


def test_every_layout_that_is_said_to_run_fits_by_the_one_formula_and_the_fastest_is_first():
    run, machine = run_of(), machine_of(16)
    found = layouts(run, machine).layouts
    good = [layout for layout in found if layout.problem is None]
    assert good and [g.step.total_s for g in good] == sorted(g.step.total_s for g in good)
    for layout in good[:: max(1, len(good) // 20)]:
        case = MemoryCase(
            model=run.model, parallel=layout.parallel, world=16, latent=LATENT, dtype="bfloat16", micro_batch=layout.micro_batch
        )
        assert estimate(case).total == layout.memory.total <= limit_bytes(machine)
        p = layout.parallel
        assert layout.micro_batch * p.grad_accum * (16 // (p.sp.degree * p.tp)) == run.global_batch
    assert all(layout.problem for layout in found[len(good) :])


def test_what_is_printed_for_a_layout_is_a_config_that_holds():
    given = ["parallel.offload_activations=true", "parallel.tile_tokens=4096", "parallel.sp.scheme=usp", "parallel.sp.ulysses=4"]
    for overrides in ([], given):
        for layout in layouts(run_of(*overrides), machine_of(16)).layouts[::100]:
            config = load_config(TrainConfig, RECIPE, overrides=[*overrides, *layout.overrides.split()])
            assert config.parallel == layout.parallel, layout.overrides


def test_sequences_too_long_for_a_gpu_are_shared():
    """An eighth of a minute of 1080p: 360 latent frames of 136 x 240, by a VAE of 8 x 8 and 4 in time."""
    run = run_of("data.global_batch=8", latent=Thw(360, 136, 240))
    good = [layout for layout in layouts(run, machine_of(8)).layouts if layout.problem is None]
    assert good and all(layout.parallel.sp.degree > 1 for layout in good)


def test_a_node_reads_the_text_once_for_each_rank_that_shares_a_sample(capsys):
    for latent, degrees in (("1x32x32", {1}), ("360x136x240", {4, 8})):
        command = ["plan", str(RECIPE), "data.global_batch=8", "--gpus", "8", "--gpu", "h800", "--latent", latent, "--json"]
        assert main(command) == 0
        found = json.loads(capsys.readouterr().out)
        best, volume = found["layouts"][0], math.prod(found["latent"])
        degree = int(best["layout"].split("degree=")[1].split()[0])
        assert degree in degrees
        read = found["totals"]["loader_bytes_per_s"] * best["step"]["total_s"] / 8
        assert read == pytest.approx(2 * (4 * volume + 120 * 4096 * degree))


def test_a_plan_of_512_gpus_takes_at_most_ten_seconds():
    run = run_of("data.global_batch=512")
    began = time.process_time()
    assert len(layouts(run, machine_of(512)).layouts) > 1000
    assert time.process_time() - began < 10


def test_the_command_prints_layouts_money_and_json(capsys):
    command = ["plan", str(RECIPE), "--gpus", "64", "--gpu", "h800", "--latent", "64x64x64", "--dollars-per-gpu-hour", "2"]
    assert main(command) == 0
    said = capsys.readouterr().out
    assert "samples/s/GPU" in said and "GPU hours" in said and "$" in said and "docs/memory.md" in said
    assert main([*command, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    totals = found["totals"]
    assert totals["dollars"] == pytest.approx(2 * totals["gpu_hours"]) and totals["mfu"] == pytest.approx(0.45, abs=0.02)
    assert found["layouts"][0]["problem"] is None and found["parameters"] == 759_620_768
    assert totals["checkpoint_bytes"] == 16 * 759_620_768


def test_the_levers_in_the_docs_are_what_their_command_prints(capsys):
    page = Path("docs/plan.md").read_text()
    command, shown = re.search(r"```sh\nopensora-dist (plan [^\n]+)\n```\n\n((?: {4}[^\n]+\n)+)", page).groups()
    assert main(command.split()) == 0
    said = [line.rstrip() for line in capsys.readouterr().out.splitlines()]
    lines = [line[4:] for line in shown.splitlines()]
    assert len(lines) > 8 and lines == said[said.index(lines[0]) :][: len(lines)]


def test_a_run_that_fits_nowhere_is_exit_code_1(capsys):
    assert main(["plan", str(RECIPE), "parallel.sp.degree=1", "--gpus", "1", "--gpu", "4090", "--latent", "512x256x256"]) == 1
    said = capsys.readouterr().out
    assert said.count("GiB of 22") == 2 and "none of 132 layouts runs; nearest: " in said and "offloaded activations -> " in said


@pytest.mark.parametrize(
    "options, said",
    [
        (["--gpus", "0", "--gpu", "h80"], ["--gpus must be above 0", "did you mean 'h800'"]),
        (["--gpus", "12", "--gpu", "h800", "--use", "1.5"], ["no whole number of nodes", "--use must be above 0 and at most 1"]),
        (
            ["--gpus", "8", "--gpu", "h800", "--network-gbit", "nan", "--dollars-per-gpu-hour", "inf"],
            ["--network-gbit must be above 0, and is nan", "--dollars-per-gpu-hour must be 0 or more, and is inf"],
        ),
        (["--gpus", "8", "--gpu", "h800"], ["give --latent"]),
        (
            ["parallel.zero.backend=deepspeed", "--gpus", "8", "--gpu", "h800"],
            ["parallel.zero.backend=deepspeed is not planned", "plan with parallel.zero.backend=native"],
        ),
        (["--gpus", "8", "--gpu", "h800", "--latent", "64x64"], ["is not FRAMESxHEIGHTxWIDTH"]),
        (["--gpus", "8", "--gpu", "h800", "--latent", "64x65x64"], ["--latent 64x65x64"]),
    ],
)
def test_what_makes_no_sense_is_refused_with_the_way_out(options, said, capsys):
    assert main(["plan", str(RECIPE), *options]) == 2
    shown = capsys.readouterr().err
    assert all(part in shown for part in said), shown
