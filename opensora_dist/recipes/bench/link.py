"""Sequence schemes between two modelled hosts behind a slow link: what is measured beside what the planner predicts from that network."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from itertools import combinations
from pathlib import Path
from typing import Any

from opensora_dist.config.train import SpConfig
from opensora_dist.core.errors import OpensoraError
from opensora_dist.core.io import read_json
from opensora_dist.core.types import Thw
from opensora_dist.parallel.sequence.network import Network, read_network
from opensora_dist.parallel.sequence.predict import SampleCost, Workload, predict
from opensora_dist.recipes.auto import sample_cost
from opensora_dist.recipes.bench.case import SequenceCase, build_block, meta_model
from opensora_dist.recipes.bench.figures import Spread
from opensora_dist.recipes.bench.hosts import Host, Hosts
from opensora_dist.recipes.bench.show import about, ms, three

_PORT = 29_655
_PROBE_BYTES = 64 << 20
_POLL_S = 0.05
SCHEMES = ("dsp", "ulysses", "fastseq", "ring", "usp")
NAMES = ("node1", "node2")


def measured_bit_per_s(sender: Host, receiver: Host) -> float:
    """Payload that arrives from one host at another through plain TCP."""
    receive = (
        "import socket,sys,time\n"
        f"s=socket.create_server(('{receiver.address}',{_PORT}));print('up',flush=True);c,_=s.accept();n=0;b=bytearray(1<<20)\n"
        "t=time.perf_counter()\n"
        "while k:=c.recv_into(b): n+=k\n"
        "print(n/(time.perf_counter()-t))"
    )
    send = f"import socket;s=socket.create_connection(('{receiver.address}',{_PORT}));s.sendall(bytes({_PROBE_BYTES}))"
    with subprocess.Popen(receiver.command([sys.executable, "-c", receive]), stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None and server.stdout.readline() == "up\n"
        subprocess.run(sender.command([sys.executable, "-c", send]), check=True)
        return 8 * float(server.stdout.readline())


def run_ranks_on(hosts: Hosts, argv: Sequence[str], *, per_host: int, link: str) -> int:
    """Runs a command as ranks of all hosts, those of one next to each other; rank 0's output is shown, the others' only if they fail.

    Each host has its share of this machine's cores, or shares one where there are fewer.

    Args:
        link: What the link is, for records (``OPENSORA_LINK``).
    Returns:
        0, or the exit code of a rank that failed.
    """
    cores = sorted(os.sched_getaffinity(0))
    share = max(1, len(cores) // len(hosts))
    head = next(iter(hosts.values())).address
    with ExitStack() as stack:
        ranks: list[tuple[subprocess.Popen[bytes], Any]] = []
        for number, host in enumerate(hosts.values()):
            mine = cores[number * share % len(cores) :][:share]
            for local in range(per_host):
                env = {
                    "RANK": str(number * per_host + local),
                    "WORLD_SIZE": str(len(hosts) * per_host),
                    "LOCAL_RANK": str(local),
                    "LOCAL_WORLD_SIZE": str(per_host),
                    "MASTER_ADDR": head,
                    "MASTER_PORT": str(_PORT),
                    "GLOO_SOCKET_IFNAME": "eth0",
                    "OMP_NUM_THREADS": str(max(1, share // per_host)),
                    "OPENSORA_LINK": link,
                }
                said = None if not ranks else stack.enter_context(tempfile.TemporaryFile())
                command = host.command(["taskset", "-c", ",".join(map(str, mine)), *argv])
                process = subprocess.Popen(command, env=os.environ | env, stdout=said, stderr=said and subprocess.STDOUT)
                ranks.append((process, said))
        try:
            while any(p.poll() is None for p, _ in ranks) and not any(p.poll() for p, _ in ranks):
                time.sleep(_POLL_S)
        finally:
            for process, _ in ranks:
                process.terminate()
            codes = [process.wait() for process, _ in ranks]
        for rank, (code, (_, said)) in enumerate(zip(codes, ranks, strict=True)):
            if code and said is not None:
                said.seek(0)
                print(f"--- rank {rank}\n{said.read().decode(errors='replace')}", file=sys.stderr)
        return next((code for code in codes if code), 0)


@dataclass(frozen=True, kw_only=True)
class Ranking:
    """Predicted and measured times side by side.

    Args:
        tau: Kendall's, over the pairs that the measurement tells apart: 1 is the same order, -1 the reverse; None where it tells none.
        wrong: Pairs (faster, slower) as predicted that were measured the other way round.
        ties: Pairs whose ratio, round by round, has 1 within its quartiles.
    """

    tau: float | None
    wrong: tuple[tuple[str, str], ...]
    ties: tuple[tuple[str, str], ...]


def ranking(predicted: Mapping[str, float], measured: Mapping[str, Sequence[float]]) -> Ranking:
    """
    Args:
        predicted: Seconds, by scheme.
        measured: Seconds in each round, by scheme; of the same rounds.
    """
    right, wrong, ties = 0, [], []
    for faster, slower in combinations(sorted(predicted, key=lambda name: predicted[name]), 2):
        ratio = Spread.of([a / b for a, b in zip(measured[faster], measured[slower], strict=True)])
        if ratio.low <= 1 <= ratio.high:
            ties.append((faster, slower))
        elif ratio.median < 1:
            right += 1
        else:
            wrong.append((faster, slower))
    told = right + len(wrong)
    return Ranking(tau=(right - len(wrong)) / told if told else None, wrong=tuple(wrong), ties=tuple(ties))


def block_cost(case: SequenceCase) -> SampleCost:
    """What one block does with a sample, as ``predict`` asks for it."""
    block = build_block(case)
    whole = sample_cost(meta_model(case), case.grid, text_tokens=case.text_tokens)
    flops = block.flops(case.grid, text_tokens=case.text_tokens)
    # In the block every rank does the captions' keys and values, and nothing else that isn't of its own tokens.
    text = flops - block.mix_flops(case.grid) - whole.then_flops
    return replace(whole, flops=flops, replicated_flops=text)


def predicted_s(case: SequenceCase, network: Network, *, schemes: Sequence[str], ulysses: int) -> dict[str, float]:
    """Seconds of a block's forward and backward, by scheme.

    Args:
        ulysses: Inner axis of usp.
    """
    work = Workload(
        grid=case.grid, batch=case.batch, cost=block_cost(case), element_bytes=case.element_bytes, recompute=case.recompute
    )
    found = {}
    for name in schemes:
        given = {"scheme": name, "degree": network.world, "ulysses": ulysses if name == "usp" else None}
        sp = SpConfig.model_validate(given)
        found[name] = predict(work, name, network.world, network, sp=sp).step_s
    return found


def bench_link(hosts: Hosts, case: SequenceCase, *, per_host: int, rounds: int, link: str) -> dict[str, Any]:
    """Measures the network and the schemes among the ranks of all hosts, and holds the times to the prediction.

    Raises:
        OpensoraError: A rank failed.
    """
    world = per_host * len(hosts)
    schemes = SCHEMES if per_host > 1 else SCHEMES[:-1]  # a usp of two ranks is ulysses or ring
    with tempfile.TemporaryDirectory() as folder:
        network_file, out = Path(folder, "network.json"), Path(folder, "sequence")
        grid, program = str(case.grid), [sys.executable, "-m", "opensora_dist", "bench"]
        measure = [*program, "network", "--width", str(case.width), "--out", str(network_file)]
        block = ["--grid", grid, "--width", str(case.width), "--heads", str(case.heads), "--text-tokens", str(case.text_tokens)]
        options = ["--rounds", str(rounds), "--schemes", *schemes, "--ulysses", str(per_host), "--out", str(out)]
        for argv in (measure, [*program, "sequence", *block, *options]):
            if code := run_ranks_on(hosts, argv, per_host=per_host, link=link):
                raise OpensoraError(f"`{' '.join(argv[2:])}` over {world} ranks of {len(hosts)} modelled hosts ended with {code}")
        network = read_network(network_file)
        results = {r["scheme"]: r for r in read_json(out / "sequence.json")["results"] if r["overlap"]}
    predicted = predicted_s(case, network, schemes=tuple(results), ulysses=per_host)
    measured = {name: [p["forward_s"] + p["backward_s"] for p in r["passes"]] for name, r in results.items()}
    return {
        "ranks_per_host": per_host,
        "world": world,
        "network": asdict(network),
        "schemes": {name: {"predicted_s": predicted[name], "measured_s": measured[name]} for name in predicted},
        "ranking": asdict(ranking(predicted, measured)),
    }


def link_record(case: SequenceCase, found: Sequence[Mapping[str, Any]], *, mbit: float, bit_per_s: float) -> dict[str, Any]:
    """Everything, as JSON values."""
    return {
        "format": 1,
        "case": case.record(),
        "mbit": mbit,
        "measured_mbit": bit_per_s / 1e6,
        "cores": len(os.sched_getaffinity(0)),
        **about(max(int(one["world"]) for one in found)),
        "worlds": list(found),
    }


def link_table(record: Mapping[str, Any]) -> str:
    """Markdown: a table for each number of ranks, fastest prediction first."""
    case = record["case"]
    lines = [
        f"One {case['model']} block, {Thw(*case['grid'])} tokens, width {case['width']}, {case['heads']} heads, {case['dtype']}; two modelled "
        f"hosts on {record['cores']} cores; {record['mbit']:g} Mbit/s asked, {record['measured_mbit']:.0f} measured through TCP.",
    ]
    for one in record["worlds"]:
        network, order = one["network"], one["ranking"]
        lines += [
            "",
            f"{one['world']} ranks, {one['ranks_per_host']} a host; {network['bytes_per_s'] / 1e6:.0f} MB/s to others per rank, "
            f"{1e6 * network['latency_s']:.0f} us, {network['flops_per_s'] / 1e9:.1f} GFLOP/s, measured:",
            "",
            "| scheme | predicted, ms | measured, ms |",
            "| --- | --- | --- |",
        ]
        for name in sorted(one["schemes"], key=lambda name: one["schemes"][name]["predicted_s"]):
            times = one["schemes"][name]
            spread = Spread.of([1e3 * s for s in times["measured_s"]])
            lines.append(f"| `{name}` | {three(1e3 * times['predicted_s'])} | {ms(spread)} |")
        lines += ["", _verdict(order)]
    return "\n".join(lines)


def _verdict(order: Mapping[str, Any]) -> str:
    def pairs(of: Sequence[Sequence[str]]) -> str:
        return ", ".join(f"`{a}` and `{b}`" for a, b in of)

    tau = "no pair is told apart" if order["tau"] is None else f"Kendall's tau {order['tau']:.2f}"
    said = "The order is the one predicted" if not order["wrong"] else f"Not in the predicted order: {pairs(order['wrong'])}"
    ties = f"; ties, within the quartiles of their ratio: {pairs(order['ties'])}" if order["ties"] else ""
    return f"{said} ({tau}){ties}."
