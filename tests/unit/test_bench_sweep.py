"""bench --sweep: a grid is checked as a whole, what can't run is written down with the rule, and what ran is not run again."""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
import xml.etree.ElementTree as ET
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from opensora_dist.cli.main import main
from opensora_dist.config.bench import SequenceSweep, StepGrid, StepSweep
from opensora_dist.config.load import load_config
from opensora_dist.core.errors import ConfigError
from opensora_dist.observe.charts import line_svg
from opensora_dist.recipes.bench import sweep as sweeping
from opensora_dist.recipes.bench.machines import Machines, machines_here
from opensora_dist.recipes.bench.sweep import Point, point_argv, point_problems, run_sweep, sweep_points
from opensora_dist.recipes.bench.sweep_show import sweep_rows, sweep_table

ROOT = Path(__file__).parents[2]
GRID = """
device: cpu
ranks_per_node: 2
grid:
  nodes: [1, 2]
  depth: [1]
  width: [32]
  heads: [4]
  clip: [4x8x8]
  sp: [1, 2, 3]
"""


@pytest.fixture(autouse=True)
def _outside_of_slurm(monkeypatch):
    for name in ("SLURM_JOB_ID", "SLURM_JOB_NODELIST", "SLURM_CPUS_ON_NODE"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def grid(tmp_path):
    path = tmp_path / "sweep.yaml"
    path.write_text(GRID)
    return path


def _speed(tokens, **more):
    speed = {"step_s": 0.1, "samples_per_s": 10.0, "tokens_per_s_per_rank": tokens, "mfu": 0.4, "exposed_share": 0.1}
    return {**speed, **more}


def _result(tokens, world=2, **more):
    spread = {"low": 90.0, "median": 100.0, "high": 110.0}
    figures = {"step_ms": spread, "exposed_ms": {"low": 8.0, "median": 10.0, "high": 12.0}, "speed": _speed(tokens, **more)}
    return {"world": world, "results": [{"name": "eager", "memory_bytes": 5_000_000, "figures": figures}]}


@pytest.fixture
def runs(monkeypatch):
    """Commands of points, which leave a result without running anything; those that ``fails`` says end with code 1."""
    commands = []

    def run(command, *, log, timeout_s):
        commands.append(command)
        if runs.fails(command):
            return "failed", "exit code 1: out of memory"
        out = Path(command[command.index("--out") + 1])
        out.mkdir(parents=True)
        (out / "step.json").write_text(json.dumps(_result(1000.0)))
        return "done", None

    def runs():
        return commands

    runs.fails = lambda _command: False
    monkeypatch.setattr(sweeping, "_run", run)
    return runs


def test_a_sweep_runs_each_point_once_and_goes_on_where_it_stopped(grid, tmp_path, runs):
    out = tmp_path / "out"
    assert run_sweep("step", grid, out=out) == 0
    assert [c[c.index("--sp") + 1] for c in runs()] == ["1", "2"]
    (kept,) = (p for p in (out / "points").iterdir() if "nodes=1" in p.name and "sp=2" in p.name)
    kept.unlink()  # as if it had been stopped before
    assert run_sweep("step", grid, out=out) == 0
    assert [c[c.index("--sp") + 1] for c in runs()] == ["1", "2", "2"]


def test_a_point_that_a_rule_forbids_is_written_down_with_the_rule(grid, tmp_path, runs):
    out = tmp_path / "out"
    run_sweep("step", grid, out=out)
    points = {p.name.rpartition("-")[0]: json.loads(p.read_text()) for p in (out / "points").iterdir()}
    assert len(points) == 6
    refused = points["nodes=1-width=32-heads=4-depth=1-clip=4x8x8-sp=3"]
    assert refused["state"] == "refused" and "--sp=3 must divide the 2 ranks" in refused["reason"]
    both = points["nodes=2-width=32-heads=4-depth=1-clip=4x8x8-sp=3"]
    assert "nodes=2, and this is one machine" in both["reason"] and "--sp=3 must divide the 4 ranks" in both["reason"]
    assert "--sp=3 must divide the 2 ranks" in (out / "table.md").read_text()


def test_a_point_that_failed_is_told_and_run_again(grid, tmp_path, runs):
    out = tmp_path / "out"
    runs.fails = lambda command: command[command.index("--sp") + 1] == "2"
    assert run_sweep("step", grid, out=out) == 1
    assert "out of memory" in (out / "table.md").read_text()
    runs.fails = lambda _command: False
    assert run_sweep("step", grid, out=out) == 0
    assert len(runs()) == 3 and "out of memory" not in (out / "table.md").read_text()


def test_another_way_of_measuring_is_another_point(tmp_path):
    grid = StepGrid(nodes=(1,))
    names = [sweep_points("step", StepSweep(grid=grid, rounds=rounds), ranks=2)[0].name for rounds in (5, 6)]
    assert names[0] != names[1]
    patient = StepSweep(grid=grid, point_timeout_s=9.0)
    assert sweep_points("step", patient, ranks=2)[0].name == names[0]


def test_another_device_or_commit_is_another_point_and_another_price_is_not(monkeypatch):
    def name(device="auto", **how):
        return sweep_points("step", StepSweep(device=device, **how), ranks=2)[0].name

    here = name("cpu")
    assert name("cpu", dollars_per_gpu_hour=2.5) == here
    monkeypatch.setattr(sweeping, "resolve_device", torch.device)
    found = [here]
    for gpu in ("NVIDIA H800", "NVIDIA A100-SXM4-80GB"):
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda _, gpu=gpu: gpu)
        found.append(name("cuda"))
    for code in ({"commit": "1", "changed": False}, {"commit": "2", "changed": False}, None):
        monkeypatch.setattr(sweeping, "git_state", lambda _, code=code: code)
        found.append(name("cpu"))
    assert len(set(found)) == 6


def test_a_new_price_changes_the_table_and_runs_nothing(grid, tmp_path, runs):
    for price, shown in ((None, "| - |"), (3.6, "| 1 |"), (7.2, "| 2 |")):
        grid.write_text(GRID + (f"dollars_per_gpu_hour: {price}\n" if price else ""))
        run_sweep("step", grid, out=tmp_path / "out")
        # 3.6 dollars an hour are a thousandth of a dollar a second, for 1000 tokens.
        assert shown in (tmp_path / "out/table.md").read_text()
    assert len(runs()) == 2 and not any("--dollars-per-gpu-hour" in command for command in runs())


@pytest.mark.parametrize("name", ["h800", "a100"])
def test_a_point_that_no_gpu_of_80_gb_holds_is_refused_before_it_runs(name, monkeypatch):
    monkeypatch.setattr(sweeping, "resolve_device", torch.device)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "NVIDIA H800")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(total_memory=80 << 30))
    sweep = load_config(StepSweep, ROOT / f"configs/bench/{name}.yaml")
    machines = Machines(nodes=tuple("abcdefgh"), address="1.2.3.4", job_id=1, said="8 nodes")
    points = sweep_points("step", sweep, ranks=8)
    said = {p.name: point_problems(sweep, p, ranks=8, machines=machines) for p in points}
    refused = [p.values for p in points if said[p.name]]
    assert len(refused) < len(points) / 8
    assert {(p["clip"], p["sp"], p["recompute"]) for p in refused} == {("64x64x64", 1, "none")}
    (first,) = said[next(p.name for p in points if said[p.name])]
    assert "a rank needs 134.6 GiB, and the GPU has 80.0" in first and "recompute=full" in first


def test_where_no_ranks_share_a_sample_a_scheme_is_no_other_point():
    points = sweep_points("step", StepSweep(grid=StepGrid(sp=(1, 2), scheme=("dsp", "ring"))), ranks=2)
    assert [(p.values["sp"], p.values.get("scheme")) for p in points] == [(1, None), (2, "dsp"), (2, "ring")]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("grid: {nodes: [0], zero: [4], sp: [two]}", ["grid.nodes", "grid.zero", "grid.sp"]),
        ("rounds: 0\ngrid: {clip: [16x0x4], schme: [dsp]}", ["rounds=0", "grid.clip", "'scheme'"]),
        ("grid: {sp: [2, 2]}\ndollars_per_gpu_hour: -1", ["names a value twice", "dollars_per_gpu_hour"]),
    ],
)
def test_everything_wrong_with_a_grid_is_said_at_once(text, said, tmp_path, capsys):
    path = tmp_path / "sweep.yaml"
    path.write_text(text)
    assert main(["bench", "step", "--sweep", str(path), "--out", str(tmp_path / "out")]) == 2
    found = capsys.readouterr().err
    assert all(word in found for word in said), found
    assert not (tmp_path / "out").exists()


def test_options_beside_a_sweep_and_a_sweep_without_a_folder_are_refused(grid, capsys):
    assert main(["bench", "step", "--sweep", str(grid), "--batch", "4", "--nproc=2"]) == 2
    said = capsys.readouterr().err
    assert "3 problems" in said and "--batch" in said and "--nproc" in said and "--out" in said


def test_a_point_is_a_command_that_a_user_could_type():
    sweep = StepSweep(device="cpu", dollars_per_gpu_hour=2.5, grid=StepGrid(dp_replicate=(2,)))
    (point,) = sweep_points("step", sweep, ranks=8)
    words = " ".join(point_argv("step", sweep, point, out=Path("o")))
    assert words == (
        "bench step --out o --device cpu --timeout 600 --rounds 5 --warmup 2 --steps 3 --forms eager --dp-replicate 2"
    )


def test_a_sweep_of_sequence_names_its_schemes_and_refuses_what_no_scheme_shares():
    sweep = SequenceSweep.model_validate({"device": "cpu", "schemes": ["dsp", "warp"], "grid": {"grid": ["4x4x4"]}})
    (point,) = sweep_points("sequence", sweep, ranks=2)
    assert point_argv("sequence", sweep, point, out=Path("o"))[-5:] == ["--schemes", "dsp", "warp", "--grid", "4x4x4"]
    here = machines_here()
    assert any("warp" in said for said in point_problems(sweep, point, ranks=2, machines=here))


# --- Slurm


@pytest.fixture
def slurm(tmp_path, monkeypatch):
    """``scontrol`` that names two nodes, and ``srun`` that says what it was asked, on PATH."""
    bin_ = tmp_path / "bin"
    bin_.mkdir()
    for name, script in {"scontrol": 'echo "$3" | tr , "\\n"', "srun": 'printf "%s\\n" "$@"'}.items():
        (bin_ / name).write_text(f"#!/bin/sh\n{script}\n")
        (bin_ / name).chmod(0o755 | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{bin_}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("SLURM_JOB_ID", "4711")
    monkeypatch.setenv("SLURM_JOB_NODELIST", "10.0.0.1,10.0.0.2")
    monkeypatch.setenv("SLURM_CPUS_ON_NODE", "16")


def test_under_slurm_a_point_is_one_torchrun_on_each_of_the_first_nodes(slurm):
    machines = machines_here()
    assert machines.nodes == ("10.0.0.1", "10.0.0.2") and machines.address == "10.0.0.1"
    for nodes, named in ((1, "10.0.0.1"), (2, "10.0.0.1,10.0.0.2")):
        done = subprocess.run(
            machines.command(["bench", "step"], nodes=nodes, ranks=8), capture_output=True, text=True, check=True
        )
        words = done.stdout.splitlines()
        assert words[:6] == [
            "--cpu-bind=none",
            f"--nodes={nodes}",
            f"--ntasks={nodes}",
            "--ntasks-per-node=1",
            f"--nodelist={named}",
            "--cpus-per-task=16",
        ]
        launched = [f"--nnodes={nodes}", "--nproc-per-node=8", "--master-addr=10.0.0.1", "--master-port=24711"]
        assert words[-9:] == [sys.executable, *launched, "-m", "opensora_dist", "bench", "step"]


def test_the_number_of_a_node_is_asked_for_on_the_node(slurm, tmp_path):
    command = machines_here().command(["bench", "step"], nodes=2, ranks=1)
    on_node = command[command.index("env") :]
    on_node[on_node.index(sys.executable)] = "/bin/echo"
    (tmp_path / "bin/ip").write_text(
        '#!/bin/sh\necho "$@" >&2\ncase $2 in route) echo x src 1.1.1.1 uid;; *) echo 2: ib0 inet;; esac\n'
    )
    (tmp_path / "bin/ip").chmod(0o755)
    environ = {**os.environ, "SLURM_NODEID": "1", "SLURM_JOB_NUM_NODES": "2"}
    done = subprocess.run(on_node, capture_output=True, text=True, check=True, env=environ)
    assert "route get 10.0.0.1" in done.stderr  # as network.sh asks, for gloo's interface
    assert done.stdout.startswith("-m torch.distributed.run --node-rank 1 --nnodes=2 ")


def test_a_first_node_that_is_loopback_to_itself_is_refused(slurm, monkeypatch):
    monkeypatch.setenv("SLURM_JOB_NODELIST", "localhost,10.0.0.2")
    with pytest.raises(ConfigError, match=r"localhost is 127\.0\.0\.1 to itself"):
        machines_here()


def test_a_job_whose_nodes_nobody_names_is_refused(slurm, monkeypatch, tmp_path):
    (tmp_path / "bin/scontrol").write_text("#!/bin/sh\nexit 1\n")
    with pytest.raises(ConfigError, match=r"SLURM_JOB_ID=4711.*unset SLURM_JOB_ID"):
        machines_here()


def test_a_job_of_fewer_nodes_refuses_the_points_of_more(slurm):
    sweep = StepSweep(device="cpu", grid=StepGrid(nodes=(4,)))
    (said,) = point_problems(sweep, sweep_points("step", sweep, ranks=1)[0], ranks=1, machines=machines_here())
    assert said.startswith("nodes=4, and the Slurm job 4711 has 2 nodes")


def test_the_batch_script_is_clean_and_runs_a_sweep(tmp_path):
    script = ROOT / "launch/slurm/bench.sbatch"
    subprocess.run([Path(sys.executable).with_name("shellcheck"), script], check=True)
    fake = tmp_path / "python"
    fake.write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    fake.chmod(0o755)
    env = {**os.environ, "PYTHON": str(fake)}
    done = subprocess.run(["bash", script, "my sweep.yaml", "out"], capture_output=True, text=True, env=env, check=True)
    assert done.stdout.split("\n")[:-1] == ["-m", "opensora_dist", "bench", "step", "--sweep", "my sweep.yaml", "--out", "out"]
    assert subprocess.run(["bash", script, "only.yaml"], capture_output=True, env=env, check=False).returncode == 2


# --- what is shown


def _outcome(nodes, tokens, *, sp=1, state="done", **more):
    result = _result(tokens, world=2 * nodes, **more) if state == "done" else None
    return {"state": state, "reason": None if result else "a rule", "point": {"nodes": nodes, "sp": sp}, "result": result}


def test_efficiency_is_of_the_same_case_on_the_fewest_nodes_it_ran_on():
    found = [
        _outcome(1, 100.0),
        _outcome(2, 90.0),
        _outcome(2, 60.0, sp=2),
        _outcome(4, 30.0, sp=2),
        _outcome(8, 1, state="refused"),
    ]
    assert [row["efficiency"] for row in sweep_rows(found, dollars_per_gpu_hour=None)] == pytest.approx([1.0, 0.9, 1.0, 0.5])


def test_the_table_has_a_row_for_what_ran_and_a_line_for_what_did_not():
    found = [_outcome(1, 100.0), _outcome(2, 90.0, mfu=None), _outcome(4, 1, state="failed")]
    (result,) = found[1]["result"]["results"]
    result["memory_bytes"] = result["figures"]["exposed_ms"] = None  # neither is known
    lines = sweep_table(found, sweep_rows(found, dollars_per_gpu_hour=0.09)).splitlines()
    assert lines[0] == "Everywhere: sp 1."
    assert lines[4] == "| 1 | eager | 2 | 100 [90, 110] | 10 | 100 | 100% | 40% | 10 [8, 12] | 10% | 0.25 | 5.0 |"
    assert lines[5] == "| 2 | eager | 4 | 100 [90, 110] | 10 | 90 | 90% | - | - | 10% | 0.278 | - |"
    assert lines[-1] == "- nodes 4: failed: a rule"


def test_a_picture_has_a_line_for_each_case_and_a_dot_for_each_number_of_nodes():
    svg = ET.fromstring(
        line_svg("T<itle", {"sp 1": [(1, 1.0), (2, 0.9), (8, 0.5)], "sp 8": [(8, 0.7)]}, unit="%", across="nodes")
    )
    space = "{http://www.w3.org/2000/svg}"
    assert len(svg.findall(f"{space}circle")) == 4
    labels = {e.text for e in svg.iter(f"{space}text")}
    assert {"T<itle", "sp 1", "sp 8", "1", "2", "8", "nodes"} <= labels and "4" not in labels


def test_points_are_named_by_what_they_are():
    assert Point(name="x", values={"nodes": 3}).nodes == 3
    (point,) = sweep_points("step", StepSweep(grid=StepGrid(sp=(4,), clip=("16x32x32",))), ranks=8)
    assert point.name.startswith("nodes=1-clip=16x32x32-sp=4-") and len(point.name.rpartition("-")[2]) == 8
