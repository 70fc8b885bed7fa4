"""Runs a command as ranks in network namespaces of their own, joined by links of a given rate: a small cluster on one machine.

    sudo python benchmarks/modelled_link.py --rate 1gbit -- python -m opensora_dist bench sequence --out runs/overlap ...

Loopback has no rate, and what it costs is paid by the cores that compute, so there is nothing to hide there. Here each rank sits in a
namespace, pinned to cores of its own, behind a token-bucket filter. The rate is measured before the command runs and printed; the
bucket's ``latency`` only bounds its queue, it delays nothing. Needs root, and iproute2 (Debian: iproute2).
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

_BRIDGE = "osdbr"
_PORT = 29_655
_PROBE_BYTES = 64 * 2**20


def _address(rank: int) -> str:
    return f"10.77.0.{rank + 1}"


def _namespace(rank: int) -> str:
    return f"osd{rank}"


def _inside(rank: int, command: Sequence[str]) -> list[str]:
    # nsenter and not `ip netns exec`, which mounts another /sys.
    return ["nsenter", f"--net=/run/netns/{_namespace(rank)}", *command]


def _ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True)


@contextmanager
def links(world: int, *, rate: str) -> Iterator[None]:
    """One namespace per rank, all on one bridge, each sending at ``rate`` at most. Removed afterwards, come what may."""
    _remove(world)
    try:
        _ip("link", "add", _BRIDGE, "type", "bridge")
        _ip("link", "set", _BRIDGE, "up")
        for rank in range(world):
            name, peer = _namespace(rank), f"osdp{rank}"
            _ip("netns", "add", name)
            _ip("link", "add", "eth0", "netns", name, "type", "veth", "peer", "name", peer)
            _ip("link", "set", peer, "master", _BRIDGE, "up")
            _ip("-n", name, "addr", "add", f"{_address(rank)}/24", "dev", "eth0")
            for device in ("lo", "eth0"):
                _ip("-n", name, "link", "set", device, "up")
            shape = ["tc", "qdisc", "replace", "dev", "eth0", "root", "tbf", "rate", rate, "burst", "256kb", "latency", "50ms"]
            subprocess.run(_inside(rank, shape), check=True)
        yield
    finally:
        _remove(world)


def _remove(world: int) -> None:
    for rank in range(world):
        subprocess.run(["ip", "link", "del", f"osdp{rank}"], check=False, stderr=subprocess.DEVNULL)
        subprocess.run(["ip", "netns", "del", _namespace(rank)], check=False, stderr=subprocess.DEVNULL)
    subprocess.run(["ip", "link", "del", _BRIDGE], check=False, stderr=subprocess.DEVNULL)


def measured_rate() -> float:
    """Bytes per second that arrive at rank 1 from rank 0 through plain TCP."""
    receive = (
        "import socket,sys,time\n"
        f"s=socket.create_server(('{_address(1)}',{_PORT}));print('up',flush=True);c,_=s.accept();n=0;b=bytearray(1<<20)\n"
        "t=time.perf_counter()\n"
        "while k:=c.recv_into(b): n+=k\n"
        "print(n/(time.perf_counter()-t))"
    )
    send = f"import socket;s=socket.create_connection(('{_address(1)}',{_PORT}));s.sendall(bytes({_PROBE_BYTES}))"
    with subprocess.Popen(_inside(1, [sys.executable, "-c", receive]), stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None and server.stdout.readline() == "up\n"
        subprocess.run(_inside(0, [sys.executable, "-c", send]), check=True)
        return float(server.stdout.readline())


def run(command: Sequence[str], *, world: int) -> int:
    """Runs the command as every rank; rank 0's output is shown, the others' only if they fail. Returns the first failing code."""
    cores = sorted(os.sched_getaffinity(0))
    share = max(1, len(cores) // world)
    ranks = []
    for rank in range(world):
        env = {
            "RANK": str(rank),
            "WORLD_SIZE": str(world),
            "LOCAL_RANK": "0",
            "MASTER_ADDR": _address(0),
            "MASTER_PORT": str(_PORT),
            "GLOO_SOCKET_IFNAME": "eth0",
            "OMP_NUM_THREADS": str(share),
        }
        mine = cores[rank * share % len(cores) :][:share]
        pinned = ["taskset", "-c", ",".join(map(str, mine)), *command]
        ranks.append(
            subprocess.Popen(
                _inside(rank, pinned),
                env=os.environ | env,
                stdout=None if rank == 0 else subprocess.PIPE,
                stderr=None if rank == 0 else subprocess.STDOUT,
                text=True,
            )
        )
    said: dict[int, str] = {}
    readers = [
        threading.Thread(target=lambda r, p: said.update({r: p.communicate()[0]}), args=(rank, process), daemon=True)
        for rank, process in enumerate(ranks)
        if rank
    ]
    for reader in readers:
        reader.start()
    try:
        while any(p.poll() is None for p in ranks) and not any(p.poll() for p in ranks):
            time.sleep(0.05)
    finally:
        for process in ranks:
            process.terminate()
        codes = [process.wait() for process in ranks]
    for reader in readers:
        reader.join()
    failed = [(rank, code) for rank, code in enumerate(codes) if code]
    for rank, _ in failed:
        print(f"--- rank {rank}\n{said.get(rank, '')}", file=sys.stderr)
    return failed[0][1] if failed else 0


def main() -> int:
    """Parses, builds the links, calibrates, runs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rate", default="1gbit", help="what each rank can send, as tc writes it (default: %(default)s)")
    parser.add_argument("--world", type=int, default=2, help="ranks (default: %(default)s)")
    parser.add_argument("command", nargs="+", help="what every rank runs, after --")
    args = parser.parse_args()
    missing = [tool for tool in ("ip", "tc", "nsenter", "taskset") if shutil.which(tool) is None]
    if os.geteuid() != 0 or missing or args.world < 2:
        parser.error(f"needs root, two or more ranks, and ip, tc, nsenter, taskset (missing: {missing or 'none'})")
    with links(args.world, rate=args.rate):
        rate = measured_rate()
        print(f"link: asked {args.rate}, measured {rate * 8 / 1e9:.3f} Gbit/s of payload through TCP", flush=True)
        os.environ["OPENSORA_LINK"] = f"{args.rate}, measured {rate * 8 / 1e9:.3f} Gbit/s"
        return run(args.command, world=args.world)


if __name__ == "__main__":
    sys.exit(main())
