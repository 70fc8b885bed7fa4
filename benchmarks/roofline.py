"""Writes docs/roofline.md's tables: what a step takes at least, beside what ``bench step`` measured, where results are stored.

python benchmarks/roofline.py --results benchmarks/results --page docs/roofline.md
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from opensora_dist.core.errors import ConfigError
from opensora_dist.recipes.bench.page import write_table
from opensora_dist.recipes.bench.roofline_page import page, stored_results


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=Path("benchmarks/results"), metavar="DIR", help="of folders by GPU")
    parser.add_argument("--page", type=Path, required=True, metavar="FILE", help="whose tables are written anew")
    args = parser.parse_args()
    try:
        measured = stored_results(args.results)
    except ConfigError as error:
        print("\n".join(error.problems), file=sys.stderr)
        return 2
    write_table(args.page, page(measured))
    print(args.page)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
