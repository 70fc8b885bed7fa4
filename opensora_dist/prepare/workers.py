"""Lots of sources worked on here or in worker processes, whose clips come back one at a time."""

from __future__ import annotations

import multiprocessing
import traceback
from collections.abc import Generator, Iterable, Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess

from opensora_dist.config.prepare import PrepareConfig
from opensora_dist.core.errors import DataError
from opensora_dist.prepare.stages import ClipFound, SourceDone, SourceTask, work_source

_STOP_S = 5.0


@dataclass(frozen=True, kw_only=True)
class LotTask:
    """Sources that one worker takes, one after the other: of the lot with that number, those with work left."""

    number: int
    sources: tuple[SourceTask, ...]


@dataclass(frozen=True, kw_only=True)
class LotDone:
    """A worker is through with a lot."""


@dataclass(frozen=True, kw_only=True)
class _Failed:
    """What went wrong in a worker, other than a source that can't be used."""

    text: str


Message = ClipFound | SourceDone | LotDone


def work_lots(tasks: Iterable[LotTask], config: PrepareConfig, *, workers: int) -> Generator[tuple[LotTask, Message], None, None]:
    """Every message of every lot. A lot's own messages come in order, those of several lots as they arrive.

    Close it where you stop early: that ends the processes.

    Args:
        workers: Above 1, so many processes. Each holds one clip that nobody has taken yet, and waits.
    Raises:
        DataError: A worker process died.
    """
    if workers == 1:
        for task in tasks:
            yield from ((task, message) for message in _work_lot(task, config))
        return
    pool = _Pool(config, workers=workers)
    try:
        yield from pool.run(iter(tasks))
    finally:
        pool.stop()


def _work_lot(task: LotTask, config: PrepareConfig) -> Iterator[Message]:
    for source in task.sources:
        yield from work_source(source, config)
    yield LotDone()


class _Pool:
    """Worker processes, a pipe to each. A pipe holds less than a clip, so no worker runs ahead of who takes its clips."""

    def __init__(self, config: PrepareConfig, *, workers: int) -> None:
        # spawn: a fork of a process with CUDA or decoder threads may hang
        context = multiprocessing.get_context("spawn")
        self._processes: dict[Connection, BaseProcess] = {}
        for _ in range(workers):
            mine, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(theirs, config), daemon=True)
            process.start()
            theirs.close()  # so that a worker's death is the pipe's end
            self._processes[mine] = process

    def run(self, tasks: Iterator[LotTask]) -> Iterator[tuple[LotTask, Message]]:
        """Deals out lots, and yields what comes back."""
        idle, busy = list(self._processes), dict[Connection, LotTask]()
        done: dict[Connection, int] = {}  # sources of the lot that are through
        while True:
            while idle and (task := next(tasks, None)) is not None:
                pipe = idle.pop()
                busy[pipe], done[pipe] = task, 0
                self._send(pipe, task)
            if not busy:
                return
            for ready in wait(list(busy)):
                assert isinstance(ready, Connection)
                task = busy[ready]
                message = self._receive(ready, task, done[ready])
                yield task, message
                if isinstance(message, SourceDone):
                    done[ready] += 1
                elif isinstance(message, LotDone):
                    del busy[ready]
                    idle.append(ready)

    def stop(self) -> None:
        """Ends the processes."""
        for pipe in self._processes:
            pipe.close()  # one that waits for a lot, or to hand on a clip, ends by itself
        for process in self._processes.values():
            process.join(_STOP_S)
            if process.is_alive():
                process.terminate()
                process.join()

    def _send(self, pipe: Connection, task: LotTask) -> None:
        try:
            pipe.send(task)
        except OSError as error:
            raise _died(task, 0) from error

    def _receive(self, pipe: Connection, task: LotTask, done: int) -> Message:
        try:
            message = pipe.recv()
        except (EOFError, OSError) as error:
            raise _died(task, done) from error
        if isinstance(message, _Failed):
            raise RuntimeError(f"a worker process failed:\n{message.text}")
        assert isinstance(message, ClipFound | SourceDone | LotDone)
        return message


def _died(task: LotTask, done: int) -> DataError:
    name = task.sources[min(done, len(task.sources) - 1)].source.name
    return DataError(
        f"a worker process died while it worked on {name}. Out of memory, or a file that crashes the decoder: lower `workers`, or take the "
        "file out; the same command goes on where it was"
    )


def _serve(pipe: Connection, config: PrepareConfig) -> None:
    """A worker process: lots in, messages out, until the pipe ends."""
    import cv2

    cv2.setNumThreads(1)  # the workers are the parallelism
    try:
        while True:
            task = pipe.recv()
            try:
                for message in _work_lot(task, config):
                    pipe.send(message)
            except (BrokenPipeError, ConnectionResetError):
                return
            except Exception:  # noqa: BLE001 - told to the process that waits for it, which fails with it
                pipe.send(_Failed(text=traceback.format_exc()))
    except (EOFError, KeyboardInterrupt):
        return
