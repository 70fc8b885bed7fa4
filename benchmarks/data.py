"""Samples per second of the reader and the loader, beside plain reads of the same bytes and beside other packages.

    python benchmarks/data.py --out benchmarks/results/cpu/data.json [--python loaders/bin/python]

The same as ``opensora-dist bench data``, which says what its options are; docs/reading.md says how to make the other environment.
"""

from __future__ import annotations

import sys

from opensora_dist.cli.main import main

if __name__ == "__main__":
    sys.exit(main(["bench", "data", *sys.argv[1:]]))
