"""bench share: the program of one rank of many, alone, held to the planner's word."""

from __future__ import annotations

import dataclasses
import json
import math

import pytest
import torch

from opensora_dist.cli.main import main
from opensora_dist.core.errors import ConfigError
from opensora_dist.parallel.offload import Offload
from opensora_dist.plan.memory import estimate
from opensora_dist.plan.pinned import pinned_bytes
from opensora_dist.recipes.bench import share
from opensora_dist.recipes.bench.share import measure_share, planned_case, share_lines, share_record
from opensora_dist.recipes.bench.step_inputs import step_case

CPU = torch.device("cpu")
SCALED_DOWN = {"depth": 4, "width": 96, "heads": 4, "clip": "16x32x32", "text_tokens": 8, "sp": 8, "scheme": "dsp", "zero": 2}


def _case(**levers):
    case = step_case(SCALED_DOWN, world=8, timeout_s=60)
    return dataclasses.replace(case, parallel=case.parallel.model_copy(update=levers))


@pytest.mark.parametrize("levers", [{}, {"recompute": "full", "offload_activations": True}], ids=str)
def test_the_peak_of_one_of_eight_ranks_alone_is_what_the_planner_says(levers):
    result = measure_share(_case(**levers), device=CPU, form="eager", steps=1, cap_bytes=None)
    assert result.within_bar, share_lines(result)
    assert result.step_s[0] > 0 and any("within 10%" in line for line in share_lines(result))
    made = json.loads(json.dumps(share_record(result), allow_nan=False))
    assert made["predicted"]["total"] == estimate(result.case).total and made["measured_bytes"] == result.measured_bytes
    assert (made["form"], made["device"], made["case"]["kernels"]) == ("eager", "cpu", "torch")


def test_the_planner_takes_no_lever_that_it_does_not_need_and_those_that_it_does():
    minute = step_case({"size": "XL", "clip": "360x136x240", "dtype": "bfloat16", "sp": 8, "zero": 2}, world=8, timeout_s=60)
    gib = 2**30
    easy = planned_case(_case(), form="eager", cap_bytes=80 * gib, host_bytes=0, gpu="h100")
    assert easy.parallel.recompute == "none" and not easy.parallel.offload_activations
    planned = planned_case(minute, form="eager", cap_bytes=80 * gib, host_bytes=120 * gib, gpu="h100")
    assert planned.parallel.offload_activations and planned.parallel.recompute != "none"
    assert estimate(planned).total < 72 * gib and estimate(planned).host < pinned_bytes(planned) < 120 * gib
    with pytest.raises(ConfigError, match=r"no combination of levers fits 80\.0 GiB of the device and 1\.0 GiB of CPU memory"):
        planned_case(minute, form="eager", cap_bytes=80 * gib, host_bytes=gib, gpu="h100")


def test_what_is_wrong_with_a_share_is_said(capsys, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)  # set for this process where tests/kernels is collected, too
    assert (
        main(["bench", "share", "--device", "cpu", "--form", "ours", "--steps", "0", "--memory-cap-gib", "0", "--ranks", "0"])
        == 2
    )
    said = capsys.readouterr().err
    assert "--form ours: run.kernels=triton needs a GPU" in said and "--steps must be 1" in said and "--memory-cap-gib" in said
    assert "--ranks must be 1 or more, and is 0" in said and "--form ours on a CPU" in said


def test_a_form_by_kernels_is_planned_and_held_to_the_formula_of_kernels():
    gib, case = 2**30, _case()
    by_torch, by_triton = (planned_case(case, form=f, cap_bytes=80 * gib, host_bytes=0, gpu="h100") for f in ("eager", "ours"))
    assert (by_torch.kernels, by_triton.kernels) == ("torch", "triton") and estimate(by_triton).total < estimate(by_torch).total
    least = estimate(by_triton).total * 1.001 / 0.9  # of which the planner keeps a tenth: enough for kernels only
    planned = [planned_case(case, form=f, cap_bytes=int(least), host_bytes=0, gpu="h100").parallel for f in ("eager", "ours")]
    assert planned[1] == by_triton.parallel != planned[0]


@pytest.mark.parametrize("chunks", [1, 2])
def test_cpu_memory_is_counted_as_pinned_memory_is_allocated_in_powers_of_two(chunks, monkeypatch):
    moved, to_host = [], Offload.to_host
    monkeypatch.setattr(
        Offload, "to_host", lambda self, device_bytes: (moved.append(len(device_bytes)), to_host(self, device_bytes))[1]
    )
    sp = _case().parallel.sp.model_copy(update={"chunks": chunks})
    case = _case(recompute="full", offload_activations=True, sp=sp)
    measure_share(case, device=CPU, form="eager", steps=1, cap_bytes=None)
    of_a_step = moved[: len(moved) // 2]
    assert sum(of_a_step) == estimate(case).host
    assert sum(1 << math.ceil(math.log2(n)) for n in of_a_step) == pinned_bytes(case) > estimate(case).host
    for more in ({"recompute": "selective"}, {"recompute": "none"}):
        other = _case(offload_activations=True, **more)
        assert pinned_bytes(other) == pytest.approx(2 * estimate(other).host)


def test_a_prediction_out_of_its_bar_is_exit_code_1_and_kept(tmp_path, monkeypatch, capsys):
    def twice(case):
        return dataclasses.replace(estimate(case), parameters=estimate(case).parameters + estimate(case).total)

    monkeypatch.setattr(share, "estimate", twice)
    assert share.share_command(_case(), device=CPU, form="eager", steps=1, cap_bytes=None, out=tmp_path) == 1
    assert "NOT within 10%" in capsys.readouterr().out
    assert json.loads((tmp_path / "share.json").read_text())["within_bar"] is False
