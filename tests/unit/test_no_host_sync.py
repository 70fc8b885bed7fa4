"""In a step the host waits for the device at no time but where ``host_sync_cases.ALLOWED`` says, whatever the layout."""

from __future__ import annotations

import multiprocessing
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor

import pytest
from host_sync_cases import ALLOWED, PLANTED, Layout, found, watch, watch_iddpm

LAYOUTS = {
    "zero 3, dsp, selective recompute, tiles": Layout(
        world=2, parallel={"sp": {"degree": 2}, "zero": {"stage": 3}, "recompute": "selective", "tile_tokens": 32}
    ),
}
MORE = {
    "one GPU, in bfloat16, two micro-batches": Layout(dtype="bfloat16", parallel={"grad_accum": 2}),
    "a pack": Layout(packed=True),
    "zero 1": Layout(world=2, parallel={"zero": {"stage": 1}}),
    "zero 2, accumulated": Layout(world=2, parallel={"zero": {"stage": 2}, "grad_accum": 2}),
    "zero 3 in bfloat16, with replicas": Layout(world=4, parallel={"zero": {"stage": 3}, "dp_replicate": 2}, dtype="bfloat16"),
    "ulysses in bfloat16": Layout(world=2, parallel={"sp": {"degree": 2, "scheme": "ulysses"}}, dtype="bfloat16"),
    "fastseq, full recompute": Layout(world=2, parallel={"sp": {"degree": 2, "scheme": "fastseq"}, "recompute": "full"}),
    "ring": Layout(world=2, parallel={"sp": {"degree": 2, "scheme": "ring"}}),
    "allgather": Layout(world=2, parallel={"sp": {"degree": 2, "scheme": "allgather"}}),
    "usp": Layout(world=4, parallel={"sp": {"degree": 4, "scheme": "usp", "ulysses": 2}}),
    "dit over a ring": Layout(world=2, parallel={"sp": {"degree": 2, "scheme": "ring"}}, model="dit"),
    "tensor parallelism": Layout(world=2, parallel={"tp": 2, "zero": {"stage": 1}}),
    "a pack over ranks": Layout(world=2, parallel={"sp": {"degree": 2}}, packed=True),
    "our kernels": Layout(kernels="triton"),
    "our kernels, a pack in bfloat16": Layout(kernels="triton", packed=True, dtype="bfloat16"),
}


@pytest.fixture(scope="module")
def process() -> Iterator[ProcessPoolExecutor]:
    """A process of its own: the device that it pretends to have, it keeps."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        yield pool


@pytest.mark.parametrize("name", [*LAYOUTS, *(pytest.param(name, marks=pytest.mark.slow) for name in MORE)])
def test_the_host_waits_for_no_number_of_the_device_but_at_log_steps_and_saves(process, name):
    layout = (LAYOUTS | MORE)[name]
    seen = process.submit(watch, layout).result(timeout=240)
    assert set(seen.waited) == set(ALLOWED)
    # Noise, levels and dropped captions of each micro-batch; latents and text come by the loader.
    assert len(seen.sent) == 3 * (layout.parallel.get("grad_accum", 1) + layout.packed)


def test_the_loss_of_iddpm_is_waited_for_by_nobody(process):
    process.submit(watch_iddpm).result(timeout=60)


@pytest.mark.parametrize("wait", PLANTED, ids=lambda wait: wait.__name__)
def test_whatever_makes_the_host_wait_is_found(process, wait):
    assert process.submit(found, wait).result(timeout=60)
