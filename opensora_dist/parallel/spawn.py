"""Ranks on this machine without torchrun: start them, pass signals on, end all when one fails, start them again, leave none behind."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import FrameType

import torch.distributed as dist

from opensora_dist.core.logging import get_logger

_log = get_logger(__name__)
_GRACE_S = 20.0
_POLL_S = 0.05
_SETTLE_S = 1.0
_TAIL_LINES = 30


def die_with_parent() -> None:
    """In the child, before exec: SIGKILL when the parent is gone, so that kill -9 of the parent leaves no rank (Linux only)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)


def run_ranks(
    args: Sequence[str], *, nproc: int, log_dir: Path, max_restarts: int = 0, stuck: Callable[[], str | None] = lambda: None
) -> int:
    """Runs ``python -m opensora_dist ARGS`` as ``nproc`` ranks and waits for all.

    Rank 0 writes to this terminal, the others to ``log_dir/rank-N.log``. SIGTERM, SIGINT and SIGUSR1 are passed to every rank. When a
    rank fails, the others have a second to fail by themselves, then get SIGTERM and, 20 s later, SIGKILL; of all that failed the end of
    the log is shown. Then all are started again, unless this process was asked to stop, or the config is bad (exit code 2).

    Args:
        max_restarts: How often at most.
        stuck: Asked after the failure of a start: why another is of no use, or None.
    Returns:
        0 when every rank returned 0, else the first failing rank's exit code (1 where a signal ended it).
    """
    log_dir.mkdir(parents=True, exist_ok=True)
    ranks: list[subprocess.Popen[bytes]] = []
    asked: list[int] = []

    def forward(signum: int, _frame: FrameType | None) -> None:
        asked.append(signum)
        for process in ranks:
            if process.poll() is None:
                process.send_signal(signum)

    forwarded = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
    previous = {s: signal.signal(s, forward) for s in forwarded}
    try:
        for restarts in range(max_restarts + 1):
            ranks.clear()
            code = _run_once(args, ranks, asked, nproc=nproc, log_dir=log_dir, restarts=restarts)
            if code in (0, 2) or restarts == max_restarts:
                break
            why = stuck()
            if asked:
                break
            if why is not None:
                _log.error("not started again: %s", why)
                break
            _log.warning("starting the ranks again, for the %d. of at most %d times", restarts + 1, max_restarts)
        return code
    finally:
        for signum, handler in previous.items():
            signal.signal(signum, handler)


def _run_once(
    args: Sequence[str], ranks: list[subprocess.Popen[bytes]], asked: Sequence[int], *, nproc: int, log_dir: Path, restarts: int
) -> int:
    """One start of all ranks, and how it ended; ``ranks`` is filled for the handler of signals, which fills ``asked``."""
    # The parent hosts the rendezvous store on a port the system picks, as torchrun's agent does: no port to guess, no race for it.
    store = dist.TCPStore(  # type: ignore[attr-defined]  # not in torch's __all__
        "127.0.0.1", 0, nproc, is_master=True, wait_for_workers=False
    )
    # Cores this process may use, which taskset, cpusets and Slurm make fewer than the machine has.
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    command = [sys.executable, "-m", "opensora_dist", *args]
    try:
        for rank in range(nproc):
            env = {
                **os.environ,
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "WORLD_SIZE": str(nproc),
                "LOCAL_WORLD_SIZE": str(nproc),
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(store.port),
                "TORCHELASTIC_USE_AGENT_STORE": "True",
                "TORCHELASTIC_RESTART_COUNT": str(restarts),
                "GLOO_SOCKET_IFNAME": os.environ.get("GLOO_SOCKET_IFNAME", "lo" if sys.platform == "linux" else "lo0"),
                "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(max(1, cores // nproc))),
                "PYTHONUNBUFFERED": "1",
            }
            if rank == 0:
                ranks.append(subprocess.Popen(command, env=env, start_new_session=True, preexec_fn=die_with_parent))
            else:
                # Appended to: neither a resumed run nor a second one, which will be refused, wipes what the first one said.
                with open(_rank_log(log_dir, rank), "ab") as log:
                    ranks.append(
                        subprocess.Popen(
                            command,
                            env=env,
                            stdout=log,
                            stderr=subprocess.STDOUT,
                            stdin=subprocess.DEVNULL,
                            start_new_session=True,
                            preexec_fn=die_with_parent,
                        )
                    )
            for signum in asked:  # before it was there to be sent them
                ranks[-1].send_signal(signum)
        return _wait(ranks, log_dir=log_dir)
    finally:
        _end(ranks)


def _rank_log(log_dir: Path, rank: int) -> Path:
    return log_dir / f"rank-{rank}.log"


def _wait(ranks: list[subprocess.Popen[bytes]], *, log_dir: Path) -> int:
    while True:
        failed = _failed(ranks)
        if failed:
            # Others may be about to say why: a rank that failed and one that lost contact with it end within moments of each other.
            deadline = time.monotonic() + _SETTLE_S
            while time.monotonic() < deadline and any(p.poll() is None for p in ranks):
                time.sleep(_POLL_S)
            failed |= _failed(ranks)
            # What a signal ended can't have ended because of another rank.
            order = sorted(failed, key=lambda rank: failed[rank] > 0)
            for rank in order:
                _log.error("rank %d %s", rank, _how(failed[rank]))
            _log.error("ending the other ranks")
            _end(ranks)
            for rank in (r for r in order if r != 0):
                tail = _rank_log(log_dir, rank).read_text(errors="replace").splitlines()[-_TAIL_LINES:]
                _log.error("last lines of %s:\n%s", _rank_log(log_dir, rank), "\n".join(tail))
            return max(failed[order[0]], 1)
        if all(p.poll() == 0 for p in ranks):
            return 0
        time.sleep(_POLL_S)


def _failed(ranks: list[subprocess.Popen[bytes]]) -> dict[int, int]:
    return {rank: code for rank, p in enumerate(ranks) if (code := p.poll()) not in (None, 0)}


def _how(code: int) -> str:
    return f"was ended by {signal.Signals(-code).name}" if code < 0 else f"failed with exit code {code}"


def _end(ranks: list[subprocess.Popen[bytes]]) -> None:
    alive = [p for p in ranks if p.poll() is None]
    for process in alive:
        process.terminate()
    deadline = time.monotonic() + _GRACE_S
    for process in alive:
        try:
            process.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
