"""Gloo ranks shared by all multi-process tests: started once, time-limited, gone with the test process.

A test hands ``RankPool.run`` a module-level function; each rank runs it inside a process group of the size the test asks for. When a
rank raises, or the limit passes, the test fails with every rank's traceback and the ranks are replaced.
"""

from __future__ import annotations

import ctypes
import gc
import multiprocessing as mp
import os
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from typing import Any

LIMIT_S = 120.0
_START_S = 60.0  # importing torch on a busy machine
_CROWDED = 300
"""Threads of a rank from which on it is replaced: groups that a test left behind keep theirs, and every later test is slower for it."""


def _serve(rank: int, pipe: Connection) -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # die with the test process, however it ends
    import torch
    import torch.distributed as dist
    from torch.distributed.tensor._redistribute import clear_redistribute_planner_cache
    from torch.distributed.tensor.debug import _clear_sharding_prop_cache

    torch.set_num_threads(1)
    gc.freeze()  # what was imported stays, and need not be looked through after every test
    pipe.send(("ready", None))
    while True:
        function, args, world, store = pipe.recv()
        os.environ.update(RANK=str(rank), WORLD_SIZE=str(world), LOCAL_RANK=str(rank))
        try:
            dist.init_process_group(
                "gloo", store=dist.FileStore(store, world), rank=rank, world_size=world, timeout=timedelta(seconds=60)
            )
            try:
                answer = ("result", function(*args))
            finally:
                dist.destroy_process_group()
                # Meshes of equal shape are equal to these caches, and the next test's groups have other names.
                _clear_sharding_prop_cache()
                clear_redistribute_planner_cache()
                _number_modules_from_zero()
                gc.collect()  # modules and meshes are cycles, and groups in them have threads
        except BaseException:  # noqa: BLE001 - it is shown by the test that asked
            answer = ("error", traceback.format_exc())
        pipe.send(answer)


def _number_modules_from_zero() -> None:
    """DeepSpeed numbers modules and parameters per process and compares them between ranks; not every test is run by every rank."""
    if "deepspeed.runtime.zero" not in sys.modules:
        return
    from deepspeed.runtime.zero.parameter_offload import DeepSpeedZeRoOffload
    from deepspeed.runtime.zero.partition_parameters import Init

    Init.param_id = 0
    DeepSpeedZeRoOffload._register_deepspeed_module.__defaults__[0][0] = 0


class RankPool:
    """Up to ``size`` ranks."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._processes: list[Any] = []
        self._crowded = False
        self._pipes: list[Connection] = []

    def run(self, function: Callable[..., Any], *args: Any, world: int, limit_s: float = LIMIT_S) -> list[Any]:
        """What ``function(*args)`` returned on each of ``world`` ranks, by rank."""
        assert world <= self._size, (world, self._size)
        dead = {rank: p.exitcode for rank, p in enumerate(self._processes) if not p.is_alive()}
        if dead:
            self.close()
            raise AssertionError(f"ranks ended between two tests, with exit codes {dead}; the next test gets new ones")
        if self._crowded:
            self.close()
        if not self._processes:
            self._start()
        with tempfile.TemporaryDirectory() as folder:
            for pipe in self._pipes[:world]:
                pipe.send((function, args, world, os.path.join(folder, "store")))
            answers = self._collect(world, limit_s)
        missing = [rank for rank in range(world) if rank not in answers]
        errors = {rank: text for rank, (kind, text) in answers.items() if kind == "error"}
        if missing or errors:
            self.close()
            said = "\n".join(f"--- rank {rank}\n{text}" for rank, text in sorted(errors.items()))
            raise AssertionError(f"ranks {missing} gave no answer within {limit_s} s\n{said}" if missing else said)
        self._crowded = any(_threads(process.pid) > _CROWDED for process in self._processes)
        return [answers[rank][1] for rank in range(world)]

    def close(self) -> None:
        """Ends the ranks; the next ``run`` starts new ones."""
        for process in self._processes:
            process.kill()
            process.join()
        self._processes, self._pipes, self._crowded = [], [], False

    def _start(self) -> None:
        context = mp.get_context("spawn")
        for rank in range(self._size):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(rank, theirs), daemon=True)
            process.start()
            theirs.close()
            self._processes.append(process)
            self._pipes.append(ours)
        ready = self._collect(self._size, _START_S)
        assert len(ready) == self._size, f"only ranks {sorted(ready)} of {self._size} started"

    def _collect(self, world: int, limit_s: float) -> dict[int, tuple[str, Any]]:
        deadline = time.monotonic() + limit_s
        answers: dict[int, tuple[str, Any]] = {}
        waiting = dict(zip(self._pipes[:world], range(world)))
        while waiting and time.monotonic() < deadline:
            # Once a rank failed, the others are stuck in a collective it will never join: a short grace, then the tracebacks.
            if any(kind == "error" for kind, _ in answers.values()):
                deadline = min(deadline, time.monotonic() + 5)
            for pipe in wait(list(waiting), timeout=0.2):
                rank = waiting.pop(pipe)  # type: ignore[arg-type]
                try:
                    answers[rank] = pipe.recv()  # type: ignore[union-attr]
                except EOFError:
                    answers[rank] = ("error", "the process died without a word")
        return answers


def _threads(pid: int) -> int:
    """Of a process; 0 where the system doesn't say."""
    try:
        return len(os.listdir(f"/proc/{pid}/task"))
    except OSError:
        return 0
