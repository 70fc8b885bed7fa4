"""Network interfaces, the address that other nodes would find ranks of this one under, and the speed of the loopback."""

from __future__ import annotations

import contextlib
import fcntl
import ipaddress
import os
import socket
import struct
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final

from opensora_dist.machine.finding import Finding, Level, Subject

NETWORK: Final = "network"
_SUBJECT: Final = Subject(NETWORK)
_SYS: Final = Path("/sys/class")
_SIOCGIFADDR = 0x8915  # linux/sockios.h
_SIOCGIFFLAGS = 0x8913
_IFF_UP, _IFF_LOOPBACK = 0x1, 0x8
_LOOPBACK_S = 0.3
_ANSWER_S = 5.0  # a loopback that is down carries nothing, and never says so
_CHUNK = 1 << 20


@dataclass(frozen=True, kw_only=True)
class Interface:
    """
    Args:
        name: As in eth0.
        address: Its first IPv4 address; None: it has none.
        up: It is switched on, and has a link as far as its driver knows.
        loopback: No other machine is reached by it.
        mbit_per_s: What its driver says; None where it doesn't.
        mtu: Largest packet, bytes.
    """

    name: str
    address: str | None
    up: bool
    loopback: bool
    mbit_per_s: int | None
    mtu: int | None


def interfaces() -> tuple[Interface, ...]:
    """Those of this machine, or of this container."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asked:
        return tuple(_interface(asked, name) for _, name in sorted(socket.if_nameindex()))


def _interface(asked: socket.socket, name: str) -> Interface:
    request = struct.pack("256s", name.encode()[:15])
    try:
        address = socket.inet_ntoa(fcntl.ioctl(asked.fileno(), _SIOCGIFADDR, request)[20:24])
    except OSError:
        address = None
    try:
        (flags,) = struct.unpack_from("h", fcntl.ioctl(asked.fileno(), _SIOCGIFFLAGS, request), 16)
    except OSError:
        flags = 0
    state, speed, mtu = (_read(_SYS / "net" / name / file) for file in ("operstate", "speed", "mtu"))
    return Interface(
        name=name,
        address=address,
        up=bool(flags & _IFF_UP) and state != "down",
        loopback=bool(flags & _IFF_LOOPBACK),
        mbit_per_s=int(speed) if speed is not None and speed.isdigit() else None,
        mtu=int(mtu) if mtu is not None else None,
    )


def _read(path: Path) -> str | None:
    try:
        return path.read_text().strip()
    except OSError:  # the driver of a virtual interface has no speed
        return None


@dataclass(frozen=True, kw_only=True)
class RankAddress:
    """Under which address gloo tells other ranks to reach this machine, and who said so; None: it finds none."""

    address: str | None
    said_by: str

    @property
    def loopback(self) -> bool:
        """Only this machine reaches it."""
        return self.address is not None and ipaddress.ip_address(self.address).is_loopback


def rank_address(variables: Mapping[str, str] = os.environ, *, known: Sequence[Interface] | None = None) -> RankAddress:
    """As gloo chooses: GLOO_SOCKET_IFNAME's (the first of several), else the one that this machine's own name resolves to.

    Source: torch/csrc/distributed/c10d/ProcessGroupGloo.cpp, createDefaultDevice.
    """
    chosen = variables.get("GLOO_SOCKET_IFNAME", "").split(",")[0]
    if chosen:
        by_name = {i.name: i for i in (interfaces() if known is None else known)}
        found = by_name.get(chosen)
        return RankAddress(address=None if found is None else found.address, said_by=f"GLOO_SOCKET_IFNAME={chosen}")
    name = socket.gethostname()
    try:
        address = socket.getaddrinfo(name, None, socket.AF_INET, socket.SOCK_STREAM)[0][4][0]
    except OSError:
        address = None
    return RankAddress(address=None if address is None else str(address), said_by=f"the host name {name}")


def network_findings(variables: Mapping[str, str] = os.environ) -> list[Finding]:
    """Interfaces, RDMA devices, and what ranks would use of them."""
    known = interfaces()
    found = [_of_interface(i) for i in known]
    found += rdma_findings(variables.get("NCCL_IB_HCA"))
    found.append(_of_address(rank_address(variables, known=known), known))
    found.append(_of_nccl(variables, known))
    return found


def interface_finding(name: str) -> Finding:
    """Whether the interface that a site names is here, up, and has an address."""
    known = {i.name: i for i in interfaces()}
    here = ", ".join(i.name for i in known.values() if i.up and not i.loopback) or "none but the loopback"
    way_out = f"name one of those that are up here ({here}) in network.interface, or mend this one"
    interface = known.get(name)
    if interface is None:
        return _SUBJECT.finding(name, Level.PROBLEM, f"there is no interface {name}, which network.interface names", way_out)
    if not interface.up or interface.address is None:
        said = "is down" if not interface.up else "has no IPv4 address"
        return _SUBJECT.finding(name, Level.PROBLEM, f"{name}, which network.interface names, {said}", way_out)
    return _of_interface(interface)


def _of_interface(interface: Interface) -> Finding:
    speed = "speed unknown" if interface.mbit_per_s is None else f"{interface.mbit_per_s / 1000:g} Gbit/s"
    state = "up" if interface.up else "down"
    words = ["loopback" if interface.loopback else speed, f"MTU {interface.mtu}", state, interface.address or "no IPv4 address"]
    return _SUBJECT.finding(interface.name, Level.OK, ", ".join(words), values=asdict(interface))


def rdma_findings(hcas: str | None) -> list[Finding]:
    """Ports of InfiniBand and RoCE: one that isn't active is a problem where NCCL is told to use it, and a warning elsewhere.

    Args:
        hcas: As network.hcas and NCCL_IB_HCA have it; None: NCCL chooses among those that are active.
    """
    found, used = [], 0
    way_out = "look at its cable and its subnet manager, or leave it out of network.hcas (NCCL_IB_HCA)"
    for port in sorted((_SYS / "infiniband").glob("*/ports/*")):
        name = f"{port.parts[-3]}:{port.name}"
        state, rate, layer = (_read(port / file) or "unknown" for file in ("state", "rate", "link_layer"))
        wanted = hcas is not None and _names_port(hcas, name)
        used += wanted
        level = Level.OK if "4: ACTIVE" in state else Level.PROBLEM if wanted else Level.WARNING
        said = f"{layer}, {rate}, {state}"
        found.append(_SUBJECT.finding(name, level, said, None if level is Level.OK else way_out))
    if hcas is not None and not used:
        here = ", ".join(finding.name for finding in found) or "there is none"
        said = f"no RDMA port of this machine is one of {hcas}, which network.hcas (NCCL_IB_HCA) names"
        found.append(_SUBJECT.finding("RDMA", Level.PROBLEM, said, f"name ports that are here ({here}), or mend its driver"))
    return found


def _names_port(hcas: str, port: str) -> bool:
    """By NCCL's rules: beginnings of names, with = whole names, with ^ all but those; with a port of a device, or without."""
    exact = hcas.lstrip("^").startswith("=")
    named = False
    for entry in filter(None, hcas.lstrip("^=").split(",")):
        device, _, number = entry.partition(":")
        name, _, its = port.partition(":")
        named |= (name == device if exact else name.startswith(device)) and number in ("", its)
    return named != hcas.startswith("^")


def _of_address(chosen: RankAddress, known: Sequence[Interface]) -> Finding:
    """Which address others would be told."""
    outer = [i.name for i in known if i.up and not i.loopback and i.address is not None]
    way_out = (
        f"on several machines set network.interface (GLOO_SOCKET_IFNAME={outer[0] if outer else 'eth0'}), or put the address that "
        "others reach this one by beside its name in /etc/hosts or DNS"
    )
    if chosen.address is None:
        said = f"{chosen.said_by} gives no address, so ranks would use the loopback, where no other machine finds them"
        return _SUBJECT.finding("ranks use", Level.WARNING, said, way_out)
    by = next((i.name for i in known if i.address == chosen.address), "no interface of this machine")
    values = {"address": chosen.address, "interface": by}
    if chosen.loopback:
        said = f"{chosen.said_by} gives {chosen.address}, where no other machine finds this one"
        return _SUBJECT.finding("ranks use", Level.WARNING, said, way_out, values=values)
    return _SUBJECT.finding("ranks use", Level.OK, f"{chosen.address} ({by}), by {chosen.said_by}", values=values)


def _of_nccl(variables: Mapping[str, str], known: Sequence[Interface]) -> Finding:
    """What NCCL was told; what it chooses by itself, NCCL_DEBUG=INFO says."""
    told = {name: variables[name] for name in ("NCCL_SOCKET_IFNAME", "NCCL_IB_HCA", "NCCL_IB_DISABLE") if name in variables}
    if not told:
        return _SUBJECT.finding("NCCL uses", Level.OK, "what it finds: no NCCL_SOCKET_IFNAME or NCCL_IB_HCA is set")
    said = ", ".join(f"{name}={value}" for name, value in told.items())
    # A list of prefixes; = asks for whole names, ^ for all but those.
    asked = told.get("NCCL_SOCKET_IFNAME", "")
    names = [name for name in asked.lstrip("=").split(",") if name]
    matched = [i for i in known for n in names if (i.name == n if asked.startswith("=") else i.name.startswith(n))]
    if names and not asked.startswith("^") and not matched:
        way_out = f"set it to one of {', '.join(i.name for i in known)}, or leave it out"
        return _SUBJECT.finding("NCCL uses", Level.PROBLEM, f"{said}, and there is no such interface", way_out)
    return _SUBJECT.finding("NCCL uses", Level.OK, said)


def loopback_bytes_per_s() -> float:
    """What one TCP connection of this machine to itself carries, during 0.3 s.

    Raises:
        OSError: It carries nothing, or nothing within 5 s.
    """
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(_ANSWER_S)
        sender = threading.Thread(target=_send, args=(server.getsockname(),), daemon=True)
        sender.start()
        connection, _ = server.accept()
        with connection:
            connection.settimeout(_ANSWER_S)
            buffer, total, began = bytearray(_CHUNK), 0, time.perf_counter()
            while count := connection.recv_into(buffer):
                total += count
            took = time.perf_counter() - began
        sender.join()
    return total / took


def _send(address: tuple[str, int]) -> None:
    chunk, deadline = bytes(_CHUNK), time.perf_counter() + _LOOPBACK_S
    # Whoever waits for it says what is wrong.
    with contextlib.suppress(OSError), socket.create_connection(address, timeout=_ANSWER_S) as connection:
        while time.perf_counter() < deadline:
            connection.sendall(chunk)


def loopback_finding() -> Finding:
    """The loopback's speed: a problem where it carries nothing, since ranks of one machine talk over it."""
    try:
        rate = loopback_bytes_per_s()
    except OSError as error:
        said = f"127.0.0.1 can't be talked to ({error.strerror or error})"
        return _SUBJECT.finding("loopback", Level.PROBLEM, said, "`ip link set lo up`, and look for a firewall")
    said = f"{rate / 1e9:.2f} GB/s by one TCP connection (measured)"
    return _SUBJECT.finding("loopback", Level.OK, said, values={"bytes_per_s": rate})
