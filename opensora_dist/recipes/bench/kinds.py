"""Where a step's time goes: its operators or kernels, sorted into kinds by name."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch._C._autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

_TOP_NAMES = 3
OTHER, IDLE = "other", "idle"

KINDS: Final[dict[str, str]] = {
    "collectives": r"nccl|c10d::|gloo:|fsdp::|all_?gather|reduce_?scatter|all_?reduce",
    # Before products: names of attention kernels may have "gemm" in them.
    "attention": r"flash|fmha|sdpa|scaled_dot_product|short_attention|varlen_attention|\battention|_attention\b|softmax",
    "optimizer": r"adam|multi_tensor_apply|_foreach_|optimizer|lerp",
    "matrix products": r"gemm|gemv|cutlass|nvjet|xmma|splitk|cublas|triton_(tem|mm)|aten::(mm|addmm|bmm|baddbmm|convolution)",
    "GELU": r"gelu",
    "norms, modulation, gates": r"layer_?norm|norm_modulate|gated|gamma_?beta|rowwisemoments",
    "copies": r"memcpy|memset|aten::(copy_|_to_copy|cat|clone|fill_|zero_|masked_fill_?)|copy_kernel|catarray|direct_copy|fillfunctor",
    "other pointwise and sums": (
        r"elementwise|triton_(poi|red|per)_|reduce_kernel|pointwise|mul|add|sub\b|div|sum|mean|silu|where|sqrt|square|stack|index|"
        r"compiledfxgraph"
    ),
}
"""Kind by a pattern of names, of kernels on a GPU and of operators on a CPU; the first that is found anywhere in a name, in lower case.

What a compiler has put together has one name: a kernel with a LayerNorm in it counts as a norm, one with a GELU as GELU. Uncompiled,
modulation and gates are plain products and sums, and are counted there. On a CPU a compiled region is one name."""


@dataclass(frozen=True, kw_only=True)
class KindTimes:
    """Of one step of one rank.

    Args:
        milliseconds: By kind, in the order of ``KINDS``; ``other``: what no pattern knows; ``idle``: when nothing ran (on a GPU: it waited
            for the host; on a CPU: Python between operators).
        unknown: Names in ``other`` that took longest.
    """

    milliseconds: dict[str, float]
    unknown: tuple[str, ...] = ()

    @property
    def total_ms(self) -> float:
        """All of it."""
        return sum(self.milliseconds.values())

    def shares(self) -> dict[str, float]:
        """Of the whole, by kind; what is nothing is left out."""
        return {kind: ms / self.total_ms for kind, ms in self.milliseconds.items() if ms > 0}


@dataclass(frozen=True, kw_only=True)
class Ran:
    """One kernel (on a GPU) or operator (on a CPU).

    Args:
        name: Its own; where that says nothing, with the operator's that launched it before it.
        start_us: Since any moment.
        own_us: Its time without that of others inside it.
        end_us: As ``start_us``.
    """

    name: str
    start_us: float
    end_us: float
    own_us: float


def kind_of(name: str) -> str:
    """Of a kernel or an operator."""
    return next((kind for kind, pattern in KINDS.items() if re.search(pattern, name.lower())), OTHER)


def kind_times(ran: Iterable[Ran], *, wall_ms: float) -> KindTimes:
    """
    Args:
        ran: Everything in a step.
        wall_ms: Of the step. What runs at the same time on several streams counts once in ``idle``, and in full in its kinds.
    """
    events = list(ran)
    by_kind = dict.fromkeys((*KINDS, OTHER), 0.0)
    unknown: dict[str, float] = {}
    for event in events:
        kind = kind_of(event.name)
        by_kind[kind] += event.own_us / 1e3
        if kind == OTHER:
            unknown[event.name] = unknown.get(event.name, 0.0) + event.own_us
    by_kind[IDLE] = max(0.0, wall_ms - _covered_us(events) / 1e3)
    top = sorted(unknown, key=lambda name: -unknown[name])[:_TOP_NAMES]
    return KindTimes(milliseconds=by_kind, unknown=tuple(top))


def profiled(step: Callable[[], object], *, device: torch.device) -> KindTimes:
    """Runs the step under torch's profiler. Collective where the step is.

    A profile slows the host down, so that what a GPU waits for it is more than in a step that nobody watches.
    """
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # it talks on the standard error about starting and stopping
    cuda = device.type == "cuda"
    with profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]) as profiler:
        with torch.profiler.record_function(_STEP):
            step()
            if cuda:
                torch.cuda.synchronize(device)
    events: list[Any] = list(profiler.events() or ())
    whole = next(e for e in events if e.name == _STEP and e.device_type == DeviceType.CPU)
    ran = _kernels(events) if cuda else _operators(events)
    return kind_times(ran, wall_ms=(whole.time_range.end - whole.time_range.start) / 1e3)


_STEP = "bench step"


def _kernels(events: Iterable[Any]) -> list[Ran]:
    """What ran on the GPU, each with the name of the operator that launched it.

    A range that somebody named (the optimizer's step, FSDP2's) is there once more, on the GPU, over the kernels that are in it.
    """
    listed = list(events)
    by = {(k.name, k.duration): e.name for e in listed if e.device_type == DeviceType.CPU for k in e.kernels}
    ran = []
    for event in listed:
        if event.device_type != DeviceType.CUDA or event.is_user_annotation:
            continue
        start, end = event.time_range.start, event.time_range.end
        launcher = by.get((event.name, end - start), "")
        name = event.name if kind_of(event.name) != OTHER else f"{launcher} {event.name}".strip()
        ran.append(Ran(name=name, start_us=start, end_us=end, own_us=end - start))
    return ran


def _operators(events: Iterable[Any]) -> list[Ran]:
    """What ran on the CPU: operators, without what surrounds them (autograd's nodes, the optimizer's hooks)."""
    return [
        Ran(name=e.name, start_us=e.time_range.start, end_us=e.time_range.end, own_us=e.self_cpu_time_total)
        for e in events
        if e.device_type == DeviceType.CPU and _is_operator(e.name)
    ]


def _is_operator(name: str) -> bool:
    return ("::" in name or "CompiledFxGraph" in name) and not name.startswith(("autograd::", "torch::autograd::"))


def _covered_us(events: Iterable[Ran]) -> float:
    """When at least one of them ran."""
    covered, until = 0.0, float("-inf")
    for event in sorted(events, key=lambda e: e.start_us):
        covered += max(0.0, event.end_us - max(event.start_us, until))
        until = max(until, event.end_us)
    return covered
