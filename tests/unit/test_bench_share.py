"""bench share: the program of one rank of many, alone, held to the planner's word."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch

from opensora_dist.cli.main import main
from opensora_dist.core.errors import ConfigError
from opensora_dist.plan.memory import estimate
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


def test_the_planner_takes_no_lever_that_it_does_not_need_and_those_that_it_does():
    minute = step_case({"size": "XL", "clip": "360x136x240", "dtype": "bfloat16", "sp": 8, "zero": 2}, world=8, timeout_s=60)
    gib = 2**30
    easy = planned_case(_case(), cap_bytes=80 * gib, host_bytes=0, gpu="h100")
    assert easy.parallel.recompute == "none" and not easy.parallel.offload_activations
    planned = planned_case(minute, cap_bytes=80 * gib, host_bytes=100 * gib, gpu="h100")
    assert planned.parallel.offload_activations and planned.parallel.recompute != "none"
    assert estimate(planned).total < 72 * gib and estimate(planned).host < 100 * gib
    with pytest.raises(ConfigError, match=r"no combination of levers fits 80\.0 GiB of the device and 1\.0 GiB of CPU memory"):
        planned_case(minute, cap_bytes=80 * gib, host_bytes=gib, gpu="h100")


def test_what_is_wrong_with_a_share_is_said(capsys):
    assert main(["bench", "share", "--device", "cpu", "--form", "ours", "--steps", "0", "--memory-cap-gib", "0"]) == 2
    said = capsys.readouterr().err
    assert "--form ours: run.kernels=triton needs a GPU" in said and "--steps must be 1" in said and "--memory-cap-gib" in said
