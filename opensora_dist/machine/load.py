"""GPUs that compute for some seconds: whether each is right, as fast as the others, and neither hot nor held back."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Final

import torch
from torch import Tensor

from opensora_dist.machine.finding import Finding, Level, Subject
from opensora_dist.machine.gpus import SmiError, loaded_findings, query_gpus

_SUBJECT: Final = Subject("gpus")
_SECONDS = 2.0
_SIZE = 4096
_PRODUCTS = 20  # of a turn
_LEAST_SHARE = 0.8  # of the rate that others have: healthy GPUs of a kind differ by some percent
_MODULUS = 17  # odd, so that no two neighbouring tiles of a kernel are alike


def factor(size: int) -> Tensor:
    """[size, size], integers of -8 to 8, in bfloat16."""
    return torch.arange(size**2).remainder(_MODULUS).sub(8).view(size, size).bfloat16()


def product(size: int) -> Tensor:
    """``factor(size) @ factor(size)`` in bfloat16, exactly.

    All sums are integers below 2^24, so that float32 holds each, in whatever order they are summed: every GPU has to give this result,
    and not merely the same as others. Rows and columns repeat, which saves most of the work.
    """
    whole = factor(size).float()
    rows, columns = whole[:_MODULUS], whole[:, :_MODULUS]  # row i is row i % 17, as i * size is it modulo 17
    few = (rows @ columns).bfloat16()
    index = torch.arange(size) % _MODULUS
    return few[index][:, index]


def wrong_numbers(a: Tensor, right: Tensor) -> Tensor:
    """How many numbers of the products of one turn are wrong; every one is looked at. Doesn't wait for the device."""
    return torch.stack([(a @ a != right).sum() for _ in range(_PRODUCTS)]).sum()


def under_load(*, clock_share: float) -> list[Finding]:
    """All GPUs multiply matrices for about two seconds: results are compared with exact ones, rates with each other's, clocks read.

    Args:
        clock_share: What of its highest clock a GPU must run at least.
    """
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False  # partial sums in bfloat16 would not be exact
    devices = [torch.device("cuda", i) for i in range(torch.cuda.device_count())]
    factors, rights = ([made.to(device) for device in devices] for made in (factor(_SIZE), product(_SIZE)))
    wrong, times = [0 for _ in devices], [list[float]() for _ in devices]
    with ThreadPoolExecutor(1) as asked:
        began, answer = time.perf_counter(), None
        while (took := time.perf_counter() - began) < _SECONDS or (answer is not None and not answer.done()):
            for i, (count, seconds) in enumerate(_turn(devices, factors, rights)):
                wrong[i] += count
                times[i].append(seconds)
            if answer is None and took > _SECONDS / 2:  # they have left their idle clocks by then
                answer = asked.submit(query_gpus)
    # The first turn loads kernels.
    rates = [2 * _SIZE**3 * _PRODUCTS / statistics.median(of_one[1:] or of_one) for of_one in times]
    names = [torch.cuda.get_device_name(device) for device in devices]
    said = ", ".join(f"{rate / 1e12:.0f}" for rate in rates) + f" TFLOP/s in products of {_SIZE} (bfloat16)"
    found = [_SUBJECT.finding("under load", Level.OK, said, values={"flops_per_s": rates, "turns": len(times[0])})]
    found += wrong_findings(wrong) + slower_findings(names, rates)
    mine = {str(torch.cuda.get_device_properties(device).uuid) for device in devices}
    try:
        seen = answer.result().gpus if answer is not None else ()
    except SmiError as error:
        return [*found, _SUBJECT.finding("nvidia-smi", Level.PROBLEM, str(error), "restart the driver or the machine")]
    for gpu in seen:
        if gpu.uuid.removeprefix("GPU-") in mine:
            found += loaded_findings(gpu, clock_share=clock_share)
    return found


def _turn(devices: Sequence[torch.device], factors: Sequence[Tensor], rights: Sequence[Tensor]) -> list[tuple[int, float]]:
    """Wrong numbers and seconds of each GPU, all of which work at once. Seconds are the GPU's own."""
    begun = []
    for device, a, right in zip(devices, factors, rights):
        with torch.cuda.device(device):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
            start.record()
            wrong = wrong_numbers(a, right)
            end.record()
        begun.append((wrong, start, end))
    return [(int(wrong), start.elapsed_time(end) / 1e3) for wrong, start, end in begun]  # int() waits for the GPU


def wrong_findings(wrong: Sequence[int]) -> list[Finding]:
    """GPUs that compute something else than what is right.

    Args:
        wrong: Numbers that were wrong, by GPU of torch.
    """
    way_out = "take the node out of service and have its GPUs tested (`dcgmi diag -r 3`)"
    said = "of the products of two matrices of integers are wrong"
    return [
        _SUBJECT.finding(f"GPU {i} (of torch)", Level.PROBLEM, f"{count} numbers {said}", way_out)
        for i, count in enumerate(wrong)
        if count
    ]


def slower_findings(names: Sequence[str], rates: Sequence[float]) -> list[Finding]:
    """GPUs that are much slower than others of their name.

    Args:
        names: What kind each is.
        rates: FLOP/s.
    """
    found = []
    for i, (name, rate) in enumerate(zip(names, rates)):
        usual = statistics.median_high(other for its, other in zip(names, rates) if its == name)
        if rate < _LEAST_SHARE * usual:
            said = f"{rate / 1e12:.3g} TFLOP/s, less than {_LEAST_SHARE:g} of the {usual / 1e12:.3g} that others have"
            way_out = "see what else uses it, look at its power and cooling, or take the node out of service"
            found.append(_SUBJECT.finding(f"GPU {i} (of torch)", Level.PROBLEM, said, way_out))
    return found
