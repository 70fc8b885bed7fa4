"""``doctor``: each check on machines that are well and on such as are not, and all of them together on this one.

GPUs are in test_doctor_gpus.py, the network in test_doctor_network.py.
"""

from __future__ import annotations

import ast
import errno
import io
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from rich.console import Console

from opensora_dist.cli.main import main
from opensora_dist.machine import children, disk, kernels, limits, optional, packages
from opensora_dist.machine.finding import Finding, Level, problems_of
from opensora_dist.recipes import doctor

ROOT = Path(__file__).parents[2]
TIME_S = 90.0  # of a check that is made to hang


def _said(findings, level=Level.PROBLEM):
    return " | ".join(str(f) for f in findings if f.level is level)


# --- torch and kernels


@pytest.mark.skipif(torch.version.cuda is not None, reason="this torch is built for CUDA: run it with a CPU build")
def test_a_torch_without_cuda_beside_gpus_is_a_problem():
    assert "there are 2 GPUs; install a CUDA build" in str(kernels.torch_finding(num_gpus=2))
    assert kernels.torch_finding(num_gpus=0).level is Level.OK


def test_attention_that_is_wrong_is_a_problem_and_one_that_does_not_run_is_what_it_is_said_to_be():
    def wrong(q, k, v):
        return torch.softmax(q @ k.mT, dim=-1) @ v

    def absent(q, k, v):
        raise RuntimeError("No kernel. Whatever")

    cpu = torch.device("cpu")
    assert "differs from attention in float64" in kernels.compared("x", wrong, cpu, level=Level.NOTE).said
    assert kernels.compared("x", wrong, cpu, level=Level.NOTE).level is Level.PROBLEM
    found = kernels.compared("x", absent, cpu, level=Level.NOTE)
    assert (found.level, found.said) == (Level.NOTE, "does not run on cpu: No kernel")


def test_a_package_that_is_here_and_broken_is_a_warning(tmp_path, monkeypatch):
    (tmp_path / "broken_kernels").mkdir()
    (tmp_path / "broken_kernels/__init__.py").write_text("raise ImportError('undefined symbol: _ZN3c10')")
    monkeypatch.syspath_prepend(tmp_path)
    found = optional._optional("broken", "broken_kernels", lambda: __import__("broken_kernels"))
    assert found.level is Level.WARNING and "ImportError: undefined symbol: _ZN3c10" in found.said
    assert optional._optional("none", "no_such_module", lambda: 1 / 0).level is Level.NOTE


def test_an_optional_package_that_crashes_is_a_warning_and_hides_nothing_that_is_needed(tmp_path, monkeypatch):
    (tmp_path / "deepspeed").mkdir()
    (tmp_path / "deepspeed/__init__.py").write_text("import os; os.abort()")
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{ROOT}")
    found = doctor.optional_findings()
    assert not problems_of(found)
    assert "deepspeed: its check was ended by SIGABRT" in _said(found, Level.WARNING)
    with open(kernels.__file__) as file:  # what is needed runs in another process, which imports none of them
        assert not any(name in file.read() for name in ("deepspeed", "flash_attn", "colossalai", "cv2"))


# --- checks in a process of their own


def _child(tmp_path, body, **options):
    (tmp_path / "some_checks.py").write_text(
        "import os, time\nfrom opensora_dist.machine.children import Teller\nfrom opensora_dist.machine.finding import *\n"
        "good = Finding(subject='kernels', name='first', level=Level.OK, said='fine')\n"
        f"tell = Teller().check\ntell('kernels', 'first', lambda: good)\nprint('noise')\n{body}\n"
    )
    path = f"{tmp_path}:{ROOT}"
    return children.findings_of_child("some_checks", timeout_s=options.get("timeout_s", 30.0), variables={"PYTHONPATH": path})


def test_what_a_check_that_crashes_found_before_is_kept_and_it_is_named(tmp_path):
    first, second = _child(tmp_path, "tell('kernels', 'second', lambda: os.abort())")
    assert first.said == "fine"
    assert (second.name, second.level) == ("second", Level.PROBLEM) and "was ended by SIGABRT" in second.said


def test_an_exception_of_a_check_is_told(tmp_path):
    _, second = _child(tmp_path, "tell('kernels', 'second', lambda: 1 / 0)")
    assert "ended with exit code 1" in second.said and "ZeroDivisionError" in second.said
    assert "python -m some_checks" in second.remedy


@pytest.fixture
def starts_another(tmp_path, monkeypatch):
    """A child that starts another process, and then does ``end``; its time is up once the other runs, however slow this machine is."""
    pid, real = tmp_path / "pid", subprocess.Popen.wait

    def wait(process, timeout=None):
        if timeout != TIME_S:
            return real(process, timeout)
        while not pid.exists() or not pid.read_text():
            time.sleep(0.01)
        raise subprocess.TimeoutExpired(process.args, timeout)

    def run(end, *, timeout_s, **options):
        pid.unlink(missing_ok=True)
        other = f"import subprocess\nother = subprocess.Popen(['sleep', '120'], **{options})\n"
        found = _child(tmp_path, f"{other}open({str(pid)!r}, 'w').write(str(other.pid))\n{end}", timeout_s=timeout_s)
        return found, int(pid.read_text())

    monkeypatch.setattr(subprocess.Popen, "wait", wait)
    return run


def test_a_check_that_hangs_is_ended_with_all_that_it_started(starts_another):
    (_, second), other = starts_another("tell('kernels', 'second', lambda: time.sleep(120))", timeout_s=TIME_S)
    assert "its check took too long" in second.said
    assert not _runs(other)


@pytest.mark.parametrize("end, timeout_s, said", [("", 60.0, []), ("time.sleep(120)", TIME_S, ["took too long"])])
def test_a_check_whose_descendant_outlives_it_keeps_nobody_waiting(starts_another, end, timeout_s, said):
    (first, *others), other = starts_another(end, timeout_s=timeout_s, start_new_session=True)
    assert _runs(other)
    os.kill(other, signal.SIGKILL)
    assert first.said == "fine" and len(others) == len(said) and all(words in f.said for words, f in zip(said, others))


def test_a_process_that_can_not_be_ended_is_left_to_itself(monkeypatch):
    monkeypatch.setattr(children, "_AFTER_KILL_S", 0.1)
    ended = []
    with monkeypatch.context() as patched:
        patched.setattr(os, "killpg", lambda pid, number: ended.append(pid))  # as if it waited within the kernel
        assert children.run_child(["sleep", "20"], timeout_s=0.1).code is None
    os.kill(ended[0], signal.SIGKILL)
    os.waitpid(ended[0], 0)


def _runs(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


# --- packages


def test_every_extra_says_what_it_is_for():
    tree = ast.parse((ROOT / "setup.py").read_text())
    (extras,) = (n.value for n in ast.walk(tree) if isinstance(n, ast.Assign) and ast.unparse(n.targets[0]) == "EXTRAS")
    assert {packages.CORE, *ast.literal_eval(extras)} == set(packages.PURPOSES)


def test_a_missing_package_is_a_problem_of_the_core_and_a_note_of_an_extra(monkeypatch):
    real = packages.importlib.metadata.version

    def version(name):
        if name in ("einops", "wandb"):
            raise packages.importlib.metadata.PackageNotFoundError(name)
        return "0.1" if name == "av" else real(name)

    requires = ["einops>=1", 'wandb>=1; extra == "track"', 'pytest; extra == "track"', 'pytest>=8; extra == "dev"', "av>=14"]
    monkeypatch.setattr(packages.importlib.metadata, "version", version)
    monkeypatch.setattr(packages.importlib.metadata, "requires", lambda name: requires)
    found = {f.name: f for f in packages.package_findings()}
    core, track = found["core"], found["track"]
    assert core.level is Level.PROBLEM and core.values["missing"] == ["einops"] and core.values["other"] == ["av 0.1 is not >=14"]
    assert core.remedy == "pip install 'opensora-dist'"
    assert track.level is Level.NOTE and track.values["missing"] == ["wandb"] and track.values["here"][0].startswith("pytest ")
    assert track.remedy == "pip install 'opensora-dist[track]'"
    assert found["kernels"].level is Level.OK


def test_a_tree_that_is_not_installed_is_said_to_be_so(monkeypatch):
    def requires(name):
        raise packages.importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(packages.importlib.metadata, "requires", requires)
    assert "pip install -e ." in _said(packages.package_findings(), Level.WARNING)


# --- disk and limits


def test_a_disk_is_measured_past_the_page_cache_or_it_is_said_how_and_nothing_is_left(tmp_path, monkeypatch):
    monkeypatch.setattr(disk, "_BLOCKS", 2)
    speed = disk.measure_disk(tmp_path)
    assert speed.num_bytes == 8 << 20 and min(speed.write_bytes_per_s, speed.read_bytes_per_s) > 0
    assert "fdatasync" in speed.write_way and not list(tmp_path.iterdir())


@pytest.mark.parametrize("at", ["open", "write"])
def test_a_file_system_without_direct_io_is_measured_otherwise(tmp_path, monkeypatch, at):
    monkeypatch.setattr(disk, "_BLOCKS", 2)
    real, direct = {"open": os.open, "write": os.write}, set()

    def opens(path, flags, mode=0o777):
        if flags & os.O_DIRECT and at == "open":
            raise OSError(errno.EINVAL, "Invalid argument")
        handle = real["open"](path, flags, mode)
        (direct.add if flags & os.O_DIRECT else direct.discard)(handle)
        return handle

    def writes(handle, block):
        if handle in direct:
            raise OSError(errno.EINVAL, "Invalid argument")
        return real["write"](handle, block)

    monkeypatch.setattr(os, "open", opens)
    monkeypatch.setattr(os, "write", writes)
    speed = disk.measure_disk(tmp_path)
    assert speed.write_way == "fdatasync" and "posix_fadvise" in speed.read_way and not list(tmp_path.iterdir())


def test_a_folder_that_is_not_there_a_slow_disk_and_a_full_one_are_told(tmp_path, monkeypatch):
    assert "can't be written and read (No such file or directory)" in _said(disk.disk_findings(tmp_path / "none"))
    slow = disk.DiskSpeed(
        write_bytes_per_s=2e6, read_bytes_per_s=9e9, write_way="fdatasync", read_way="O_DIRECT", num_bytes=1 << 20
    )
    monkeypatch.setattr(disk, "measure_disk", lambda folder: slow)
    assert "writes 2 MB/s (fdatasync)" in _said(disk.disk_findings(tmp_path), Level.WARNING)
    full = disk.free_space_finding(tmp_path, least_gib=1e9, level=Level.PROBLEM)
    assert full.level is Level.PROBLEM and "1e+09 are needed" in full.said


def test_a_folder_whose_file_system_does_not_answer_is_a_problem_and_keeps_nobody_waiting(tmp_path):
    assert [f.name for f in disk.folder_findings(tmp_path, least_gib=0, level=Level.PROBLEM)] == ["speed", "free space"]
    (tmp_path / "sitecustomize.py").write_text("import os, time\nos.open = lambda *a, **k: time.sleep(60)\n")
    variables = {"PYTHONPATH": f"{tmp_path}:{ROOT}"}
    with pytest.MonkeyPatch.context() as patched:
        patched.setitem(os.environ, "PYTHONPATH", variables["PYTHONPATH"])
        (found,) = disk.folder_findings(tmp_path, least_gib=0, level=Level.PROBLEM, timeout_s=2.0)
    assert (found.name, found.level) == ("speed", Level.PROBLEM) and "its check took too long" in found.said
    assert f"see whether {tmp_path} answers at all" in found.remedy


def test_little_shared_memory_is_told_with_the_flag_that_helps(tmp_path):
    found = limits.shared_memory_finding(least_gib=1e9, level=Level.WARNING, path=tmp_path)
    assert found.level is Level.WARNING and "--shm-size" in found.remedy
    assert limits.shared_memory_finding(least_gib=0, level=Level.WARNING, path=tmp_path).level is Level.OK


def test_few_open_files_are_warned_of(monkeypatch):
    monkeypatch.setattr(limits.resource, "getrlimit", lambda which: (1024, 4096))
    assert "1024 (at most 4096), and large runs need 4096" in _said(limits.limit_findings(), Level.WARNING)


# --- all of it


def test_all_of_it_runs_here_as_json(tmp_path, capsys):
    began = time.monotonic()
    code = main(["doctor", "--json", "--dir", str(tmp_path)])
    said = json.loads(capsys.readouterr().out)
    problems = [f for f in said["findings"] if f["level"] == "problem"]
    assert not problems and said["fit"] is True and code == 0
    subjects = {f["subject"] for f in said["findings"]}
    assert {"packages", "torch", "gpus", "kernels", "zero backends", "network", "disk", "limits"} <= subjects
    by_name = {f["name"]: f for f in said["findings"]}
    assert by_name["attention with log-sum-exp"]["level"] == by_name["native"]["level"] == "ok"
    assert by_name["gloo between 2 ranks"]["values"]["bytes_per_s"] > 1e6 or torch.cuda.device_count() > 1
    assert time.monotonic() - began < 100 and not list(tmp_path.iterdir())


def _fixed(monkeypatch, *findings):
    monkeypatch.setattr(doctor, "doctor", lambda folder, *, expect_gpus: iter(findings))


def test_a_problem_is_shown_with_its_way_out_and_a_warning_does_not_fail(tmp_path, monkeypatch, capsys):
    bad = Finding(subject="gpus", name="GPU 3", level=Level.PROBLEM, said="3 memory errors", remedy="reset [it]")
    odd = Finding(subject="limits", name="open files", level=Level.WARNING, said="1024", remedy="ulimit -n 65536")
    _fixed(monkeypatch, odd)
    assert main(["doctor", "--dir", str(tmp_path)]) == 0
    assert "training can run here: 0 problems, 1 warning\n" in capsys.readouterr().out
    _fixed(monkeypatch, bad, odd)
    assert main(["doctor", "--dir", str(tmp_path)]) == 1
    out = capsys.readouterr().out
    assert "problem: gpus, GPU 3: 3 memory errors\n  -> reset [it]\n" in out
    assert "training can't run here as it is: 1 problem, 1 warning\n" in out
    assert problems_of([bad, odd]) == ("gpus, GPU 3: 3 memory errors; reset [it]",)


def test_a_folder_or_a_number_that_cannot_be_is_bad_usage(tmp_path, capsys):
    assert main(["doctor", "--dir", str(tmp_path / "none"), "--expect-gpus", "-1"]) == 2
    said = capsys.readouterr().err
    assert "is no folder" in said and "--expect-gpus must be 0 or more" in said


def test_ranks_that_do_not_find_each_other_are_a_problem_with_what_they_said(tmp_path):
    code = (
        "import json; from dataclasses import asdict; from opensora_dist.machine.collective import collective_finding; "
        "print(json.dumps(asdict(collective_finding())))"
    )
    said = children.run_child(
        [sys.executable, "-c", code], timeout_s=60, variables={"GLOO_SOCKET_IFNAME": "nope9", "PYTHONPATH": str(ROOT)}
    )
    found = json.loads(said.out)
    # Either may be the first to fail.
    assert found["level"] == "problem" and re.search(r"rank [01] failed: ", found["said"]) and "nope9" in found["said"]
    assert "bench network --nproc 2" in found["remedy"]


def test_a_table_fits_a_narrow_terminal():
    found = [Finding(subject="network", name="eth0", level=Level.OK, said="x" * 200)]
    with Console(width=60, record=True, force_terminal=True, file=io.StringIO()) as console:
        doctor.show(found, console=console)
    lines = console.export_text().splitlines()
    assert all(len(line) <= 60 for line in lines) and sum(line.count("x") for line in lines) == 200


def test_a_file_gets_every_word_and_warnings_in_one_line():
    words = [f"/a/long/path/of/a/shared/library/number-{i}.so" for i in range(12)]
    found = [
        Finding(subject="network", name="n" * 30, level=Level.WARNING, said=" ".join(words) + "/" + "Q" * 300, remedy="r " * 90)
    ]
    file = io.StringIO()
    doctor.show(found, console=Console(file=file))
    said = file.getvalue()
    assert "…" not in said and said.count("Q" * 300) == 1 and said.count("Q") == 600 and "r " * 89 in said
    assert all(said.count(word) == 2 for word in words)
