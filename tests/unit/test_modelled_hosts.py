"""Hosts modelled by network namespaces: what tests of several nodes stand on. Where this isn't root, only that it is said."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from threading import Event

import pytest

from opensora_dist.core.errors import ConfigError
from opensora_dist.recipes.bench.hosts import Host, Hosts, hosts_problems, modelled_hosts

needs_hosts = pytest.mark.skipif(bool(hosts_problems(["a"])), reason=" ".join(hosts_problems(["a"])))
_LISTEN = "import socket; s = socket.create_server(('', 5000)); print('ready', flush=True); s.settimeout(20); s.accept()[0].sendall(b'heard')"
_ASK = "import socket; s = socket.create_connection(('right', 5000), timeout=1); print(s.recv(5).decode())"


@pytest.fixture
def hosts() -> Iterator[Hosts]:
    with modelled_hosts(["left", "right"], mbit=1000) as made:
        yield made


def _run(host: Host, *argv: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(host.command(argv), capture_output=True, text=True, timeout=30)


@needs_hosts
def test_a_host_has_a_name_an_address_and_an_interface_of_its_own(hosts: Hosts) -> None:
    said = _run(hosts["left"], "sh", "-c", "hostname; cd /sys/class/net; echo *; getent hosts right").stdout.split()
    assert said == ["left", "eth0", "lo", hosts["right"].address, "right"]


@needs_hosts
def test_a_cut_host_is_not_reached_until_it_is_mended(hosts: Hosts) -> None:
    with subprocess.Popen(
        hosts["right"].command([sys.executable, "-c", _LISTEN]), stdout=subprocess.PIPE, text=True
    ) as listening:
        assert listening.stdout is not None and listening.stdout.readline() == "ready\n"
        hosts.cut("right")
        assert "TimeoutError" in _run(hosts["left"], sys.executable, "-c", _ASK).stderr
        hosts.mend("right")
        assert _run(hosts["left"], sys.executable, "-c", _ASK).stdout == "heard\n"


@needs_hosts
def test_all_that_runs_on_a_killed_host_is_gone_and_nothing_of_others(hosts: Hosts) -> None:
    killed, kept = (subprocess.Popen(hosts[name].command(["sleep", "60"])) for name in ("left", "right"))
    while not hosts["left"].processes():
        pass
    hosts.kill("left")
    assert killed.wait(timeout=5) == -signal.SIGKILL
    assert kept.poll() is None
    kept.kill()
    kept.wait()


@needs_hosts
def test_hosts_are_gone_when_their_maker_is_killed() -> None:
    code = (
        "import subprocess, time\nfrom opensora_dist.recipes.bench.hosts import modelled_hosts\n"
        "with modelled_hosts(['left']) as hosts:\n"
        "    p = subprocess.Popen(hosts['left'].command(['sleep', '60']))\n"
        "    print(p.pid, hosts['left'].namespace, hosts['left'].folder.parent, flush=True)\n    time.sleep(60)\n"
    )
    maker = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert maker.stdout is not None
    pid, namespace, folder = maker.stdout.readline().split()
    maker.kill()
    maker.communicate()
    left = [Path("/proc", pid, "ns"), Path("/run/netns", namespace), Path(folder)]
    pause = Event()
    for _ in range(500):
        if not any(path.exists() for path in left):
            break
        pause.wait(0.02)
    assert not any(path.exists() for path in left)


def test_names_that_cannot_be_hosts_are_refused_all_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        with modelled_hosts(["Node 1", "a", "a"]):
            pass
    assert "'Node 1' is no name of a host" in str(caught.value) and "each one once" in str(caught.value)
