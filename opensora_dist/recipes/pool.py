"""One node of a pool, a pod of Kubernetes or a machine of SkyPilot: meets the others, runs its ranks, and ends as node 0 decides.

Slurm has one script per job, on one node; a pool starts the same command on every node, and looks at each one's exit code. So node 0 asks
``opensora-dist node begin`` and ``end`` for all, and tells the others: first by a connection, since nothing on the shared disk says which
start of the job it belongs to, then by files of the attempt. The connections stay open to the end: a node that ended long before node 0
knows by them that node 0 is still there.
"""

from __future__ import annotations

import contextlib
import json
import os
import resource
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Final

from opensora_dist.core.errors import OpensoraError
from opensora_dist.core.io import read_json, write_json, write_text
from opensora_dist.core.layout import LOGS_DIR
from opensora_dist.core.logging import get_logger
from opensora_dist.launch.job import Job
from opensora_dist.launch.pools import AGAIN_CODE, SUBMISSION_VARIABLE
from opensora_dist.launch.records import RECORD_NAME, Record, read_record
from opensora_dist.recipes.node import GO_ON, NOTHING_TO_DO, endings_folder
from opensora_dist.resilience.attempts import Next
from opensora_dist.resilience.endings import ENDINGS_VARIABLE

_FAILED: Final = 1
_PROGRAM: Final = (sys.executable, "-m", "opensora_dist")
_POLL_S: Final = 0.2
_WORD_S: Final = 10.0  # for a word over a connection that is there
_SHARED_DISK_S: Final = 60.0  # NFS clients believe for as long that a file isn't there
_DECIDE_S: Final = 120.0  # node 0 waits half of it for the ends of others, and they all of it from its last sign of life
# A machine that lost its power sends no end: after a minute without an answer to these, it is gone (Linux).
_KEEP_ALIVE: Final = ((socket.TCP_KEEPIDLE, 30), (socket.TCP_KEEPINTVL, 10), (socket.TCP_KEEPCNT, 3))
_AGAIN_EVERY_S: Final = 5.0  # a rank that is just starting may miss a signal
# A rank's output goes to its file; that of the node's first also to where the pool shows it. tee outlives the signals that stop ranks.
_RANK: Final = """
set -u
mkdir -p "$0"
log="$0/rank-$RANK.log"
if [ "$LOCAL_RANK" = 0 ]; then
  exec "$@" > >(trap "" TERM INT USR1; exec tee -a "$log") 2>&1
fi
exec "$@" >> "$log" 2>&1
"""
_log = get_logger(__name__)


@dataclass(frozen=True, kw_only=True)
class PoolNode:
    """
    Args:
        rank: This node's number; 0 decides.
        nodes: How many there are.
        head: Address of node 0.
        port: Node 0 listens there for the others, and on the one after it for their ranks.
        grace_s: For saving, once this node is told to stop.
        meet_s: How long nodes wait for each other.
    """

    rank: int
    nodes: int
    head: str
    port: int
    grace_s: float
    meet_s: float = 1800.0


def run_node(submission: Path, *, node: PoolNode, program: Sequence[str] = _PROGRAM) -> int:
    """Runs this node's part of an attempt. Returns an exit code: 0 done, 75 start all nodes again, else it failed for good.

    Args:
        submission: Its folder in the run directory. Node 0 writes it, from ``OPENSORA_SUBMISSION``, where it isn't there.
        program: ``opensora-dist``.
    Raises:
        OpensoraError: Nodes didn't meet, or don't see the same files.
    """
    with _stop_on_sigterm() as stop, contextlib.ExitStack() as open_:
        try:
            if node.rank == 0:
                attempt, head = _lead(submission, node, program, stop, open_), None
            else:
                attempt, head = _follow(node, stop, open_)
        except _StoppedError:
            return AGAIN_CODE
        if isinstance(attempt, int):
            return attempt
        folder = endings_folder(submission, attempt)
        _until(lambda: (submission / RECORD_NAME).exists() and folder.is_dir(), within_s=_SHARED_DISK_S, what=_unshared(folder))
        record = read_record(submission)
        _warn_of_locked_memory(record)
        code = _run_ranks(record.job, attempt, node, program, stop)
        write_json(folder / f"node-{node.rank}.json", {"code": code})
        return _decide(submission, attempt, code, node, program) if head is None else _hear(folder, head)


class _StoppedError(Exception):
    """This node was told to stop before its ranks began."""


def _lead(
    submission: Path, node: PoolNode, program: Sequence[str], stop: threading.Event, open_: contextlib.ExitStack
) -> str | int:
    """Node 0: the attempt's name once all nodes are there, or the exit code where there is nothing to begin."""
    others = _gather(node, stop, open_)
    _unpack(submission)
    job = read_record(submission).job
    attempt = f"{job.id}.{_num_attempts(submission)}"
    endings_folder(submission, attempt).mkdir(parents=True)  # first: so no two attempts have one name
    code = subprocess.run([*program, "node", "begin", str(submission), "--attempt", attempt], check=False).returncode
    answer: str | int = attempt if code == GO_ON else 0 if code == NOTHING_TO_DO else _FAILED
    for connection in others.values():
        with contextlib.suppress(OSError):  # it is gone: its ranks will be missed
            connection.sendall(json.dumps(answer).encode() + b"\n")
    return answer


def _num_attempts(submission: Path) -> int:
    return sum(1 for _ in (submission / "endings").glob("*/"))


def _gather(node: PoolNode, stop: threading.Event, open_: contextlib.ExitStack) -> dict[int, socket.socket]:
    """A connection to each of the other nodes."""
    others: dict[int, socket.socket] = {}
    deadline = time.monotonic() + node.meet_s
    with socket.create_server(("", node.port), backlog=node.nodes) as server:
        server.settimeout(_POLL_S)
        while len(others) < node.nodes - 1:
            _not_stopped(stop)
            if time.monotonic() > deadline:
                missing = sorted(set(range(1, node.nodes)) - set(others))
                raise OpensoraError(
                    f"nodes {missing} of {node.nodes} didn't come within {node.meet_s:.0f} s; are they scheduled?"
                )
            try:
                connection, _ = server.accept()
            except TimeoutError:
                continue
            open_.enter_context(connection)
            connection.settimeout(_WORD_S)
            with contextlib.suppress(OSError, ValueError):  # not one of ours
                rank = int(connection.recv(16))
                if 0 < rank < node.nodes:
                    others[rank] = connection  # the newest: a node that came again has only that one
    return others


def _follow(node: PoolNode, stop: threading.Event, open_: contextlib.ExitStack) -> tuple[str | int, socket.socket]:
    """What node 0 answers, and the connection to it."""
    deadline = time.monotonic() + node.meet_s
    said = "it isn't up yet"
    while time.monotonic() < deadline:
        _not_stopped(stop)
        try:
            connection = open_.enter_context(socket.create_connection((node.head, node.port), timeout=_WORD_S))
            _keep_alive(connection)
            connection.sendall(str(node.rank).encode())
            if (answer := _line(connection, stop, deadline)) is not None:
                return answer, connection
            connection.close()
        except OSError as error:
            said = str(error)
        time.sleep(1.0)
    raise OpensoraError(
        f"node 0 ({node.head}:{node.port}) didn't answer within {node.meet_s:.0f} s: {said}; do nodes reach each other?"
    )


def _line(connection: socket.socket, stop: threading.Event, deadline: float) -> str | int | None:
    """One line of JSON; None where node 0 went away, or said no whole line in time."""
    connection.settimeout(_POLL_S)
    heard = b""
    while not heard.endswith(b"\n"):
        _not_stopped(stop)
        if time.monotonic() > deadline:
            return None
        try:
            heard += (more := connection.recv(1024))
        except TimeoutError:
            continue
        if not more:
            return None
    answer = json.loads(heard)
    assert isinstance(answer, str | int)
    return answer


def _keep_alive(connection: socket.socket) -> None:
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, value in _KEEP_ALIVE:
        connection.setsockopt(socket.IPPROTO_TCP, option, value)


def _is_open(connection: socket.socket) -> bool:
    """Whether the other end is there; nothing more is sent by it."""
    connection.setblocking(False)
    try:
        return connection.recv(1) != b""
    except BlockingIOError:
        return True
    except OSError:
        return False


def _unpack(submission: Path) -> None:
    """The files of the submission, where the machine that submits doesn't share the run directory."""
    if (submission / RECORD_NAME).exists() or SUBMISSION_VARIABLE not in os.environ:
        return
    files = json.loads(os.environ[SUBMISSION_VARIABLE])
    for name in sorted(files, key=RECORD_NAME.__eq__):  # the record last: where it is, all is
        write_text(submission / Path(name).name, files[name])


def _run_ranks(job: Job, attempt: str, node: PoolNode, program: Sequence[str], stop: threading.Event) -> int:
    """Runs them to their end; returns the exit code of what started them."""
    environment = {**os.environ, ENDINGS_VARIABLE: str(endings_folder(job.folder, attempt))}
    environment.pop(SUBMISSION_VARIABLE, None)  # ranks write their environment down
    if job.kind == "train":
        command = _torchrun(job, attempt, node, [*program, *job.argv])
    else:
        command = [*program, *job.argv]
    # Ignored from the start, and inherited: torchrun would die of it, and so would a rank that doesn't listen yet.
    before = signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    try:
        process = subprocess.Popen(command, env=environment)
    finally:
        signal.signal(signal.SIGUSR1, before)
    return _wait(process, stop, grace_s=node.grace_s, ranks=job.kind == "train")


def _torchrun(job: Job, attempt: str, node: PoolNode, program: Sequence[str]) -> list[str]:
    logs = job.run_dir / LOGS_DIR / attempt / f"node-{node.rank}"
    options = {
        "--nnodes": node.nodes,
        "--nproc-per-node": job.ranks_per_node,
        "--node-rank": node.rank,
        "--master-addr": node.head,
        "--master-port": node.port + 1,
    }
    words = [f"{name}={value}" for name, value in options.items()]
    return [sys.executable, "-m", "torch.distributed.run", *words, "--no-python", "bash", "-c", _RANK, str(logs), *program]


def _wait(process: subprocess.Popen[bytes], stop: threading.Event, *, grace_s: float, ranks: bool) -> int:
    deadline = None
    last = 0.0
    while True:
        with contextlib.suppress(subprocess.TimeoutExpired):
            return process.wait(timeout=_POLL_S)
        if not stop.is_set():
            continue
        now = time.monotonic()
        deadline = deadline or now + grace_s
        if now > deadline:
            _log.error("not saved within %.0f s of being told to stop: killed", grace_s)
            process.kill()
        elif now - last > _AGAIN_EVERY_S:
            last = now
            # Not to torchrun, which would kill what doesn't end at once.
            for pid in _children(process.pid) if ranks else [process.pid]:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGUSR1 if ranks else signal.SIGTERM)


def _children(pid: int) -> list[int]:
    """Of a process's main thread (Linux); none where it has ended."""
    try:
        return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except OSError:
        return []


def _decide(submission: Path, attempt: str, code: int, node: PoolNode, program: Sequence[str]) -> int:
    """Node 0: what the attempt's end means, once the others have ended too, or had the time to."""
    folder = endings_folder(submission, attempt)
    with contextlib.suppress(OpensoraError):  # a node that says nothing is gone, and its ranks with it
        _until(lambda: len(list(folder.glob("node-*.json"))) == node.nodes, within_s=_DECIDE_S / 2, what="")
    ended = subprocess.run(
        [*program, "node", "end", str(submission), "--attempt", attempt, "--code", str(code)], check=False
    ).returncode
    # A pool tells nobody why it stops its nodes; where it was a user who cancelled, no exit code starts them again.
    again = ended in (Next.AGAIN.code, Next.STOPPED.code)
    decision = AGAIN_CODE if again else 0 if ended == Next.DONE.code else _FAILED
    write_json(folder / "decision.json", {"code": decision})
    return decision


def _hear(folder: Path, head: socket.socket) -> int:
    """Another node: what node 0 decided, whose ranks may go on for long after ours; once its machine is gone, all begin again."""
    decision = folder / "decision.json"
    last_sign = time.monotonic()
    while not decision.exists():
        if _is_open(head):
            last_sign = time.monotonic()
        elif time.monotonic() - last_sign > _DECIDE_S:
            _log.error("node 0 is gone, and left no %s within %.0f s", decision, _DECIDE_S)
            return AGAIN_CODE
        time.sleep(_POLL_S)
    code = read_json(decision)["code"]
    assert isinstance(code, int)
    return code


def _warn_of_locked_memory(record: Record) -> None:
    """Where RDMA was asked for, and this process may not pin what it needs: the capability that a pod is given is root's alone."""
    limit, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    if record.backend == "k8s" and record.job.site.k8s.rdma_resource and os.geteuid() and limit != resource.RLIM_INFINITY:
        _log.warning(
            "k8s.rdma_resource is set, and this pod may lock only %d bytes of memory: RDMA may fail, or NCCL go over plain TCP; set "
            "LimitMEMLOCK=infinity for the node's containerd (docs/kubernetes.md)",
            limit,
        )


def _unshared(folder: Path) -> str:
    return f"{folder}, which node 0 made, isn't seen here: the run directory has to be on a file system that all nodes share"


def _until(ready: Callable[[], bool], *, within_s: float, what: str) -> None:
    deadline = time.monotonic() + within_s
    while not ready():
        if time.monotonic() > deadline:
            raise OpensoraError(f"{what} (waited {within_s:.0f} s)")
        time.sleep(_POLL_S)


def _not_stopped(stop: threading.Event) -> None:
    if stop.is_set():
        raise _StoppedError


@contextlib.contextmanager
def _stop_on_sigterm() -> Iterator[threading.Event]:
    """What a pod gets before it is killed. Main thread only."""
    stop = threading.Event()

    def handle(number: int, frame: FrameType | None) -> None:
        stop.set()

    before = signal.signal(signal.SIGTERM, handle)
    try:
        yield stop
    finally:
        signal.signal(signal.SIGTERM, before)
