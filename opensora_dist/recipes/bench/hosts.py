"""Several hosts modelled on one machine: each with a name, an address and a link of its own, which can be slow, cut, or die with its host.

A host is a network namespace whose only way out is a veth to a bridge, and the bridge is in a namespace of its own: nothing that hosts send
leaves them, and two runs don't meet. Processes, files, cores and memory are the machine's, shared by all. What two hosts show is what a link
does; what a NIC, a switch or RDMA does they don't.

It is here because ``link`` measures on them; the tests of launchers, of preflight and of Slurm run on the same hosts, and on no others.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from opensora_dist.core.errors import ConfigError

_NEEDED: Final = {"ip": "iproute2", "tc": "iproute2", "nsenter": "util-linux", "unshare": "util-linux", "mount": "util-linux"}
_NETWORK: Final = "10.77.0"
_NAME = re.compile(r"[a-z0-9]([a-z0-9-]{0,30}[a-z0-9])?")
_COMMAND_S: Final = 30.0
_DEATH_S: Final = 10.0

# $1 names of the host, $2 its name, $3 an empty folder. /sys shows the interfaces of who mounted it, so those of this host are put in place;
# all of /sys can't be, or Slurm misses its control groups.
_ENTER: Final = """
mount --bind "$1" /etc/hosts && hostname "$2" && mount -t sysfs sysfs "$3" &&
mount --bind "$3/class/net" /sys/class/net && mount --bind "$3/devices/virtual/net" /sys/devices/virtual/net && umount "$3" || exit 125
shift 3
exec "$@"
"""

# $1 a folder, then namespaces. Its input ends when whoever made the hosts ends, even by SIGKILL.
_CLEAR: Final = """
cat > /dev/null
folder=$1
shift
for name in "$@"; do
  [ -e "/run/netns/$name" ] || continue
  for _ in 1 2 3 4 5 6 7 8 9 10; do
    pids=$(ip netns pids "$name")
    [ -n "$pids" ] || break
    echo "$pids" | xargs kill -9
    sleep 0.1
  done
  ip netns del "$name"
done
rm -rf "$folder"
"""


@dataclass(frozen=True, kw_only=True)
class Host:
    """
    Args:
        name: What it is called, by itself and by the others.
        address: IPv4, of ``eth0``.
        namespace: Its network, as ``ip netns`` knows it.
        folder: Holds its ``/etc/hosts``.
    """

    name: str
    address: str
    namespace: str
    folder: Path

    def command(self, argv: Sequence[str]) -> list[str]:
        """The command line that runs ``argv`` on this host, as the process that it starts."""
        inside = [_ENTER, "sh", str(self.folder / "hosts"), self.name, str(self.folder / "sys"), *argv]
        return ["nsenter", f"--net=/run/netns/{self.namespace}", "unshare", "--uts", "--mount", "sh", "-c", *inside]

    def processes(self) -> list[int]:
        """Ids of all that run on it."""
        return [int(pid) for pid in _run(["ip", "netns", "pids", self.namespace]).split()]


class Hosts(Mapping[str, Host]):
    """Hosts by name, and what can befall them."""

    def __init__(self, hosts: Sequence[Host], *, switch: str) -> None:
        self._hosts = {host.name: host for host in hosts}
        self._switch = switch

    def __getitem__(self, name: str) -> Host:
        return self._hosts[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._hosts)

    def __len__(self) -> int:
        return len(self._hosts)

    def cut(self, name: str) -> None:
        """Pulls its cable: what is sent is lost, and nobody is told."""
        self._cable(name, "down")

    def mend(self, name: str) -> None:
        """Plugs it in again."""
        self._cable(name, "up")

    def kill(self, name: str) -> None:
        """SIGKILL to all that runs on it. The host itself stays, as one that has started anew."""
        host, until = self[name], time.monotonic() + _DEATH_S
        while pids := host.processes():
            assert time.monotonic() < until, f"{name} still runs {pids}"
            for pid in pids:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            time.sleep(0.02)  # until the kernel has taken them down

    def limit(self, mbit: float | None) -> None:
        """The rate at which each host sends, in Mbit/s, by a token bucket on its own interface; None lifts it."""
        for host in self.values():
            if mbit is None:
                subprocess.run(_tc(host, "del"), capture_output=True, timeout=_COMMAND_S, check=False)  # there may be none
            else:
                _run([*_tc(host, "replace"), "tbf", "rate", f"{round(1e6 * mbit)}bit", "burst", "256kb", "latency", "50ms"])

    def _cable(self, name: str, state: str) -> None:
        _run(["ip", "-n", self._switch, "link", "set", _port(self[name]), state])


@contextmanager
def modelled_hosts(names: Sequence[str], *, mbit: float | None = None) -> Iterator[Hosts]:
    """Makes hosts; all they run, and they themselves, are gone when the block is left or this process ends, however it ends.

    Args:
        names: Of the hosts.
        mbit: As of ``Hosts.limit``.
    Raises:
        ConfigError: This machine or this user can't model hosts, or names don't do as names.
    """
    if problems := hosts_problems(names):
        raise ConfigError(problems)
    prefix = f"opensora-{os.getpid()}-{os.urandom(2).hex()}"
    switch = f"{prefix}.switch"
    folder = Path(tempfile.mkdtemp(prefix=f"{prefix}-"))
    hosts = [
        Host(name=name, address=f"{_NETWORK}.{i}", namespace=f"{prefix}-{name}", folder=folder / name)
        for i, name in enumerate(names, 1)
    ]
    janitor = subprocess.Popen(
        ["sh", "-c", _CLEAR, "sh", str(folder), *(host.namespace for host in hosts), switch],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        start_new_session=True,  # an interrupt of the terminal is not for it
    )
    try:
        _make(hosts, switch=switch)
        made = Hosts(hosts, switch=switch)
        made.limit(mbit)
        yield made
    finally:
        assert janitor.stdin is not None
        janitor.stdin.close()
        janitor.wait(timeout=_COMMAND_S)


def hosts_problems(names: Sequence[str]) -> list[str]:
    """Why hosts of these names can't be modelled here; empty where they can."""
    problems = [
        f"{name!r} is no name of a host: small letters, digits and '-', at most 32" for name in names if not _NAME.fullmatch(name)
    ]
    if not 1 <= len(names) <= 200 or len(set(names)) < len(names):
        problems.append(f"hosts {list(names)}: 1 to 200 names, each one once")
    missing = [program for program in _NEEDED if shutil.which(program) is None]
    if missing:
        packages = sorted({_NEEDED[program] for program in missing})
        problems.append(f"modelled hosts need {', '.join(missing)}; install the package {' and '.join(packages)} (Linux)")
    elif os.geteuid() != 0:
        problems.append(
            "modelled hosts are network namespaces, which root alone can make; run this as root, or in a machine where you are"
        )
    return problems


def _make(hosts: Sequence[Host], *, switch: str) -> None:
    _run(["ip", "netns", "add", switch])
    _run(["ip", "-n", switch, "link", "add", "bridge", "type", "bridge"])
    _run(["ip", "-n", switch, "link", "set", "bridge", "up"])
    text = "".join(f"{host.address} {host.name}\n" for host in hosts)
    for host in hosts:
        (host.folder / "sys").mkdir(parents=True)
        (host.folder / "hosts").write_text(f"127.0.0.1 localhost\n{text}")
        _run(["ip", "netns", "add", host.namespace])
        port = _port(host)
        veth = ["type", "veth", "peer", "name", "eth0", "netns", host.namespace]
        _run(["ip", "link", "add", port, "netns", switch, *veth])
        _run(["ip", "-n", switch, "link", "set", port, "master", "bridge", "up"])
        _run(["ip", "-n", host.namespace, "address", "add", f"{host.address}/24", "dev", "eth0"])
        for interface in ("lo", "eth0"):
            _run(["ip", "-n", host.namespace, "link", "set", interface, "up"])


def _port(host: Host) -> str:
    """Of the switch; names of interfaces are at most 15 letters long."""
    return f"port{host.address.rpartition('.')[2]}"


def _tc(host: Host, verb: str) -> list[str]:
    return ["tc", "-n", host.namespace, "qdisc", verb, "dev", "eth0", "root"]


def _run(command: Sequence[str]) -> str:
    """
    Raises:
        ConfigError: It fails: namespaces, bridges or token buckets aren't to be had here.
    """
    done = subprocess.run(command, capture_output=True, text=True, timeout=_COMMAND_S, check=False)
    if done.returncode != 0:
        raise ConfigError(
            f"modelled hosts: `{' '.join(command)}` failed ({done.stderr.strip()}); they need a Linux kernel with namespaces, veth, bridge "
            "and tbf, and a container needs --privileged"
        )
    return done.stdout
