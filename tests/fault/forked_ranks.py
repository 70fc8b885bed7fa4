"""Whole ranks of a run that may die: each a process of its own, forked from one that has imported everything already.

A rank does what ``torchrun ... -m opensora_dist train ...`` would have it do, with a fault in it.
"""

from __future__ import annotations

import ctypes
import multiprocessing as mp
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist

from opensora_dist.checkpoint.commit import SAVE_PHASES, step_name
from opensora_dist.cli.main import main
from opensora_dist.models.layers import Block
from opensora_dist.parallel.zero.native import NativeBackend
from opensora_dist.resilience.endings import ENDINGS_VARIABLE, Ending, read_endings
from opensora_dist.train import loop, saving


@dataclass(frozen=True)
class Fault:
    """One rank gets a signal, or with ``rank=None`` each of them: in the middle of a step, or at a phase of that step's save."""

    place: str
    signal: int
    rank: int | None = 1
    step: int = 2

    def hits(self, rank: int) -> bool:
        """Whether it is this rank's."""
        return self.rank in (rank, None)


@dataclass(frozen=True)
class Ended:
    """How a rank ended. ``code`` is None for one that had not after the time given, which was killed then; ``noted`` is its own word."""

    code: int | None
    said: str
    after_s: float
    noted: Ending = Ending.KILLED


def run(args: Sequence[str], fault: Fault, *, world: int, logs: Path, limit_s: float) -> dict[int, Ended]:
    """Runs ``opensora-dist train ARGS`` as ``world`` ranks, waits for all but the one with the fault, and kills that."""
    logs.mkdir()
    store = dist.TCPStore("127.0.0.1", 0, world, is_master=True, wait_for_workers=False)
    context = mp.get_context("forkserver")
    context.set_forkserver_preload([__name__, "opensora_dist.recipes.train", "opensora_dist.cli.train"])
    ranks = [
        context.Process(target=_rank, args=(rank, world, store.port, str(logs / f"{rank}.log"), list(args), fault))
        for rank in range(world)
    ]
    try:
        for process in ranks:
            process.start()
        ended = _wait(ranks, fault=fault, logs=logs, limit_s=limit_s)
    finally:
        for process in ranks:
            process.kill()
            process.join()
    gone = {r: Ended(code=p.exitcode, said=(logs / f"{r}.log").read_text(), after_s=0.0) for r, p in enumerate(ranks)}
    noted = read_endings(_endings(logs), world=world)
    return {rank: replace(e, noted=noted[rank].ending) for rank, e in (gone | ended).items()}


def _endings(logs: Path) -> Path:
    return logs.with_name(f"{logs.name}-endings")


def _wait(ranks: Sequence[Any], *, fault: Fault, logs: Path, limit_s: float) -> dict[int, Ended]:
    """The other ranks' ends, timed from the fault on."""
    marker = logs / "fault"
    deadline = time.monotonic() + 120
    while not marker.exists():
        assert time.monotonic() < deadline and any(p.is_alive() for p in ranks), "the fault's place was not reached: " + "".join(
            p.read_text() for p in logs.iterdir()
        )
        time.sleep(0.02)
    began, ended = time.monotonic(), {}
    for rank, process in enumerate(ranks):
        if fault.rank is None or rank != fault.rank:
            process.join(max(0.0, began + limit_s - time.monotonic()))
            said = (logs / f"{rank}.log").read_text()
            ended[rank] = Ended(code=process.exitcode, said=said, after_s=time.monotonic() - began)
    return ended


def _rank(rank: int, world: int, port: int, log: str, args: list[str], fault: Fault) -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)
    handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(handle, 1)
    os.dup2(handle, 2)
    names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update({k: str(v) for k, v in names.items()}, TORCHELASTIC_USE_AGENT_STORE="True", GLOO_SOCKET_IFNAME="lo")
    os.environ[ENDINGS_VARIABLE] = str(_endings(Path(log).parent))
    torch.set_num_threads(1)

    def strike() -> None:
        Path(log).with_name("fault").touch()
        os.kill(os.getpid(), fault.signal)

    try:
        with _place(fault)(fault, strike) if fault.hits(rank) else _nothing():
            code = main(["train", *args])
    except BaseException:  # noqa: BLE001 - the test that reads the log sees it
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


@contextmanager
def _nothing() -> Iterator[None]:
    yield


@contextmanager
def _at_step(fault: Fault) -> Iterator[Callable[[], bool]]:
    """Whether the step under way is the fault's."""
    real, now = loop.train_step, [-1]

    def train_step(backend: Any, data: Any, **kwargs: Any) -> Any:
        now[0] = data.step
        return real(backend, data, **kwargs)

    with mock.patch.object(loop, "train_step", train_step):
        yield lambda: now[0] == fault.step


@contextmanager
def _in_forward(fault: Fault, strike: Callable[[], None]) -> Iterator[None]:
    """Between the collectives of two blocks."""
    real = Block._run

    def run(self: Block, x: Any, **kwargs: Any) -> Any:
        out = real(self, x, **kwargs)
        if now():
            strike()
        return out

    with _at_step(fault) as now, mock.patch.object(Block, "_run", run):
        yield


@contextmanager
def _in_backward(fault: Fault, strike: Callable[[], None]) -> Iterator[None]:
    """Once the gradient of a block's input is there."""
    real = Block._run

    def run(self: Block, x: Any, **kwargs: Any) -> Any:
        if now() and x.requires_grad:
            x.register_hook(lambda _grad: strike())
        return real(self, x, **kwargs)

    with _at_step(fault) as now, mock.patch.object(Block, "_run", run):
        yield


@contextmanager
def _in_clip(fault: Fault, strike: Callable[[], None]) -> Iterator[None]:
    """After the gradients are summed, before their norm is."""
    real = NativeBackend.clip

    def clip(self: NativeBackend, max_norm: float) -> Any:
        if now():
            strike()
        return real(self, max_norm)

    with _at_step(fault) as now, mock.patch.object(NativeBackend, "clip", clip):
        yield


@contextmanager
def _in_save(fault: Fault, strike: Callable[[], None]) -> Iterator[None]:
    """As the tensors of the step's checkpoint are written."""
    real = saving.save_tensors

    def save_tensors(tensors: Any, folder: Path, **kwargs: Any) -> None:
        if folder.parent.name.startswith(step_name(fault.step + 1)):
            strike()
        real(tensors, folder, **kwargs)

    with mock.patch.object(saving, "save_tensors", save_tensors):
        yield


@contextmanager
def _at_phase(fault: Fault, strike: Callable[[], None]) -> Iterator[None]:
    """At the start of a phase of the save after the fault's step."""
    real = saving.Saver.__init__

    def init(self: saving.Saver, *args: Any, on_phase: Callable[[str], None] = lambda _: None, **kwargs: Any) -> None:
        done = [0]

        def phase(name: str) -> None:
            on_phase(name)
            if name == fault.place and done[0] == fault.step + 1:
                strike()

        def begin(backend: Any, ema: Any, state: Any) -> None:
            done[0] = state.step
            saving.Saver.begin(self, backend, ema, state)

        real(self, *args, on_phase=phase, **kwargs)
        self.begin = begin  # type: ignore[method-assign]

    with mock.patch.object(saving.Saver, "__init__", init):
        yield


_PLACES = {"forward": _in_forward, "backward": _in_backward, "clip": _in_clip, "save": _in_save}


def _place(fault: Fault) -> Callable[..., Any]:
    return _at_phase if fault.place in SAVE_PHASES else _PLACES[fault.place]
