"""benchmarks/gpu.sh: its commands are ones that exist, its parts fit the time that there is, and what it finds is kept part by part."""

from __future__ import annotations

import argparse
import importlib.util
import os
import re
import stat
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

import opensora_dist
from opensora_dist.cli import bench as bench_cli
from opensora_dist.recipes.bench import step_inputs
from opensora_dist.recipes.bench.step_forms import FORMS

ROOT = Path(opensora_dist.__file__).parents[1]
SCRIPT = ROOT / "benchmarks/gpu.sh"
A_COMMAND_S = 600


def _said(*args: str, **environ: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", str(SCRIPT), *args], capture_output=True, text=True, timeout=60, env={**os.environ, **environ}, check=False
    )


def _parts() -> dict[str, tuple[int, list[str]]]:
    """Seconds and words of the command, by part."""
    lines = re.findall(r"^(\w+) \(at most (\d+) s[^)]*\): (.+)$", _said("--list").stdout, flags=re.MULTILINE)
    return {name: (int(limit), command.split()) for name, limit, command in lines}


def _kernels() -> ModuleType:
    spec = importlib.util.spec_from_file_location("kernels_that_the_script_runs", ROOT / "benchmarks/kernels.py")
    assert spec is not None and spec.loader is not None
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_command_is_one_that_exists(monkeypatch):
    monkeypatch.setattr(step_inputs, "form_problems", lambda *_args, **_more: [])  # that there is no GPU here
    parser = argparse.ArgumentParser(exit_on_error=False)
    bench_cli.add_parser(parser.add_subparsers())
    forms = set()
    for name, (_, words) in _parts().items():
        if words[1] == "benchmarks/kernels.py":
            assert _kernels().arguments().parse_args(words[2:]).out == Path("benchmarks/results")
            continue
        if words[1:3] == ["-m", "pytest"]:
            assert (ROOT / words[-1]).is_dir()
            continue
        args = parser.parse_args(words[3:])
        if args.action == "step":
            given = {field: getattr(args, field) for field in step_inputs.CASE_FIELDS}
            measuring = {field: getattr(args, field) for field in ("forms", "rounds", "warmup", "steps", "dollars_per_gpu_hour")}
            variants, options = step_inputs.step_inputs(
                given, world=1, timeout_s=60, device=torch.device("cuda"), compare=args.compare, **measuring
            )
            assert variants and args.out.name == name
            forms |= {*options.forms}
        else:
            step_inputs.check_share(
                form=args.form,
                ranks=args.ranks,
                steps=args.steps,
                gib=(args.memory_cap_gib, args.host_gib),
                device=torch.device("cuda"),
                dtype=args.dtype,
            )
    assert forms == {*FORMS}


def test_the_two_commands_of_its_head_have_every_part_and_fit_ten_minutes_each():
    parts = _parts()
    halves = [half.split() for half in re.findall(r'^#\s+PARTS="([^"]+)"', SCRIPT.read_text(), flags=re.MULTILINE)]
    assert len(halves) == 2 and sorted(halves[0] + halves[1]) == sorted(parts)
    for half in halves:
        assert sum(parts[name][0] for name in half) <= A_COMMAND_S
        assert f'PARTS="{" ".join(half)}" benchmarks/gpu.sh' in (ROOT / "benchmarks/README.md").read_text()


def test_a_part_that_nobody_knows_is_refused():
    done = _said(PARTS="share shaer")
    assert done.returncode == 2 and "shaer is not known; use some of: bench_64 share" in done.stderr


_PRETENDED = """#!/usr/bin/env bash
case "$1 $3" in
-c*) echo "h100 $GIB"; exit ;;
"-m bench") out=${@: -1}; mkdir -p "$out"; echo "{}" > "$out/$4.json" ;;
esac
echo "ran $PYTHONPATH: $*" >> "$SAID"
[ "$2" != pytest ]
"""


@pytest.mark.parametrize(("gib", "runs"), [(80, False), (139, True)])
def test_each_part_is_kept_at_once_and_what_fails_stops_no_other(tmp_path, gib, runs):
    python = tmp_path / "python"
    python.write_text(_PRETENDED)
    python.chmod(python.stat().st_mode | stat.S_IXUSR)
    folders = {"PYTHON": str(python), "RESULTS": str(tmp_path / "kept"), "WORK": str(tmp_path / "work")}
    done = _said(**folders, GIB=str(gib), SAID=str(tmp_path / "said"), PARTS="bench_64 share kernels tests no_recompute")
    assert done.returncode == 1 and done.stderr.splitlines()[-1] == "== failed: tests"
    ran = [re.sub(r"^ran [^ ]*: ", "", line) for line in (tmp_path / "said").read_text().splitlines()]
    page = f"benchmarks/roofline.py --results {tmp_path}/kept --page docs/roofline.md"
    assert ran[1] == page and ran.count(page) == 1 + runs, "after each part that timed a step"
    assert f"benchmarks/kernels.py --out {tmp_path}/kept" in ran
    assert f"ran {ROOT}:{ROOT}/kernels" in (tmp_path / "said").read_text()
    kept = {path.name for path in (tmp_path / "kept/h100").iterdir()}
    long = {"step_64x512x512_no_recompute.json"} if runs else set()
    assert kept == {"step_64x512x512.json", "share_1080p_minute.json", *long}
    assert ("no_recompute: left out, since it needs a GPU of 135 GiB" in done.stdout) is not runs
