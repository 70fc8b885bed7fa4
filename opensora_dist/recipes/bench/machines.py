"""Where the points of a sweep run: ranks of this machine, or one torchrun on each of the first nodes of a Slurm job."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass

from opensora_dist.core.errors import ConfigError
from opensora_dist.launch.templates import TEMPLATES

_PORT, _PORTS = 20_000, 10_000
_SCONTROL_S = 30.0
# $0 is the interpreter. A node's number in the step is known on the node alone.
_ON_NODE = 'exec "$0" -m torch.distributed.run --node-rank "$SLURM_NODEID" "$@"'


@dataclass(frozen=True, kw_only=True)
class Machines:
    """
    Args:
        nodes: Names of those that can be used, the one that ranks meet on first.
        address: Of that one, for the others; None where there are no others.
        job_id: Of the Slurm job; None outside of one.
        said: What there is, for people.
    """

    nodes: tuple[str, ...]
    address: str | None
    job_id: int | None
    said: str

    def command(self, argv: Sequence[str], *, nodes: int, ranks: int) -> list[str]:
        """The command line that runs ``opensora-dist ARGV`` as ``ranks`` ranks on each of the first ``nodes`` nodes."""
        if self.job_id is None:
            return [sys.executable, "-m", "opensora_dist", *argv, "--nproc", str(ranks)]
        port = _PORT + self.job_id % _PORTS
        srun = [
            "srun",
            "--cpu-bind=none",
            f"--nodes={nodes}",
            f"--ntasks={nodes}",
            "--ntasks-per-node=1",
            f"--nodelist={','.join(self.nodes[:nodes])}",
        ]
        if cores := os.environ.get("SLURM_CPUS_ON_NODE"):
            srun.append(f"--cpus-per-task={cores}")  # a step gets one core of each node where it asks for none
        torchrun = [f"--nnodes={nodes}", f"--nproc-per-node={ranks}", f"--master-addr={self.address}", f"--master-port={port}"]
        # Where a node's own name is loopback, gloo is told the interface, as in any job.
        network = ["env", f"MASTER_ADDR={self.address}", "bash", str(TEMPLATES / "slurm" / "network.sh")]
        on_node = [*network, "bash", "-c", _ON_NODE, sys.executable, *torchrun, "-m", "opensora_dist", *argv]
        return [*srun, "--kill-on-bad-exit=1", *on_node]


def machines_here() -> Machines:
    """The nodes of the Slurm job that this process is in, or this machine.

    Raises:
        ConfigError: Slurm doesn't name the nodes, or the first one has no address that the others reach.
    """
    job_id, listed = os.environ.get("SLURM_JOB_ID"), os.environ.get("SLURM_JOB_NODELIST")
    if job_id is None or listed is None:
        return Machines(
            nodes=(socket.gethostname(),), address=None, job_id=None, said="this is one machine, outside of a Slurm job"
        )
    command = ["scontrol", "show", "hostnames", listed]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_SCONTROL_S, check=True)
    except (OSError, subprocess.SubprocessError) as error:
        raise ConfigError(
            f"SLURM_JOB_ID={job_id}: `{' '.join(command)}` failed ({error}); unset SLURM_JOB_ID to run here alone"
        ) from error
    nodes = tuple(done.stdout.split())
    if not nodes:
        raise ConfigError(f"SLURM_JOB_ID={job_id}: `{' '.join(command)}` named no node; unset SLURM_JOB_ID to run here alone")
    count = f"{len(nodes)} node{'s' if len(nodes) > 1 else ''}"
    return Machines(
        nodes=nodes,
        address=_address(nodes[0]) if len(nodes) > 1 else "127.0.0.1",
        job_id=int(job_id),
        said=f"the Slurm job {job_id} has {count}",
    )


def _address(node: str) -> str:
    try:
        found = socket.gethostbyname(node)
    except OSError:
        found = "unknown"
    if found == "unknown" or found.startswith("127."):
        raise ConfigError(
            f"the first node {node} is {found} to itself, where no other node finds it; mend its name in /etc/hosts or DNS"
        )
    return found
