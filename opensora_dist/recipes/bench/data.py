"""How fast samples are read: beside plain reads of the same bytes, and beside what other packages do with them, in one run."""

from __future__ import annotations

import os
import statistics
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from opensora_dist.core.io import write_json
from opensora_dist.core.logging import get_logger
from opensora_dist.core.types import Thw
from opensora_dist.data.index import Index
from opensora_dist.observe.environment import describe_environment
from opensora_dist.recipes.bench.data_ways import (
    RAW,
    DataCase,
    Others,
    Timed,
    Way,
    loader_name,
    our_ways,
    reader_name,
    shuffled_name,
    write_samples,
)
from opensora_dist.recipes.bench.figures import Spread
from opensora_dist.recipes.bench.page import write_table

_log = get_logger(__name__)
CLIPS = (Thw(16, 256, 256), Thw(64, 512, 512))
"""Samples of 1.1 MB and 3.1 MB, with 120 text tokens of width 4096."""


_LEAST_S, _EPOCHS = 0.25, 4


@dataclass(frozen=True, kw_only=True)
class DataOptions:
    """What is measured.

    Args:
        num_bytes: Of each data set, about.
        rounds: In each, every way makes a pass.
        batch: Samples of a batch.
        threads: That read from the page cache; processes of others.
        disk_threads: That read from the disk, which is fast only with many requests at once.
        python: Interpreter that has the other packages; None: this one.
        work: Folder on the disk that is measured.
    """

    num_bytes: int
    rounds: int
    batch: int
    threads: int
    disk_threads: int
    python: str | None
    work: Path | None


@dataclass(frozen=True, kw_only=True)
class Bar:
    """A ratio that is asked for."""

    name: str
    of: str
    to: str
    cold: bool
    least: float

    def found(self, rates: Mapping[str, Sequence[float]]) -> float | None:
        """The median over rounds, of what was measured."""
        if self.of not in rates or self.to not in rates:
            return None
        return statistics.median(a / b for a, b in zip(rates[self.of], rates[self.to], strict=True))


def cold_names(threads: int) -> tuple[str, ...]:
    """What is measured from the disk."""
    ways = (reader_name(1), reader_name(threads), f"{reader_name(threads)}, shuffled", loader_name(threads))
    return RAW, shuffled_name(threads), *ways


def bars(threads: int, *, disk_threads: int) -> tuple[Bar, ...]:
    """What is asked for. The disk's rate is that of plain reads in the order and by the threads that are compared."""
    from_disk = shuffled_name(disk_threads)
    reader, loader, many = reader_name(threads), loader_name(threads), "webdataset, DataLoader"
    return (
        Bar(name="reader over raw", of=reader, to=RAW, cold=False, least=0.85),
        Bar(name="reader, shuffled, over raw", of=f"{reader}, shuffled", to=RAW, cold=False, least=0.85),
        Bar(name="loader over raw", of=loader, to=RAW, cold=False, least=0.5),
        Bar(name="loader over webdataset", of=loader, to=many, cold=False, least=5.0),
        Bar(name="reader over the disk, in order", of=reader_name(1), to=RAW, cold=True, least=0.9),
        Bar(
            name="reader over the disk, shuffled", of=f"{reader_name(disk_threads)}, shuffled", to=from_disk, cold=True, least=0.9
        ),
        Bar(name="loader over the disk", of=loader_name(disk_threads), to=from_disk, cold=True, least=0.9),
    )


def bench_data(options: DataOptions, *, out: Path | None, page: Path | None = None, console: Console | None = None) -> bool:
    """Measures, prints tables and bars, writes JSON; returns whether every bar that could be measured is met.

    Args:
        out: The JSON file.
        page: Markdown page whose table is replaced.
    """
    console = console or Console()
    if not console.is_terminal:
        console = Console(width=140, file=console.file)
    found: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="bench-data-", dir=options.work) as folder:
        for clip in CLIPS:
            case = DataCase(clip=clip, folder=Path(folder, str(clip)), batch=options.batch, threads=options.threads)
            found.append(_measure(case, options, work=Path(folder, f"{clip}-others")))
            _print(console, found[-1])
    environment = describe_environment()
    about = {key: environment[key] for key in ("cpu", "cpu_cores", "platform", "git")}
    shown = {name: value for name, value in asdict(options).items() if name not in ("python", "work")}
    if out is not None:
        write_json(out, {**about, "load_average": os.getloadavg()[0], "settings": shown, "cases": found})
    if page is not None:
        write_table(page, markdown(found))
    return all(bar["met"] is not False for case in found for bar in case["bars"])


def _measure(case: DataCase, options: DataOptions, *, work: Path) -> dict[str, Any]:
    """One size of samples."""
    index = write_samples(case, num_bytes=options.num_bytes)
    missing, cold_rates = {}, {}
    with ExitStack() as stack:
        ways = stack.enter_context(our_ways(index, case, epochs=_EPOCHS))
        others = stack.enter_context(Others(options.python))
        for name, why, way in others.open(index, case, work=work):
            if why is None:
                ways[name] = way
            else:
                missing[name] = why
        for way in ways.values():
            way()  # warm: the page cache, worker processes
        warm_rates = _rounds({name: partial(_long, way) for name, way in ways.items()}, options.rounds, before=lambda: None)
    if not in_memory(case.folder):
        with our_ways(index, replace(case, threads=options.disk_threads), epochs=1) as all_ways:
            cold = {name: way for name, way in all_ways.items() if name in cold_names(options.disk_threads)}
            cold_rates = _rounds(cold, options.rounds, before=lambda: drop_cache(index))
    else:
        missing["from the disk"] = f"the file system of {case.folder} is memory; name a folder on a disk with --work"
    rows = [
        {
            "bar": bar.name,
            "cold": bar.cold,
            "least": bar.least,
            "found": (ratio := bar.found(cold_rates if bar.cold else warm_rates)),
            "met": None if ratio is None else ratio >= bar.least,
        }
        for bar in bars(case.threads, disk_threads=options.disk_threads)
    ]
    return {
        "clip": list(case.clip),
        "sample_bytes": case.sample_bytes,
        "samples": len(index),
        "warm": warm_rates,
        "cold": cold_rates,
        "missing": missing,
        "bars": rows,
    }


def _rounds(ways: Mapping[str, Way], rounds: int, *, before: Callable[[], None]) -> dict[str, list[float]]:
    """Samples per second of each way in each round; each round begins with another way."""
    rates: dict[str, list[float]] = {name: [] for name in ways}
    names = list(ways)
    for number in range(rounds):
        shift = number % len(names)
        for name in names[shift:] + names[:shift]:
            before()
            timed = ways[name]()
            rates[name].append(timed.samples / timed.seconds)
        _log.info("round %d of %d", number + 1, rounds)
    return rates


def _long(way: Way) -> Timed:
    """Passes for as long as it takes to be timed well."""
    samples, seconds = 0, 0.0
    while seconds < _LEAST_S:
        timed = way()
        samples, seconds = samples + timed.samples, seconds + timed.seconds
    return Timed(samples=samples, seconds=seconds)


def drop_cache(index: Index) -> None:
    """What is read next of the shards comes from the disk."""
    for shard in range(len(index.shards)):
        fd = index.shard_source.open(shard)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(fd)


def in_memory(folder: Path) -> bool:
    """Whether a folder's files are in memory only, so that nothing of them can be read from a disk."""
    device = os.stat(folder).st_dev
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        mount, _, kind = line.partition(" - ")
        if mount.split()[2] == f"{os.major(device)}:{os.minor(device)}":
            return kind.split()[0] in ("tmpfs", "ramfs")
    return False


def markdown(cases: Sequence[Mapping[str, Any]]) -> str:
    """Rates and ratios to raw, a row per way, warm and cold for each size; then the bars."""
    kinds = [(case, kind) for case in cases for kind in ("warm", "cold")]
    heads = [f"{case['sample_bytes'] / 1e6:.1f} MB, {kind}" for case, kind in kinds]
    lines = ["| samples/s, of raw | " + " | ".join(heads) + " |", "| --- " * (1 + len(heads)) + "|"]
    for name in dict.fromkeys([*cases[0]["warm"], *cases[0]["cold"]]):
        lines.append(f"| {name} | " + " | ".join(_cell(case[kind], name) for case, kind in kinds) + " |")
    lines += ["", "| bar | asked | " + " | ".join(f"{case['sample_bytes'] / 1e6:.1f} MB" for case in cases) + " |"]
    lines.append("| --- " * (2 + len(cases)) + "|")
    for bars_of_one in zip(*(case["bars"] for case in cases), strict=True):
        found = ["-" if bar["found"] is None else f"{bar['found']:.2f}" for bar in bars_of_one]
        kind = "cold" if bars_of_one[0]["cold"] else "warm"
        lines.append(f"| {bars_of_one[0]['bar']}, {kind} | {bars_of_one[0]['least']:g} | " + " | ".join(found) + " |")
    return "\n".join(lines)


def _cell(rates: Mapping[str, Sequence[float]], name: str) -> str:
    if name not in rates:
        return ""
    ratio = statistics.median(a / b for a, b in zip(rates[name], rates[RAW], strict=True))
    return f"{statistics.median(rates[name]):,.0f}, {ratio:.2f}"


def _print(console: Console, found: Mapping[str, Any]) -> None:
    for kind in ("warm", "cold"):
        if not found[kind]:
            continue
        where = {"warm": "from the page cache", "cold": "from the disk"}[kind]
        table = Table(title=f"{found['samples']} samples of {found['sample_bytes'] / 1e6:.1f} MB, {where}")
        for column in ("way", "samples/s", "quartiles", "GB/s", "of raw"):
            table.add_column(column, justify="left" if column == "way" else "right", no_wrap=True)
        raw = found[kind][RAW]
        for name, rates in found[kind].items():
            spread = Spread.of(rates)
            ratio = Spread.of([a / b for a, b in zip(rates, raw, strict=True)])
            speed = f"{spread.median * found['sample_bytes'] / 1e9:.2f}"
            table.add_row(
                name,
                f"{spread.median:,.0f}",
                f"{spread.low:,.0f} - {spread.high:,.0f}",
                speed,
                f"{ratio.median:.3f} [{ratio.low:.3f}, {ratio.high:.3f}]",
            )
        console.print(table)
    for name, why in found["missing"].items():
        console.print(f"{name}: left out: {why}", markup=False, highlight=False)
    for bar in found["bars"]:
        said = {None: "not measured", True: "met", False: "NOT MET"}[bar["met"]]
        value = "-" if bar["found"] is None else f"{bar['found']:.2f}"
        kind = "cold" if bar["cold"] else "warm"
        console.print(f"{bar['bar']} ({kind}): {value}, asked for {bar['least']:g}: {said}", markup=False, highlight=False)
