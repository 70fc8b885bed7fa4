"""Does the planner rank sequence schemes as a slow link does? Two modelled hosts, 1 Gbit/s between them, predictions beside times.

    sudo .venv/bin/python benchmarks/link.py --out benchmarks/results/cpu/link.json --page benchmarks/README.md

First one rank a host, each on cores of its own: dsp, ulysses, fastseq, ring. Then two ranks a host, for usp: ulysses within a host, ring
between them; on two cores those are two ranks a core. The link's rate is measured before, through plain TCP; the prediction is
``parallel/sequence/predict.py``'s, from the network that is measured in the same run, between the same ranks. Exits with 1 where a pair of
schemes that the times tell apart is in another order than predicted. Needs root and iproute2.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from opensora_dist.core.errors import OpensoraError
from opensora_dist.core.io import write_json
from opensora_dist.core.types import Thw
from opensora_dist.recipes.bench.case import SequenceCase
from opensora_dist.recipes.bench.hosts import modelled_hosts
from opensora_dist.recipes.bench.link import NAMES, bench_link, link_record, link_table, measured_bit_per_s
from opensora_dist.recipes.bench.page import write_table


def main() -> int:
    """Parses, builds the hosts, calibrates, runs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mbit", type=float, default=1000, help="what each host can send, Mbit/s (default: %(default)s)")
    parser.add_argument("--grid", default="16x16x16", help="tokens of a sample (default: %(default)s)")
    parser.add_argument("--width", type=int, default=384, help="of the block (default: %(default)s)")
    parser.add_argument("--heads", type=int, default=8, help="of the block (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=15, help="passes of each scheme (default: %(default)s)")
    parser.add_argument("--per-host", type=int, nargs="+", default=[1, 2], help="ranks a host (default: 1 2)")
    parser.add_argument("--out", type=Path, required=True, help="the JSON file")
    parser.add_argument("--page", type=Path, help="Markdown page whose table is replaced")
    args = parser.parse_args()
    case = SequenceCase(grid=Thw(*map(int, args.grid.split("x"))), width=args.width, heads=args.heads)
    try:
        with modelled_hosts(NAMES, mbit=args.mbit) as hosts:
            bit_per_s = measured_bit_per_s(*hosts.values())
            link = f"{args.mbit:g} Mbit/s, measured {bit_per_s / 1e6:.0f} Mbit/s"
            print(f"link: {link} of payload through TCP", flush=True)
            found = [bench_link(hosts, case, per_host=n, rounds=args.rounds, link=link) for n in args.per_host]
    except OpensoraError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    record = link_record(case, found, mbit=args.mbit, bit_per_s=bit_per_s)
    write_json(args.out, record)
    print(link_table(record))
    if args.page is not None:
        write_table(args.page, link_table(record))
    return 1 if any(one["ranking"]["wrong"] for one in found) else 0


if __name__ == "__main__":
    sys.exit(main())
