"""A Slurm cluster of Debian's packages on one machine: a login node that has the controller, and nodes that are modelled hosts.

Everything of it lies in one folder and runs on its hosts, so it is gone with them, and several clusters don't meet.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from threading import Event
from typing import Any

from opensora_dist.recipes.bench.hosts import Hosts, modelled_hosts

PACKAGES = ("slurmctld", "slurmd", "slurm-client", "munge")
LOGIN = "login"
REPOSITORY = Path(__file__).parents[2]
_DEAD_S = 10
_READY_S = 60.0

# cred_expire is also how long a requeued job waits before it is started again (120 s where nothing is said).
_SLURM_CONF = """
ClusterName=modelled
SlurmctldHost={login}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge/socket,cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/%n.log
SlurmctldDebug=verbose
SlurmdDebug=info
MailProg=/bin/true
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SwitchType=switch/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
JobRequeue=1
ReturnToService=2
SlurmdTimeout={dead_s}
KillWait=15
MinJobAge=3600
SlurmdParameters=config_overrides
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SlurmctldParameters=preempt_send_user_signal
SchedulerParameters=sched_interval=2,bf_interval=2,batch_sched_delay=0,sched_min_interval=100000
GresTypes=gpu
NodeName={nodes} CPUs=4 {gres}
PartitionName=main Nodes={nodes} Default=YES PriorityTier=1 GraceTime=60 MaxTime=INFINITE
PartitionName=urgent Nodes={nodes} PriorityTier=10 PreemptMode=OFF MaxTime=INFINITE
"""


class Cluster:
    """Made by ``slurm_cluster``.

    Args:
        hosts: The nodes, and ``LOGIN``.
        folder: Configuration, state and logs.
    """

    def __init__(self, hosts: Hosts, folder: Path) -> None:
        self.hosts, self.folder = hosts, folder
        self.nodes = [name for name in hosts if name != LOGIN]
        self._daemons: list[subprocess.Popen[bytes]] = []
        self._spoiled: set[str] = set()

    def call(self, *argv: Any, check: bool = True, limit_s: float = 60) -> str:
        """What a command on the login node prints, its errors included."""
        done = subprocess.run(
            self.hosts[LOGIN].command([str(a) for a in argv]),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=self._environment(),
            timeout=limit_s,
        )
        assert not check or done.returncode == 0, f"{argv} ended with {done.returncode}\n{done.stdout}"
        return done.stdout

    def sbatch(self, script: str, *options: str) -> str:
        """Submits lines of bash as they are; its job id."""
        path = self.folder / f"plain-{time.time_ns()}.sh"
        path.write_text(f"#!/bin/bash\n{script}\n")
        return self.call("sbatch", "--parsable", f"--output={self.folder}/plain-%j.out", *options, path).strip()

    def job(self, job_id: str) -> dict[str, str]:
        """What Slurm knows of a job, as ``scontrol show job`` names it."""
        return dict(re.findall(r"(\w[\w/:]*)=(\S*)", self.call("scontrol", "--oneliner", "show", "job", job_id)))

    def jobs(self) -> list[str]:
        """Ids of all jobs that are not over."""
        return self.call("squeue", "--noheader", "--format=%A").split()

    def states(self) -> dict[str, str]:
        """Of the nodes."""
        return dict(line.split() for line in self.call("sinfo", "--noheader", "--Node", "--format=%N %T").splitlines())

    def ends(self, job_id: str, *, limit_s: float) -> str:
        """Waits until a job is over; its state."""
        wait_for(
            lambda: self.job(job_id)["JobState"] in _OVER, limit_s=limit_s, what=lambda: f"{self.job(job_id)}\n{self.logs()}"
        )
        return self.job(job_id)["JobState"]

    def start_node(self, name: str, *, spoil: Sequence[str] = ()) -> None:
        """Starts slurmd on a node, as its boot would.

        Args:
            spoil: A command that runs before, and changes what slurmd and its jobs find there, until ``recover``.
        """
        command = ["slurmd", "-D", "-N", name, "-f", str(self.folder / "slurm.conf")]
        if spoil:
            self._spoiled.add(name)
            command = ["sh", "-c", f'{shlex.join(spoil)} && exec "$@"', "sh", *command]
        self._start(name, command)

    def clear(self) -> None:
        """Links whole, partitions up, jobs told to end."""
        self.call("scontrol", "update", "PartitionName=main", "State=UP")
        for name in self.hosts:
            self.hosts.mend(name)
        if jobs := sorted(set(self.jobs())):
            self.call("scancel", *jobs, check=False)

    def recover(self) -> None:
        """All as at the start: no jobs, nodes up and idle."""
        self.clear()
        for name in self.nodes:
            if name in self._spoiled or not self._has_slurmd(name):
                self.hosts.kill(name)
                self.start_node(name)
        self._spoiled.clear()
        wait_for(lambda: not self.jobs() and set(self.states().values()) == {"idle"}, limit_s=_READY_S, what=self.logs)

    def logs(self) -> str:
        """The ends of the daemons' logs, and the queue."""
        said = [f"=== {p.name}\n" + p.read_text(errors="replace")[-1500:] for p in sorted(self.folder.glob("*.log"))]
        return "\n".join([self.call("squeue", check=False), self.call("sinfo", "--long", "--Node", check=False), *said])

    def start(self) -> None:
        """Starts the daemons, and waits until the nodes are idle."""
        (self.folder / "munge").mkdir(mode=0o755)
        (self.folder / "state").mkdir()
        key = self.folder / "munge" / "key"
        key.write_bytes(os.urandom(128))
        key.chmod(0o400)
        nodes = ",".join(self.nodes)
        text = _SLURM_CONF.format(login=LOGIN, folder=self.folder, nodes=nodes, dead_s=_DEAD_S, gres="")
        (self.folder / "slurm.conf").write_text(text)
        (self.folder / "cgroup.conf").write_text("CgroupAutomount=no\n")
        munge = {"key-file": "key", "socket": "socket", "pid-file": "pid", "log-file": "log", "seed-file": "seed"}
        places = [f"--{option}={self.folder / 'munge' / name}" for option, name in munge.items()]
        self._start(LOGIN, ["munged", "--foreground", "--force", *places])
        wait_for((self.folder / "munge" / "socket").exists, limit_s=_READY_S, what=self.logs)
        self._start(LOGIN, ["slurmctld", "-D", "-f", str(self.folder / "slurm.conf")])
        for name in self.nodes:
            self.start_node(name)
        wait_for(lambda: set(self._states_so_far()) == {"idle"}, limit_s=_READY_S, what=self.logs)

    def stop(self) -> None:
        """Ends everything on all hosts."""
        for name in self.hosts:
            self.hosts.kill(name)
        for daemon in self._daemons:
            daemon.wait(timeout=10)

    def _states_so_far(self) -> list[str]:
        """Of the nodes; none while the controller does not answer."""
        said = self.call("sinfo", "--noheader", "--Node", "--format=%T", check=False).split("\n")
        return [line.strip() for line in said if line.strip()]

    def _has_slurmd(self, name: str) -> bool:
        commands = []
        for pid in self.hosts[name].processes():
            try:
                commands.append(Path(f"/proc/{pid}/comm").read_text().strip())
            except OSError:  # it ended meanwhile
                continue
        return "slurmd" in commands

    def _start(self, host: str, command: Sequence[str]) -> None:
        with (self.folder / f"{host}.out").open("ab") as log:
            daemon = subprocess.Popen(
                self.hosts[host].command(command), stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=self._environment()
            )
        self._daemons.append(daemon)

    def _environment(self) -> dict[str, str]:
        ours = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM_", "PYTEST_"))}
        path = f"{Path(sys.executable).parent}:{ours.get('PATH', '')}:/usr/sbin:/sbin"
        return ours | {
            "PATH": path,
            "SLURM_CONF": str(self.folder / "slurm.conf"),
            "PYTHONPATH": str(REPOSITORY),
            "OMP_NUM_THREADS": "1",
        }


_OVER = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "PREEMPTED", "DEADLINE", "OUT_OF_MEMORY", "BOOT_FAIL")


@contextmanager
def slurm_cluster(folder: Path, *, nodes: int) -> Iterator[Cluster]:
    """``node1``, ``node2`` ... with Slurm on them, for as long as the block lasts."""
    folder.mkdir(parents=True)
    with modelled_hosts([LOGIN, *(f"node{i + 1}" for i in range(nodes))]) as hosts:
        cluster = Cluster(hosts, folder)
        try:
            cluster.start()
            yield cluster
        finally:
            cluster.stop()


def install_slurm() -> None:
    """Debian's packages, where they are missing."""
    if all(
        shutil.which(program, path="/usr/sbin:/usr/bin:/sbin:/bin") for program in ("slurmctld", "slurmd", "sbatch", "munged")
    ):
        return
    quiet = {
        "stdout": subprocess.DEVNULL,
        "env": os.environ | {"DEBIAN_FRONTEND": "noninteractive"},
        "timeout": 240,
        "check": True,
    }
    subprocess.run(["apt-get", "update", "-qq"], **quiet)
    subprocess.run(["apt-get", "install", "-y", "-qq", "--no-install-recommends", *PACKAGES], **quiet)


def wait_for(ready: Callable[[], bool], *, limit_s: float, what: Callable[[], str]) -> None:
    """Until ``ready()``; fails with ``what()`` where the limit passes."""
    pause, until = Event(), time.monotonic() + limit_s
    while not ready():
        assert time.monotonic() < until, f"not ready within {limit_s} s\n{what()}"
        pause.wait(0.3)
