"""Copies to the GPU run beside training: late or early, every batch is the one that a CPU is given."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
from dataset_factory import write_dataset

from opensora_dist.config.train import DataConfig
from opensora_dist.core.types import Region, Share, Thw
from opensora_dist.data.index import Index
from opensora_dist.data.loader import Loader
from opensora_dist.data.order import build_order
from opensora_dist.parallel.keys import Keys

CYCLES = 50_000_000
"""Some tens of milliseconds of a GPU: many times what reading a batch takes."""
STEPS = 8


@pytest.fixture
def index(tmp_path):
    write_dataset(tmp_path, samples={Thw(2, 16, 24): 26, Thw(4, 16, 16): 13})
    return Index.open(tmp_path)


def loader(index: Index, device: torch.device, *, slots: int = 1) -> Loader:
    return Loader(
        index,
        build_order(index, DataConfig(global_batch=6), keys=Keys(0)),
        share=lambda latent: Share(0, 1, Region.whole(latent)),
        accum=1,
        start_step=0,
        num_steps=STEPS,
        loss_weight="sample",
        reader_threads=2,
        prefetch_batches=slots,
        dtype=torch.float32,
        device=device,
    )


def tensors(step) -> list[torch.Tensor]:
    (micro,) = step.micros
    return [micro.latents_BCthw, micro.text_BYE, micro.text_mask_BY, micro.weight_B]


def busy(device: torch.device, stream: torch.cuda.Stream | None = None) -> None:
    """What the stream (None: this thread's) is given from here on, it does later."""
    if device.type == "cuda":
        with torch.cuda.stream(stream) if stream is not None else nullcontext():
            torch.cuda._sleep(CYCLES)


@pytest.mark.parametrize("slots", [1, 3])
@pytest.mark.parametrize("late", ["copies", "training"])
def test_batches_are_those_of_a_cpu_however_late_copies_or_training_are(index, device, slots, late):
    with loader(index, torch.device("cpu")) as cpu:
        wanted = [[t.clone() for t in tensors(step)] for step in cpu]
    kept = []
    with loader(index, device, slots=slots) as found:
        busy(device, found._copies)
        for step in found:
            # A copy of this step's batch, made when the device comes to it: by then the loader is steps ahead.
            busy(device, found._copies if late == "copies" else None)
            kept.append([t.clone() for t in tensors(step)])
            del step
    assert len(kept) == len(wanted) == STEPS
    for ours, right in zip(kept, wanted, strict=True):
        for a, b in zip(ours, right, strict=True):
            assert a.device.type == device.type
            torch.testing.assert_close(a.cpu(), b, rtol=1e-6, atol=1e-6)


def test_taking_batches_makes_the_host_wait_for_nothing_on_the_device(index, device):
    with loader(index, device, slots=3) as found:
        steps = iter(found)
        next(steps)
        if device.type == "cuda":
            torch.cuda.set_sync_debug_mode("error")  # of this thread: a reader may wait for its slot
        try:
            for _ in range(STEPS - 1):
                next(steps)
        finally:
            if device.type == "cuda":
                torch.cuda.set_sync_debug_mode("default")
        assert list(steps) == []
