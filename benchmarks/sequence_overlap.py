"""Does a sequence scheme hide its communication? One STDiT block behind a link of 1 Gbit/s, and over loopback, held to what is claimed.

    sudo .venv/bin/python benchmarks/sequence_overlap.py --out benchmarks/results/cpu

Runs ``opensora-dist bench sequence`` three times on two ranks, each on a core of its own: DSP over the modelled link, FastSeq and
Ulysses over the same link, and every scheme over loopback, where communication costs the cores that compute and the
question is only what overlapping costs. Prints each claim with what was measured; exit code 1 where one isn't met. Of DSP over the link
a trace is made too, and the share of its transfers' time in which a core multiplies matrices is printed.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from opensora_dist.core.io import read_json
from opensora_dist.recipes.bench.trace import hidden_under_products

HERE = Path(__file__).resolve().parent
BLOCK = ["--grid", "16x16x16", "--width", "384", "--heads", "8"]
MBIT = "1000"


def bench(name: str, *, out: Path, link: bool, rounds: int, options: list[str]) -> dict[str, dict[str, Any]]:
    """Runs the benchmark, keeps its JSON as ``sequence_NAME.json``, and gives its results by form.

    With ``--trace`` among the options, says what rank 0's trace shows, and keeps none: it is of many megabytes.
    """
    with tempfile.TemporaryDirectory() as work:
        command = [
            sys.executable,
            "-m",
            "opensora_dist",
            "bench",
            "sequence",
            *BLOCK,
            "--rounds",
            str(rounds),
            "--out",
            work,
            *options,
        ]
        if link:
            command = [sys.executable, str(HERE / "modelled_link.py"), "--mbit", MBIT, "--", *command]
        else:
            command += ["--nproc", "2", "--pin"]
        subprocess.run(command, check=True)
        kept = out / f"sequence_{name}.json"
        kept.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(Path(work) / "sequence.json", kept)
        results = {result["name"]: result for result in read_json(kept)["results"]}
        if "--trace" in options:
            trace = read_json(Path(work) / "trace-0.json")
            for form in results:
                share = hidden_under_products(trace, form=form)
                print(f"trace of one pass of {form}: matrix products run in {100 * share:.0f} % of the time that transfers take")
    return results


def claims(
    dsp: dict[str, dict[str, Any]], heads: dict[str, dict[str, Any]], loopback: dict[str, dict[str, Any]]
) -> Iterator[tuple[str, float | None, str, float]]:
    """(what is claimed, what was measured, "<=" or ">=", the bar). Nothing is measured as hidden where the blocking form exposes nothing."""
    figures = dsp["dsp overlapped"]["figures"]
    yield "1 Gbit/s: dsp over DeepSpeed's Ulysses, median of rounds", figures["ratio"]["median"], "<=", 0.80
    yield "1 Gbit/s: dsp, wall time hidden", figures["hidden"]["both"]["wall"], ">=", 0.60
    yield "1 Gbit/s: dsp, wait hidden", figures["hidden"]["both"]["wait"], ">=", 0.85
    for kind in ("forward", "backward"):
        hidden = heads["fastseq overlapped"]["figures"]["hidden"][kind]
        yield f"1 Gbit/s: fastseq, wall time hidden in {kind}", hidden["wall"], ">=", 0.60
    timed = [result for results in (dsp, heads, loopback) for result in results.values() if result["sent"] is not None]
    yield f"forms of {len(timed)} whose bytes differ from their formula", sum(r["sent"] != r["formula"] for r in timed), "<=", 0
    for name, result in loopback.items():
        scheme, _, form = name.rpartition(" ")
        if form == "overlapped":
            blocking = loopback[f"{scheme} blocking"]["figures"]["both_ms"]["median"]
            yield f"loopback: {name} over blocking", result["figures"]["both_ms"]["median"] / blocking, "<=", 1.03


def main() -> int:
    """Runs all, prints the claims."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=HERE / "results/cpu", help="where the JSON goes (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=21, help="rounds of each run (default: %(default)s)")
    args = parser.parse_args()
    dsp = bench(
        "1gbit_dsp", out=args.out, link=True, rounds=args.rounds, options=["--schemes", "dsp", "deepspeed", "yunchang", "--trace"]
    )
    heads = bench(
        "1gbit_heads",
        out=args.out,
        link=True,
        rounds=args.rounds,
        options=["--schemes", "fastseq", "ulysses", "deepspeed"],
    )
    loopback = bench("loopback", out=args.out, link=False, rounds=args.rounds, options=[])
    failed = 0
    for what, measured, relation, bar in claims(dsp, heads, loopback):
        met = measured is not None and (measured <= bar if relation == "<=" else measured >= bar)
        failed += not met
        found = "the blocking form exposes nothing, so there is nothing to hide" if measured is None else f"{measured:.3f}"
        print(f"{'met   ' if met else 'NOT MET'} {what}: {found} {relation} {bar}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
