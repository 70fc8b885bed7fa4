"""Does a small STDiT learn toy video? From no data to scores on captions it has never seen, by the documented recipe.

    python benchmarks/toy.py --work /tmp/toy --out benchmarks/results/cpu/toy.json

Runs, in ``--work``: data toy, data prepare, train, evaluate, with the commands that stand in configs/prepare/toy.yaml and
configs/train/toy.yaml; what is there already is kept. Seconds are those that the run itself recorded, so a run that was made by hand
can be collected, too.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
from datetime import datetime
from pathlib import Path
from typing import Any

import torch

from opensora_dist.core.io import read_json, write_json
from opensora_dist.observe.jsonl import read_records

ROOT = Path(__file__).resolve().parent.parent
PREPARE, TRAIN = ROOT / "configs/prepare/toy.yaml", ROOT / "configs/train/toy.yaml"


def commands() -> list[list[str]]:
    """The command lines in the comments of the two configs, in order."""
    lines = [line for path in (PREPARE, TRAIN) for line in path.read_text().splitlines()]
    return [line.removeprefix("#   opensora-dist ").split() for line in lines if line.startswith("#   opensora-dist ")]


def collect(work: Path) -> dict[str, Any]:
    """What a finished run recorded of itself."""
    run = work / "runs/toy"
    events, metrics = read_records(run / "events.jsonl"), read_records(run / "metrics.jsonl")
    start = next(e for e in events if e["event"] == "start")
    end = [e for e in events if e["event"] == "end"][-1]
    train_s = (datetime.fromisoformat(end["time"]) - datetime.fromisoformat(start["time"])).total_seconds()
    assert not any(e["event"] == "resume" for e in events), "a resumed run's clock counts the pause"
    evaluation = read_json(run / "evaluation.json")
    return {
        "commands": [" ".join(c) for c in commands()],
        "rates": evaluation["rates"],
        "videos": evaluation["videos"],
        "sampling": evaluation["sampling"],
        "checkpoint": evaluation["checkpoint"],
        "parameters": start["parameters"],
        "ranks": start["mesh"],
        "steps": metrics[-1]["step"],
        "samples_seen": sum(m["samples"] for m in metrics),
        "prepare_s": round(read_json(work / "data/toy-shards/report.json")["seconds"], 1),
        "train_s": round(train_s, 1),
        "last_loss": metrics[-1]["loss"],
        "cpu": _cpu(),
        "cores": os.cpu_count(),
        "torch": torch.__version__,
    }


def _cpu() -> str:
    """The processor's name, where Linux tells."""
    info = Path("/proc/cpuinfo")
    names = (
        [line.split(":", 1)[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")]
        if info.exists()
        else []
    )
    return names[0] if names else "unknown"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder for data and run")
    parser.add_argument("--out", type=Path, required=True, help="result JSON; the contact sheet goes beside it")
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    if not (args.work / "runs/toy/evaluation.json").exists():
        for command in commands():
            absolute = [str(ROOT / part) if part.startswith("configs/") else part for part in command]
            subprocess.run([sys.executable, "-m", "opensora_dist", *absolute], cwd=args.work, check=True)
    write_json(args.out, collect(args.work))
    shutil.copy(args.work / "runs/toy/evaluation.png", args.out.with_suffix(".png"))
    print(args.out)


if __name__ == "__main__":
    main()
