"""Before ranks form a group: who came, and who reaches whom. A group that can't be formed only says that it can't."""

from __future__ import annotations

import ipaddress
import json
import os
import socket
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from datetime import timedelta

import torch.distributed as dist

from opensora_dist.core.errors import CommunicationError, ConfigError
from opensora_dist.machine.network import rank_address

_POLL_S = 0.02
_CONNECT_S = 5.0
_CONNECTIONS = 32  # tried at once


@dataclass(frozen=True, kw_only=True)
class Start:
    """What a launcher told this rank.

    Args:
        rank, world, local_rank: As torchrun counts.
        address, port: Where all meet.
        hosted: Somebody else keeps the store there (torchrun's agent).
    """

    rank: int
    world: int
    local_rank: int
    address: str
    port: int
    hosted: bool


_SLURM = {"RANK": "SLURM_PROCID", "WORLD_SIZE": "SLURM_NTASKS", "LOCAL_RANK": "SLURM_LOCALID"}


def start_of(variables: Mapping[str, str] = os.environ) -> Start:
    """From torchrun's variables, or where RANK isn't set, from Slurm's and MASTER_ADDR, MASTER_PORT.

    Raises:
        ConfigError: Variables that are missing.
    """
    names = {name: name if "RANK" in variables else slurm for name, slurm in _SLURM.items()}
    missing = [name for name in (*names.values(), "MASTER_ADDR", "MASTER_PORT") if name not in variables]
    if missing:
        raise ConfigError(f"not set: {', '.join(missing)}; start this by srun or torchrun, with MASTER_ADDR and MASTER_PORT")
    return Start(
        rank=int(variables[names["RANK"]]),
        world=int(variables[names["WORLD_SIZE"]]),
        local_rank=int(variables[names["LOCAL_RANK"]]),
        address=variables["MASTER_ADDR"],
        port=int(variables["MASTER_PORT"]),
        hosted=variables.get("TORCHELASTIC_USE_AGENT_STORE") == "True",
    )


@dataclass(frozen=True, kw_only=True)
class Hello:
    """
    Args:
        rank: Who says it.
        node: Where it is.
        address, port: Where it listens, under the address that gloo would tell others.
    """

    rank: int
    node: str
    address: str
    port: int


@dataclass(frozen=True, kw_only=True)
class Roll:
    """Who came, the same on every rank.

    Args:
        hellos: By rank.
        world: How many were to come.
        unreachable: Pairs of nodes of which the first could not reach the second.
        silent: Nodes that said hello, and then not whom they reach.
    """

    hellos: tuple[Hello, ...]
    world: int
    unreachable: tuple[tuple[str, str], ...]
    silent: tuple[str, ...]

    @property
    def nodes(self) -> dict[str, list[int]]:
        """Ranks by node, in the order of ranks."""
        found: dict[str, list[int]] = {}
        for hello in self.hellos:
            found.setdefault(hello.node, []).append(hello.rank)
        return found

    @property
    def hidden(self) -> list[str]:
        """Nodes whose address only they themselves reach, where there are others."""
        nodes = self.nodes
        at = {hello.node: hello.address for hello in self.hellos}
        return [node for node in nodes if len(nodes) > 1 and ipaddress.ip_address(at[node]).is_loopback]

    @property
    def whole(self) -> bool:
        """All came, and reach each other."""
        return len(self.hellos) == self.world and not self.unreachable and not self.silent and not self.hidden


class NoHeadError(CommunicationError):
    """The place where all meet can't be reached."""


def meet(start: Start, *, timeout_s: float) -> dist.Store:  # type: ignore[name-defined]  # not in torch's __all__
    """The store of all ranks; kept by rank 0 where torchrun's agent doesn't.

    Raises:
        NoHeadError: It can't be reached within ``timeout_s``.
    """
    try:
        return dist.TCPStore(  # type: ignore[attr-defined]  # not in torch's __all__
            start.address,
            start.port,
            start.world,
            is_master=start.rank == 0 and not start.hosted,
            wait_for_workers=False,
            timeout=timedelta(seconds=timeout_s),
        )
    except dist.DistError as error:
        raise NoHeadError(
            f"{start.address}:{start.port}, where all ranks meet, can't be reached within {timeout_s:g} s; check the network, a firewall, "
            f"and that the first node is alive ({' '.join(str(error).split())[:200]})"
        ) from error


def call_roll(
    store: dist.Store,  # type: ignore[name-defined]  # not in torch's __all__
    start: Start,
    *,
    node: str,
    timeout_s: float,
) -> Roll:
    """Every rank says hello; then each node's first rank connects to every other node. Collective, but for ranks that don't come.

    Args:
        node: This rank's.
        timeout_s: How long to wait for the last rank.
    Raises:
        CommunicationError: Rank 0 says nothing.
    """
    # Where this machine's name gives none, gloo takes the loopback, too.
    address = rank_address().address or "127.0.0.1"
    with _listening(address) as port:
        mine = Hello(rank=start.rank, node=node, address=address, port=port)
        store.set(f"hello/{start.rank}", json.dumps(asdict(mine)))
        if start.rank == 0:
            came = _collect(store, [f"hello/{rank}" for rank in range(start.world)], timeout_s=timeout_s)
            store.set("roll", json.dumps(list(came.values())))
        hellos = tuple(Hello(**value) for value in _answer(store, "roll", timeout_s=2 * timeout_s))
        roll = Roll(hellos=hellos, world=start.world, unreachable=(), silent=())
        firsts = [ranks[0] for ranks in roll.nodes.values()]
        if start.rank in firsts:
            store.set(f"reach/{start.rank}", json.dumps(_unreachable(roll, mine)))
        if start.rank == 0:
            said = _collect(store, [f"reach/{rank}" for rank in firsts], timeout_s=timeout_s)
            store.set("reach", json.dumps(list(said.items())))
        by_rank = {hello.rank: hello.node for hello in hellos}
        said_by = {
            by_rank[int(name.removeprefix("reach/"))]: others for name, others in _answer(store, "reach", timeout_s=2 * timeout_s)
        }
    return replace(
        roll,
        unreachable=tuple((node, other) for node, others in said_by.items() for other in others),
        silent=tuple(by_rank[rank] for rank in firsts if by_rank[rank] not in said_by),
    )


def leave(store: dist.Store, start: Start, *, timeout_s: float) -> None:  # type: ignore[name-defined]
    """Says that this rank needs the store no more; rank 0, which may keep it, waits for the others."""
    with suppress(dist.DistError):  # rank 0 gave up waiting: this one has heard all that there was to hear
        store.set(f"leave/{start.rank}", json.dumps(True))
    if start.rank == 0:
        _collect(store, [f"leave/{rank}" for rank in range(start.world)], timeout_s=timeout_s)


@contextmanager
def _listening(address: str) -> Iterator[int]:
    """A port of ``address`` that takes connections until the block is left."""
    with socket.create_server((address, 0), backlog=128) as server:
        thread = threading.Thread(target=_take, args=(server,), daemon=True)
        thread.start()
        yield server.getsockname()[1]
        server.shutdown(socket.SHUT_RDWR)  # wakes the thread
    thread.join()


def _take(server: socket.socket) -> None:
    while True:
        try:
            server.accept()[0].close()
        except OSError:  # it was shut down
            return


def _unreachable(roll: Roll, mine: Hello) -> list[str]:
    """Nodes whose first rank takes no connection."""
    by_rank = {hello.rank: hello for hello in roll.hellos}
    others = [by_rank[ranks[0]] for node, ranks in roll.nodes.items() if node != mine.node]

    def reaches(other: Hello) -> bool:
        try:
            socket.create_connection((other.address, other.port), timeout=_CONNECT_S).close()
        except OSError:
            return False
        return True

    with ThreadPoolExecutor(_CONNECTIONS) as pool:
        return [other.node for other, reached in zip(others, pool.map(reaches, others)) if not reached]


def _collect(store: dist.Store, names: Sequence[str], *, timeout_s: float) -> dict[str, object]:  # type: ignore[name-defined]
    """What is there of ``names`` once all are, or the time is over."""
    deadline = time.monotonic() + timeout_s
    missing = list(names)
    while (missing := [name for name in missing if not store.check([name])]) and time.monotonic() < deadline:
        time.sleep(_POLL_S)
    return {name: json.loads(store.get(name)) for name in names if name not in missing}


def _answer(store: dist.Store, name: str, *, timeout_s: float) -> list:  # type: ignore[name-defined, type-arg]
    """What rank 0 says.

    Raises:
        CommunicationError: Nothing.
    """
    try:
        store.wait([name], timedelta(seconds=timeout_s))
        value = json.loads(store.get(name))
    except dist.DistError as error:
        raise CommunicationError(
            f"rank 0 said nothing within {timeout_s:g} s; look at what its node says ({' '.join(str(error).split())[:200]})"
        ) from error
    assert isinstance(value, list)
    return value
