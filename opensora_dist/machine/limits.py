"""What the system allows a process: shared memory, open files, locked memory."""

from __future__ import annotations

import os
import resource
from pathlib import Path
from typing import Final

from opensora_dist.machine.finding import Finding, Level, Subject

_SUBJECT: Final = Subject("limits")
SHARED_MEMORY: Final = Path("/dev/shm")
_OPEN_FILES = 4096  # a rank holds a socket per rank of each group, and files of shards
_INFINIBAND = Path("/sys/class/infiniband")


def shared_memory_finding(*, least_gib: float, level: Level, path: Path = SHARED_MEMORY) -> Finding:
    """Size of /dev/shm, by which NCCL and workers of loaders hand data on.

    Args:
        least_gib: What it must have.
        level: Of less.
    """
    if not path.is_dir():
        return _SUBJECT.finding("shared memory", level, f"there is no {path}", f"mount a tmpfs at {path}")
    found = os.statvfs(path)
    size, free = (found.f_frsize * blocks / 2**30 for blocks in (found.f_blocks, found.f_bavail))
    said, values = f"{path} has {size:.2f} GiB, {free:.2f} free", {"size_gib": size, "free_gib": free}
    if min(size, free) >= least_gib:
        return _SUBJECT.finding("shared memory", Level.OK, said, values=values)
    way_out = (
        "in a container use --shm-size=64g (Docker) or k8s.shared_memory (Kubernetes); "
        f"else `mount -o remount,size=64G {path}`, or remove what was left in it"
    )
    return _SUBJECT.finding("shared memory", level, f"{said}, and {least_gib:g} are needed", way_out, values=values)


def limit_findings() -> list[Finding]:
    """Limits of this process, which its children inherit."""
    files, most_files = resource.getrlimit(resource.RLIMIT_NOFILE)
    few = files != resource.RLIM_INFINITY and files < _OPEN_FILES
    way_out = f"`ulimit -n {_OPEN_FILES * 16}`, or LimitNOFILE of the service that starts jobs"
    said = f"{_number(files)} (at most {_number(most_files)})"
    locked, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    # RDMA pins its buffers; without it nothing of ours locks more than the pinned buffers that the GPU's driver accounts for itself.
    pinned = _INFINIBAND.is_dir() and any(_INFINIBAND.iterdir()) and locked != resource.RLIM_INFINITY
    lock_way_out = "`ulimit -l unlimited`; in a container --ulimit memlock=-1 (docs/docker.md)"
    return [
        _SUBJECT.finding(
            "open files",
            Level.WARNING if few else Level.OK,
            f"{said}, and large runs need {_OPEN_FILES}" if few else said,
            way_out if few else None,
            values={"limit": files},
        ),
        _SUBJECT.finding(
            "locked memory",
            Level.WARNING if pinned else Level.OK,
            f"{_number(locked)} bytes" + (", and RDMA needs it unlimited" if pinned else ""),
            lock_way_out if pinned else None,
            values={"limit": locked},
        ),
    ]


def _number(limit: int) -> str:
    return "unlimited" if limit == resource.RLIM_INFINITY else str(limit)
