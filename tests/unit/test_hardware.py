"""Peaks that MFU is stated against, and ranks against GPUs; CUDA is played by stand-ins."""

from __future__ import annotations

import pytest
import torch

from opensora_dist.config.load import load_config
from opensora_dist.config.train import TrainConfig
from opensora_dist.core.errors import ConfigError
from opensora_dist.plan.hardware import peak_flops
from opensora_dist.recipes.checks import rank_problems
from opensora_dist.recipes.train import check


@pytest.mark.parametrize(
    "name, peak",
    [
        ("NVIDIA H100 80GB HBM3", 989.5e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H100 NVL", 835e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA H800", 989.5e12),
        ("Some Future Part", None),
    ],
)
def test_a_gpu_has_the_bf16_peak_of_its_part(monkeypatch, name, peak):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    assert peak_flops(torch.device("cuda"), dtype="bfloat16") == peak
    assert peak_flops(torch.device("cuda"), dtype="float32") is None


def test_a_cpus_peak_is_measured():
    assert peak_flops(torch.device("cpu"), dtype="float32") > 1e9


def test_more_ranks_than_gpus_are_refused_before_any_is_started(monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    config = load_config(TrainConfig, None, overrides=["parallel.nproc=3"])
    assert rank_problems(config) == []  # no GPU: on the CPU any number will do
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    (problem,) = rank_problems(config)
    assert problem.message.startswith("parallel.nproc=3 exceeds the 2 GPU(s)")
    assert rank_problems(load_config(TrainConfig, None, overrides=["parallel.nproc=3", "run.device=cpu"])) == []
    assert rank_problems(load_config(TrainConfig, None, overrides=["parallel.nproc=2"])) == []


def test_a_gpu_that_is_not_there_is_one_problem_among_the_others(monkeypatch, tmp_path):
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    overrides = ["run.device=cuda", "parallel.nproc=2", "data.path=nowhere", "data.global_batch=3", "validation.sampler=ddpm"]
    with pytest.raises(ConfigError) as caught:
        check(None, overrides=overrides)
    said = [p.split("=")[0] for p in caught.value.problems]
    assert said == ["run.device", "data.path", "data.global_batch", "validation.sampler"]
