"""Clips of many videos in the order of the list, decoded here or in worker processes."""

from __future__ import annotations

import multiprocessing
from collections import deque
from collections.abc import Generator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass

from opensora_dist.core.errors import DataError
from opensora_dist.core.types import Thw
from opensora_dist.core.video import Frames
from opensora_dist.prepare.clips import cut_clip
from opensora_dist.prepare.sources import Source, image_problem


@dataclass(frozen=True, kw_only=True)
class Drop:
    """A video that gives no sample, and why."""

    source: str
    reason: str


def decode_in_order(
    sources: Sequence[Source], *, fps: float, buckets: Sequence[Thw], workers: int
) -> Generator[tuple[Source, Frames | Drop], None, None]:
    """Each source with its clip, or with the reason why it has none. The order is that of ``sources``, whatever ``workers`` is.

    Close it where you stop early: that ends the processes.

    Args:
        workers: Above 1, that many processes decode ahead, two videos each.
    Raises:
        DataError: A worker process died.
    """
    if workers == 1:
        yield from ((source, _decode(source, fps, buckets)) for source in sources)
        return
    # spawn: a fork of a process with CUDA or decoder threads may hang
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(workers, mp_context=context, initializer=_start_worker)
    ahead: deque[tuple[Source, Future[Frames | Drop]]] = deque()
    waiting = iter(sources)
    try:
        while True:
            while len(ahead) < 2 * workers and (source := next(waiting, None)) is not None:
                ahead.append((source, pool.submit(_decode, source, fps, buckets)))
            if not ahead:
                return
            source, future = ahead[0]
            yield source, future.result()
            ahead.popleft()
    except BrokenProcessPool as error:
        names = ", ".join(source.name for source, future in ahead if not future.done() or future.exception())
        raise DataError(
            f"a decoding process died while it worked on one of: {names}. Out of memory, or a file that crashes the decoder: lower "
            "`workers`, or take the file out; workers=1 shows which one it is"
        ) from error
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _start_worker() -> None:
    import cv2

    cv2.setNumThreads(1)  # the workers are the parallelism


def _decode(source: Source, fps: float, buckets: Sequence[Thw]) -> Frames | Drop:
    if source.caption is None:
        return Drop(source=source.name, reason="no caption: its row has none, or there is no .txt beside it")
    if problem := image_problem(source, buckets):
        return Drop(source=source.name, reason=problem)
    try:
        return cut_clip(source.open(), fps=fps, buckets=buckets)
    except DataError as error:
        return Drop(source=source.name, reason=str(error).removeprefix(f"{source.label}: "))
    except Exception as error:
        error.add_note(f"while decoding {source.label}")
        raise
