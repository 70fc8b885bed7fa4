"""Links between three hosts, which are modelled on this machine: one that is slow, cut or dead is named, and the others are not.

`make test-hosts` runs these, as root.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from contextlib import ExitStack
from pathlib import Path

import pytest

from opensora_dist.recipes.verdict import verdict

ROOT = Path(__file__).parents[2]
NAMES = ("node1", "node2", "node3")
FLOOR = 0.02  # GB/s: far below the 1 Gbit/s of a good link, far above the 20 Mbit/s of a bad one
LIMIT_S = 120.0

_SCRIPT = """
import os, sys
from pathlib import Path
import opensora_dist.machine.links  # and torch with it, so that all are about to begin together
from opensora_dist.config.site import PreflightSite, SiteConfig
from opensora_dist.recipes.preflight import links
folder, node, floor, timeout_s = sys.argv[1:]
site = SiteConfig(preflight=PreflightSite(timeout_s=float(timeout_s), all_reduce_gb_per_s=float(floor)))
print("ready", flush=True)
os._exit(links(site, node=node, folder=Path(folder), device="cpu"))
"""


@pytest.fixture(autouse=True)
def _good_links(hosts):
    """Whatever the test before did to them."""
    hosts.limit(1000)


def _try(hosts, folder, *, timeout_s=90.0, meanwhile=lambda: None):
    """``links`` on every host, one rank each; then the verdict. Nodes have reported that they are well themselves."""
    report = json.dumps({"problems": [], "shared": [], "commit": "a", "packages": {}})
    with ExitStack() as stack:
        started = []
        for rank, (name, host) in enumerate(hosts.items()):
            (folder / f"{name}.json").write_text(report)
            env = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "GLOO_SOCKET_IFNAME")}
            env |= {"SLURM_PROCID": str(rank), "SLURM_NTASKS": str(len(hosts)), "SLURM_LOCALID": "0", "OMP_NUM_THREADS": "1"}
            env |= {"MASTER_ADDR": hosts[NAMES[0]].address, "MASTER_PORT": "29555", "PYTHONPATH": str(ROOT)}
            command = host.command([sys.executable, "-c", _SCRIPT, str(folder), name, str(FLOOR), str(timeout_s)])
            started.append(stack.enter_context(subprocess.Popen(command, env=env, stdout=subprocess.PIPE, text=True)))
            stack.callback(started[-1].kill)
        for process in started:
            assert process.stdout is not None and process.stdout.readline() == "ready\n"
        meanwhile()
        for process in started:
            process.wait(timeout=LIMIT_S)
    return verdict(folder, NAMES, commit="a")


def test_three_good_hosts_are_fit_at_the_rate_of_their_links(hosts, tmp_path):
    assert _try(hosts, tmp_path).code == 0
    rates = [rate for _, _, rate in json.loads((tmp_path / "links.json").read_text())["pairs"]]
    assert len(rates) == 3 and all(0.05e9 < rate < 0.14e9 for rate in rates)


def test_a_host_with_a_slow_link_is_named_by_a_missed_floor(hosts, tmp_path):
    slow = ["tc", "-n", hosts["node3"].namespace, "qdisc", "replace", "dev", "eth0", "root"]
    subprocess.run([*slow, "tbf", "rate", "20mbit", "burst", "256kb", "latency", "50ms"], check=True)
    judged = _try(hosts, tmp_path)
    assert judged.code == 30 and list(judged.unfit) == ["node3"]
    assert "preflight.all_reduce_gb_per_s=0.02" in judged.unfit["node3"][0]


def test_a_host_whose_cable_is_pulled_before_is_named_and_so_is_the_first_one(hosts, tmp_path):
    for cut, folder in (("node2", tmp_path / "second"), ("node1", tmp_path / "first")):
        folder.mkdir()
        hosts.cut(cut)
        judged = _try(hosts, folder, timeout_s=30.0)
        hosts.mend(cut)
        assert judged.code == 30 and list(judged.unfit) == [cut]


def test_a_host_that_dies_while_links_are_tried_is_named(hosts, tmp_path):
    def kill() -> None:
        began = tmp_path / "links/rank-1.json"
        deadline = time.monotonic() + LIMIT_S
        while not began.is_file() and time.monotonic() < deadline:
            time.sleep(0.02)
        hosts.kill("node2")

    judged = _try(hosts, tmp_path, timeout_s=30.0, meanwhile=kill)
    assert judged.code == 30 and list(judged.unfit) == ["node2"]
