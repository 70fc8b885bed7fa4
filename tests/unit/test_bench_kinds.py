"""Where a step's time goes: kernels by their names, each once."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace

import pytest
from torch._C._autograd import DeviceType

import opensora_dist
from opensora_dist.recipes.bench.kinds import IDLE, KINDS, OTHER, Ran, _kernels, kind_of, kind_times


def test_kernels_are_sorted_by_their_names_and_what_nobody_knows_is_named():
    names = {
        "matrix products": [
            "nvjet_tst_192x192_64x4_2x1_v_bz_coopB_TNN",
            "sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n",
            "aten::addmm",
        ],
        "attention": [
            "void pytorch_flash::flash_bwd_dq_dk_dv_loop_seqk_parallel_kernel<>",
            "fmha_cutlassF_bf16_aligned_64x128_rf_sm80",
        ],
        "norms, modulation, gates": ["triton_per_fused_add_mul_native_layer_norm_3", "vectorized_layer_norm_kernel"],
        "GELU": ["triton_poi_fused_gelu_5", "void at::native::GeluCUDAKernelImpl"],
        "optimizer": ["void at::native::multi_tensor_apply_kernel<FusedAdamMathFunctor>"],
        "collectives": ["ncclDevKernel_ReduceScatter_Sum_f32_RING_LL"],
        "copies": ["Memcpy HtoD (Pinned -> Device)", "void at::native::bfloat16_copy_kernel_cuda"],
        "other pointwise and sums": [
            "void at::native::vectorized_elementwise_kernel<4, CUDAFunctor_add<float>>",
            "triton_red_fused_sum_2",
        ],
        OTHER: ["strange"],
    }
    for kind, kernels in names.items():
        assert {kind_of(name) for name in kernels} == {kind}, kernels
    ran = [
        Ran(name="aten::mm", start_us=0, end_us=4000, own_us=4000),
        Ran(name="strange", start_us=3000, end_us=6000, own_us=3000),
    ]
    times = kind_times(ran, wall_ms=10)
    assert times.milliseconds[IDLE] == 4 and times.unknown == ("strange",) and set(times.milliseconds) == {*KINDS, OTHER, IDLE}
    assert times.shares() == pytest.approx({"matrix products": 4 / 11, OTHER: 3 / 11, IDLE: 4 / 11})


def _event(name, start, end, *, on=DeviceType.CUDA, launches=(), annotation=False):
    launched = [SimpleNamespace(name=name, duration=duration) for name, duration in launches]
    span = SimpleNamespace(start=start, end=end)
    return SimpleNamespace(name=name, device_type=on, kernels=launched, time_range=span, is_user_annotation=annotation)


def test_of_what_ran_on_a_gpu_each_kernel_counts_once_and_named_ranges_over_them_do_not():
    cpu = DeviceType.CPU
    events = [
        _event("opensora::gated", 0, 1, on=cpu, launches=[("_forward", 30)]),
        _event("Optimizer.step#AdamW.step", 40, 90, on=cpu, annotation=True),
        _event("bench step", 10, 100, annotation=True),
        _event("_forward", 10, 40),
        _event("Optimizer.step#AdamW.step", 40, 90, annotation=True),
        _event("multi_tensor_apply_kernel<FusedAdam>", 40, 90),
        _event("FSDP::all_gather", 90, 95, annotation=True),
        _event("unknown", 95, 96),
    ]
    ran = _kernels(events)
    assert [(r.name, r.own_us) for r in ran] == [
        ("opensora::gated _forward", 30),
        ("multi_tensor_apply_kernel<FusedAdam>", 50),
        ("unknown", 1),
    ]
    times = kind_times(ran, wall_ms=0.1).milliseconds
    assert times["optimizer"] == 0.05 and times["collectives"] == 0 and times[IDLE] == pytest.approx(0.1 - 0.081)


def test_each_of_this_projects_kernels_has_a_kind_by_its_name():
    """A kernel's of a GPU, and the operator's that a CPU shows."""
    folder = Path(opensora_dist.__file__).parents[1] / "kernels/opensora_kernels"
    text = "\n".join(path.read_text() for path in folder.glob("*.py"))
    names = re.findall(r'custom_op\(\s*"(opensora::\w+)"', text) + re.findall(r"def (_\w+_(?:forward|backward)\w*)\(", text)
    assert len(set(names)) == len(names) >= 12 + 13  # two operators to each of six files, two kernels and one more
    kinds = {"attention": "attention", "gelu": "GELU", "": "norms, modulation, gates"}
    for name in names:
        assert kind_of(name) == next(kind for part, kind in kinds.items() if part in name), name
