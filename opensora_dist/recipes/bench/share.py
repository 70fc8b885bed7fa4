"""One rank's share of a sequence that many ranks hold, run alone on one device: what the planner says it needs, and what it took.

The process is rank 0 of a group whose other ranks don't exist. It runs the program of that rank, to the byte: its frames, the all-to-alls'
buffers, its shards of weights. What others would have sent is what this rank holds itself, so nothing that it computes is of use, and no
time of it has a transfer in it. Everything else is a training's own step.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from opensora_dist.core.errors import ConfigError
from opensora_dist.core.io import write_json
from opensora_dist.data.loader import MicroBatch, StepData
from opensora_dist.ops.choice import current
from opensora_dist.parallel.mesh import Mesh
from opensora_dist.parallel.sequence.base import Links
from opensora_dist.parallel.sequence.exchange import Exchange, Pending
from opensora_dist.parallel.sequence.layout import SequenceParallel
from opensora_dist.parallel.zero.native import NativeBackend
from opensora_dist.plan.hardware import gpu_of
from opensora_dist.plan.layouts import Run, judged, memory_levers
from opensora_dist.plan.memory import MemoryCase, estimate
from opensora_dist.plan.moment import MemoryEstimate
from opensora_dist.plan.pinned import pinned_bytes
from opensora_dist.plan.time import Machine
from opensora_dist.recipes.auto import sample_cost
from opensora_dist.recipes.bench.memory import peak_memory
from opensora_dist.recipes.bench.rounds import timed
from opensora_dist.recipes.bench.scale import simulated
from opensora_dist.recipes.bench.show import about, three
from opensora_dist.recipes.bench.step_forms import FORMS, case_of_form
from opensora_dist.recipes.bench.step_show import case_record
from opensora_dist.recipes.bench.training import Training, meta_model
from opensora_dist.recipes.shards import LatentShards

BAR = 0.10
"""What prediction and measurement may differ by, of the measurement."""


@dataclass(frozen=True, kw_only=True)
class ShareResult:
    """
    Args:
        case: Of all ranks together, by the kernels of the form.
        form: Of ``step_forms.FORMS``.
        cap_bytes: What the allocator was held to; None: nothing (on a CPU).
        predicted: By the planner, of the rank that holds most.
        measured_bytes: At most at once, of the device's memory.
        step_s: Of steps after the first, without any transfer between ranks.
        computed_by: What operators went by.
        device: cpu or cuda.
    """

    case: MemoryCase
    form: str
    cap_bytes: int | None
    predicted: MemoryEstimate
    measured_bytes: int
    step_s: tuple[float, ...]
    computed_by: str
    device: str

    @property
    def ratio(self) -> float:
        """Predicted over measured."""
        return self.predicted.total / self.measured_bytes

    @property
    def within_bar(self) -> bool:
        """Whether the planner told the truth."""
        return abs(self.ratio - 1) <= BAR


class EchoExchange(Exchange):
    """Transfers in which each rank hears itself: fresh memory for what arrives, as of a real one, filled with what was sent."""

    def all_to_all(self, send: Tensor, *, send_rows: Sequence[int], recv_rows: Sequence[int]) -> Pending:
        recv = send.new_empty((sum(recv_rows), *send.shape[1:]))
        return Pending(_echo(recv, send), [], exchange=self, what="echo")

    def shift(self, send: Tensor, *, into: Tensor, by: int = 1) -> Pending:
        return Pending(_echo(into, send), [], exchange=self, what="echo")

    def gather(self, send: Tensor, *, parts: Sequence[Tensor]) -> Pending:
        for rank, part in enumerate(parts):
            if rank != self.rank:
                _echo(part, send)
        return Pending(send, [], exchange=self, what="echo")


def _echo(into: Tensor, send: Tensor) -> Tensor:
    """``send``, as often as there is room for it, by rows."""
    if len(send) == 0:
        return into.zero_()
    for part in torch.split(into, len(send)):
        part.copy_(send[: len(part)])
    return into


class _Alone(LatentShards):
    """With nobody to agree with."""

    def agree(self, data: StepData, parts: Sequence[MicroBatch]) -> list[MicroBatch]:
        return list(parts)


class ShareTraining(Training):
    """A training whose rank 0 runs alone."""

    def _shards(self, mesh: Mesh) -> LatentShards:
        echoing = {
            degree: Links(
                sp=EchoExchange(links.sp.group), ring=EchoExchange(links.ring.group), ulysses=EchoExchange(links.ulysses.group)
            )
            for degree, links in mesh.links.items()
        }
        mesh = replace(mesh, links=echoing)
        return _Alone(mesh, SequenceParallel(mesh, self.case.parallel.sp), self.model)


def planned_case(case: MemoryCase, *, form: str, cap_bytes: int, host_bytes: int, gpu: str) -> MemoryCase:
    """The case with the levers under which the planner has it fastest, and of equally fast ones those that need least of the device.

    Args:
        case: Its model, sequence parallelism, latents and global batch are kept.
        form: Of ``step_forms.FORMS``; whose kernels compute it.
        cap_bytes: Of a GPU's memory; the planner keeps its reserve of it.
        host_bytes: CPU memory that a rank may fill, as pinned memory is allocated.
        gpu: Whose speed is reckoned with.
    Raises:
        ConfigError: No combination fits.
    """
    case = case_of_form(case, form)
    model = meta_model(case)
    grid = model.token_grid(case.latent)
    machine = Machine(gpu=replace(gpu_of(gpu), memory_bytes=cap_bytes), gpus=case.world, per_node=case.world)
    groups = case.world // case.parallel.sp.degree
    run = Run(
        model=case.model,
        parallel=case.parallel,
        global_batch=groups * case.micro_batch,
        latent=case.latent,
        dtype=case.dtype,
        cost=sample_cost(model, grid, text_tokens=case.text_tokens),
        channels=case.channels,
        text_width=case.text_width,
        text_tokens=case.text_tokens,
        kernels=case.kernels,
    )
    found = [judged(run, parallel, machine) for parallel in memory_levers(case.parallel)]
    fit = []
    for layout in found:
        if layout.step is not None and layout.memory is not None:
            made = replace(case, parallel=layout.parallel, micro_batch=layout.micro_batch)
            if pinned_bytes(made) <= host_bytes:
                fit.append((layout.step.total_s, layout.memory.total, made))
    if not fit:
        least = min((f.memory.total for f in found if f.memory is not None), default=0)
        raise ConfigError(
            f"no combination of levers fits {cap_bytes / 2**30:.1f} GiB of the device and {host_bytes / 2**30:.1f} GiB of CPU memory; on the "
            f"device the least is {least / 2**30:.1f} GiB and the planner's reserve; raise --host-gib, --memory-cap-gib or --ranks"
        )
    return min(fit, key=lambda one: one[:2])[2]


def measure_share(case: MemoryCase, *, device: torch.device, form: str, steps: int, cap_bytes: int | None) -> ShareResult:
    """Runs rank 0 of the case alone, in a process that has no process group.

    Args:
        form: Of ``step_forms.FORMS``.
        steps: That are timed, after one that isn't.
        cap_bytes: That the CUDA allocator may have; None: all.
    """
    case = case_of_form(case, form)
    if device.type == "cuda":
        torch.cuda.set_device(device)
        total = torch.cuda.get_device_properties(device).total_memory
        torch.cuda.set_per_process_memory_fraction(1.0 if cap_bytes is None else min(1.0, cap_bytes / total), device)
    made: list[ShareTraining] = []
    with simulated(case.world), peak_memory(device, parked=lambda: made[0].parked_bytes if made else 0) as peak:
        made.append(ShareTraining(case, device))
        training = made[0]
        assert isinstance(training.backend, NativeBackend)
        with training.backend.silent(), FORMS[form](training):
            training.step()
            peak.restart()
            seconds = tuple(timed(training.step, device=device) for _ in range(steps))
            computed_by = str(current())
        most = peak.most()
    return ShareResult(
        case=case,
        form=form,
        cap_bytes=cap_bytes,
        predicted=estimate(case),
        measured_bytes=most,
        step_s=seconds,
        computed_by=computed_by,
        device=device.type,
    )


def share_command(
    case: MemoryCase, *, device: torch.device, form: str, steps: int, cap_bytes: int | None, out: Path | None
) -> int:
    """Measures, prints and writes ``share.json``.

    Returns:
        1 where prediction and measurement differ by more than the bar.
    """
    result = measure_share(case, device=device, form=form, steps=steps, cap_bytes=cap_bytes)
    for line in share_lines(result):
        print(line)
    if out is not None:
        write_json(out / "share.json", share_record(result))
        print(out / "share.json")
    return 0 if result.within_bar else 1


def share_lines(result: ShareResult) -> list[str]:
    """For people."""
    case, p = result.case, result.case.parallel
    model = meta_model(case)
    tokens = model.token_grid(case.latent).volume // p.sp.degree
    levers = [f"ZeRO {p.zero.stage}", f"recompute {p.recompute}"]
    levers += ["activations offloaded"] if p.offload_activations else []
    levers += [] if p.zero.offload == "none" else [f"{p.zero.offload} of ZeRO offloaded"]
    levers += [f"tiles of {p.tile_tokens} tokens"] if p.tile_tokens else []
    cap = "no cap" if result.cap_bytes is None else f"capped at {result.cap_bytes / 2**30:.1f} GiB"
    return [
        f"{case.model.name}, latents {case.latent}, {tokens:,} tokens of one of the {p.sp.degree} ranks that share a sample, alone on this device, {cap}",
        f"levers: {', '.join(levers)}; {result.computed_by}",
        f"peak: {result.predicted.total / 2**30:.3f} GiB predicted ({result.predicted.moment}), {result.measured_bytes / 2**30:.3f} GiB "
        f"measured; ratio {result.ratio:.3f}, {'within' if result.within_bar else 'NOT within'} {BAR:.0%}",
        f"a step without what ranks send: {', '.join(three(s) for s in result.step_s)} s",
    ]


def share_record(result: ShareResult) -> dict[str, Any]:
    """As JSON values."""
    return {
        "format": 1,
        "kind": "share",
        "case": case_record(result.case),
        "form": result.form,
        "device": result.device,
        "cap_bytes": result.cap_bytes,
        "predicted": {**asdict(result.predicted), "total": result.predicted.total},
        "measured_bytes": result.measured_bytes,
        "ratio": result.ratio,
        "within_bar": result.within_bar,
        "bar": BAR,
        "step_s": list(result.step_s),
        "computed_by": result.computed_by,
        **about(1),
    }
