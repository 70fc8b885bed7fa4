"""Lots of sources worked on here or in worker processes, whose clips come back one at a time."""

from __future__ import annotations

import multiprocessing
import signal
import traceback
from collections.abc import Generator, Iterable, Iterator
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess

from opensora_dist.config.prepare import PrepareConfig
from opensora_dist.core.errors import DataError
from opensora_dist.prepare.stages import Clock
from opensora_dist.prepare.work import ClipFound, SourceDone, SourceTask, work_source

_STOP_S = 5.0
_DEATHS = 3  # more, and more than there are workers, are the machine's fault rather than that of files


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
        workers: Above 1, so many processes. Each holds one clip that nobody has taken yet, and waits. One that dies is replaced, and the
            source that it had in hand has a problem.
    Raises:
        DataError: Many worker processes died.
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
        self._config = config
        self._processes: dict[Connection, BaseProcess] = {}
        self._deaths, self._deaths_borne = 0, max(_DEATHS, workers)
        for _ in range(workers):
            self._start()

    def run(self, tasks: Iterator[LotTask]) -> Iterator[tuple[LotTask, Message]]:
        """Deals out lots, and yields what comes back."""
        idle, busy = list(self._processes), dict[Connection, _InHand]()
        while True:
            while idle and (task := next(tasks, None)) is not None:
                hand = _InHand(lot=task)
                busy[self._give(idle.pop(), hand)] = hand
            if not busy:
                return
            for ready in wait(list(busy)):
                assert isinstance(ready, Connection)
                hand = busy.pop(ready)
                message = self._receive(ready)
                if message is None:
                    fresh, signal_number = self._replace(ready, hand)
                    if (lost := hand.lost(signal_number)) is not None:
                        yield hand.lot, lost
                    busy[self._give(fresh, hand)] = hand
                    continue
                yield hand.lot, message
                if isinstance(message, LotDone):
                    idle.append(ready)
                else:
                    hand.note(message)
                    busy[ready] = hand

    def stop(self) -> None:
        """Ends the processes."""
        for pipe in self._processes:
            pipe.close()  # one that waits for a lot, or to hand on a clip, ends by itself
        for process in self._processes.values():
            process.join(_STOP_S)
            if process.is_alive():
                process.terminate()
                process.join()

    def _start(self) -> Connection:
        # spawn: a fork of a process with CUDA or decoder threads may hang
        context = multiprocessing.get_context("spawn")
        mine, theirs = context.Pipe()
        process = context.Process(target=_serve, args=(theirs, self._config), daemon=True)
        process.start()
        theirs.close()  # so that a worker's death is the pipe's end
        self._processes[mine] = process
        return mine

    def _give(self, pipe: Connection, hand: _InHand) -> Connection:
        """Hands what is left of a lot to a worker, or to one in its place where it is dead. Returns the pipe of who took it."""
        while True:
            try:
                pipe.send(hand.rest())
                return pipe
            except OSError:
                pipe, _ = self._replace(pipe, hand)

    def _receive(self, pipe: Connection) -> Message | None:
        """The next message; None where the worker is dead."""
        try:
            message = pipe.recv()
        except (EOFError, OSError):
            return None
        if isinstance(message, _Failed):
            raise RuntimeError(f"a worker process failed:\n{message.text}")
        assert isinstance(message, ClipFound | SourceDone | LotDone)
        return message

    def _replace(self, pipe: Connection, hand: _InHand) -> tuple[Connection, int]:
        """Another worker in a dead one's place, and the signal that killed that one; 0 where it ended otherwise.

        Raises:
            DataError: Too many died.
        """
        process = self._processes.pop(pipe)
        pipe.close()
        process.join(_STOP_S)
        if process.is_alive():
            process.kill()
            process.join()
        self._deaths += 1
        if self._deaths > self._deaths_borne:
            raise DataError(
                f"{self._deaths} worker processes died, the last while it worked on {hand.name}. Out of memory, or files that crash the "
                "decoder: lower `workers`, or take the files out; the same command goes on where it was"
            )
        return self._start(), max(0, -(process.exitcode or 0))


@dataclass(kw_only=True)
class _InHand:
    """A lot that a worker has: how many of its sources are through, and of the next one, how many clips came."""

    lot: LotTask
    done: int = 0
    clips: int = 0

    @property
    def name(self) -> str:
        """Of the source that is worked on."""
        return self.lot.sources[min(self.done, len(self.lot.sources) - 1)].source.name

    def rest(self) -> LotTask:
        """What is left of it."""
        return replace(self.lot, sources=self.lot.sources[self.done :])

    def note(self, message: Message) -> None:
        """A message has come."""
        if isinstance(message, SourceDone):
            self.done, self.clips = self.done + 1, 0
        else:
            self.clips += 1

    def lost(self, signal_number: int) -> SourceDone | None:
        """What is to be said of the source that a dead worker had in hand, which counts as through; None where it had none."""
        if self.done == len(self.lot.sources):
            return None
        task = self.lot.sources[self.done]
        ended = SourceDone(
            source=task.source,
            probe={},
            shots=None,
            num_clips=self.clips,
            problem=f"its worker died (signal {signal_number})",
            clock=Clock(),
            passing=signal_number in (0, signal.SIGKILL, signal.SIGTERM),  # by someone, or by the system short of memory
        )
        self.note(ended)
        return ended


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
