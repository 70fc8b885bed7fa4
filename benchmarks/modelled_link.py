"""Runs a command as ranks of modelled hosts, joined by links of a given rate: a small cluster on one machine.

    sudo python benchmarks/modelled_link.py --mbit 1000 -- python -m opensora_dist bench sequence --out runs/overlap ...

Loopback has no rate, and what it costs is paid by the cores that compute, so there is nothing to hide there. Here each rank is a host of
its own, pinned to cores of its own, behind a token-bucket filter. The rate is measured before the command runs and printed; the bucket's
``latency`` only bounds its queue, it delays nothing. Needs root, and iproute2 (Debian: iproute2).
"""

from __future__ import annotations

import argparse
import sys

from opensora_dist.core.errors import ConfigError
from opensora_dist.recipes.bench.hosts import modelled_hosts
from opensora_dist.recipes.bench.link import measured_bit_per_s, run_ranks_on


def main() -> int:
    """Parses, builds the hosts, calibrates, runs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mbit", type=float, default=1000, help="what each host can send, Mbit/s (default: %(default)s)")
    parser.add_argument("--world", type=int, default=2, help="hosts, of one rank each (default: %(default)s)")
    parser.add_argument("command", nargs="+", help="what every rank runs, after --")
    args = parser.parse_args()
    if args.world < 2:
        parser.error(f"--world must be 2 or more, and is {args.world}")
    try:
        with modelled_hosts([f"node{i + 1}" for i in range(args.world)], mbit=args.mbit) as hosts:
            gbit = measured_bit_per_s(hosts["node1"], hosts["node2"]) / 1e9
            print(f"link: asked {args.mbit:g} Mbit/s, measured {gbit:.3f} Gbit/s of payload through TCP", flush=True)
            return run_ranks_on(hosts, args.command, per_host=1, link=f"{args.mbit:g} Mbit/s, measured {gbit:.3f} Gbit/s")
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
