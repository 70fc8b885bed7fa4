"""``doctor``: each check on machines that are well and on such as are not, and all of them together on this one."""

from __future__ import annotations

import ast
import errno
import io
import json
import os
import re
import signal
import socket
import sys
import time
from pathlib import Path

import fake_smi
import pytest
import torch
from rich.console import Console

from opensora_dist.cli.main import main
from opensora_dist.machine import children, disk, gpus, kernels, limits, load, network, optional, packages
from opensora_dist.machine.finding import Finding, Level, problems_of
from opensora_dist.recipes import doctor

ROOT = Path(__file__).parents[2]


@pytest.fixture
def smi(tmp_path, monkeypatch):
    """A folder in front of PATH."""
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setattr(gpus, "KERNEL_LOG", tmp_path / "no-log")
    return tmp_path


def _look(*, expect=None):
    return gpus.gpu_findings(expect=expect, clock_share=0.5)


def _said(findings, level=Level.PROBLEM):
    return " | ".join(str(f) for f in findings if f.level is level)


# --- GPUs


def test_gpus_that_are_well_have_no_problem_and_no_warning(smi):
    fake_smi.put_smi(smi, *[fake_smi.GOOD] * 8)
    found = _look(expect=8)
    assert not _said(found) and not _said(found, Level.WARNING)
    assert found[0].said == "8 x NVIDIA H100 80GB HBM3"
    assert "81559 MiB, SM clock up to 1980 MHz, ECC on, no uncorrected error" in _said(found, Level.OK)


def test_an_older_driver_and_a_gpu_without_ecc_are_read_by_the_fields_they_have(smi):
    fake_smi.put_smi(smi, fake_smi.OLD)
    (gpu,) = gpus.query_gpus().gpus
    assert (gpu.slowed, gpu.ecc, gpu.uncorrected, gpu.limit_sm_mhz, gpu.rows_failed) == (0, None, None, None, False)
    assert not _said(_look()) and "nvidia-persistenced" in _said(_look(), Level.WARNING)


@pytest.mark.parametrize(
    "bad, words",
    [
        ({"ecc.errors.uncorrected.volatile.total": "3"}, "3 memory errors that could not be corrected; reset it"),
        ({"remapped_rows.pending": "1"}, "waits for a reset"),
        ({"remapped_rows.pending": "Yes"}, "waits for a reset"),
        ({"retired_pages.pending": "Yes"}, "waits for a reset"),
        ({"remapped_rows.failure": "1"}, "no spare rows are left; take the node out of service"),
        ({"clocks_event_reasons.active": "0x0000000000000048"}, "slowed down by hardware slowdown and heat (hardware)"),
        ({"clocks_event_reasons.active": "0x0000000000000080"}, "slowed down by power brake"),
        (fake_smi.LOST, "the driver can't reach it; restart the machine"),
    ],
)
def test_a_gpu_that_is_ill_is_named_with_the_way_out(smi, bad, words):
    fake_smi.put_smi(smi, fake_smi.GOOD, {**fake_smi.GOOD, **bad}, fake_smi.GOOD)
    said = _said(_look(expect=3))
    assert said.startswith("gpus, GPU 1: ") and words in said


def test_a_gpu_that_is_held_down_by_its_power_limit_alone_is_well(smi):
    fake_smi.put_smi(smi, {**fake_smi.GOOD, "clocks_event_reasons.active": "0x0000000000000004"})
    assert not _said(_look())


def test_a_missing_gpu_is_a_problem_and_one_too_many_a_warning(smi):
    fake_smi.put_smi(smi, *[fake_smi.GOOD] * 7)
    assert "7 x NVIDIA H100 80GB HBM3, and 8 are expected; look for Xid 79" in _said(_look(expect=8))
    assert not _said(_look(expect=6)) and "CUDA_VISIBLE_DEVICES" in _said(_look(expect=6), Level.WARNING)


def test_a_line_of_nvidia_smi_that_is_no_gpu_is_told_and_not_counted(smi):
    line = "WARNING: infoROM is corrupted at gpu 0000:5D:00.0\n"
    fake_smi.put_smi(smi, *[fake_smi.GOOD] * 7, said=line)
    found = _look(expect=8)
    assert "7 x NVIDIA H100 80GB HBM3, and 8 are expected" in _said(found)
    assert "infoROM is corrupted at gpu 0000:5D:00.0" in _said(found, Level.WARNING)
    fake_smi.put_script(smi, "#!/bin/sh\necho 'No devices were found'\n")
    assert gpus.query_gpus().gpus == () and "No devices were found" in _said(_look(), Level.WARNING)


def test_a_driver_that_refuses_to_name_gpus_by_remapped_rows_is_no_error(smi):
    fake_smi.put_smi(smi, {**fake_smi.GOOD, "remapped_rows.pending": "1"})
    assert "waits for a reset" in _said(_look())
    script = (smi / "nvidia-smi").read_text().replace('"gpu_uuid": ', '"gpu_serial": ')
    fake_smi.put_script(smi, script)
    assert _look(expect=1)[0].level is Level.OK and not _said(_look())


def test_clocks_of_an_idle_gpu_are_a_note_and_of_one_that_computes_a_problem(smi):
    idle = {**fake_smi.GOOD, "clocks.applications.graphics": "705", "clocks.sm": "210"}
    fake_smi.put_smi(smi, idle)
    assert not _said(_look()) and "applications ask for 705 of 1980 MHz" in _said(_look(), Level.NOTE)
    (gpu,) = gpus.query_gpus().gpus
    said = _said(gpus.loaded_findings(gpu, clock_share=0.5))
    assert "GPU 0 under load: SM clock 210 of 1980 MHz, less than preflight.clock_share=0.5" in said
    fake_smi.put_smi(smi, {**fake_smi.GOOD, "clocks.sm": "1500", "clocks_event_reasons.active": "0x40"}, fake_smi.LOST)
    hot, lost = gpus.query_gpus().gpus
    assert "GPU 0 under load: slowed down by heat (hardware)" in _said(gpus.loaded_findings(hot, clock_share=0.5))
    assert "can't reach it any more" in _said(gpus.loaded_findings(lost, clock_share=0.5))


def test_a_gpu_is_lost_where_the_driver_knows_nothing_of_it_and_not_where_one_field_fails(smi):
    fake_smi.put_smi(smi, {**fake_smi.GOOD, "persistence_mode": "[Unknown Error]"})
    assert not _said(_look()) and "can't read persistence_mode" in _said(_look(), Level.WARNING)
    fake_smi.put_smi(smi, {**fake_smi.GOOD, "clocks.sm": "[Unknown Error]"})
    assert "the driver can't reach it" in _said(_look())


def test_an_nvidia_smi_that_fails_or_hangs_is_a_problem_and_not_an_error(smi, monkeypatch):
    fake_smi.put_script(
        smi, "#!/bin/sh\necho 'Unable to determine the device handle for GPU0000:18:00.0: Unknown Error'\nexit 255\n"
    )
    assert "exit code 255: Unable to determine the device handle" in _said(_look())
    monkeypatch.setattr(gpus, "_TIMEOUT_S", 0.2)
    fake_smi.put_script(smi, "#!/bin/sh\nexec sleep 30\n")
    assert "gave no answer within 0.2 s" in _said(_look())


def _log(*records):
    return [f"4,1,{int(1e6 * at_s)},-;{text}" for at_s, text in records]


def test_an_error_of_the_device_in_the_kernels_log_is_told_for_a_day_and_one_of_an_application_never():
    fell, app = "NVRM: Xid (PCI:0000:3b:00): 79, pid=1, GPU has fallen off the bus.", "NVRM: Xid (PCI:0000:3b:00): 31, pid=1"
    now = 200_000.0
    found = gpus.xid_finding(_log((now - 60, fell), (now - 50, fell), (now - 40, app)), uptime_s=now)
    assert found.level is Level.PROBLEM and found.said == "Xid 79 of 0000:3b:00 (the GPU has fallen off the bus)"
    assert gpus.xid_finding(_log((now - 90_000, fell), (now - 40, app)), uptime_s=now).level is Level.OK
    assert gpus.xid_finding(None, uptime_s=now).level is Level.NOTE


def test_what_is_told_to_do_about_an_error_in_the_log_ends_it_there_too():
    fell = "NVRM: Xid (PCI:0000:3b:00): 79, pid=1, GPU has fallen off the bus."
    way_out = gpus.xid_finding(_log((5, fell)), uptime_s=10).remedy
    assert way_out.startswith("restart the machine, which clears its log") and "reset" not in way_out


def test_a_fatal_error_of_an_nvswitch_is_told_and_one_that_is_not_fatal_never():
    fatal = "nvidia-nvswitch0: SXid (PCI:0000:c1:00.0): 23001, Fatal, Link 12 Always Fatal"
    mended = "nvidia-nvswitch3: SXid (PCI:0000:c1:00.0): 20009, Non-fatal, Link 04 RX Short Error Rate"
    found = gpus.xid_finding(_log((5, fatal), (6, mended)), uptime_s=10)
    assert found.level is Level.PROBLEM and found.said == "SXid 23001 of 0000:c1:00.0 (fatal error of an NVSwitch)"
    assert gpus.xid_finding(_log((6, mended)), uptime_s=10).level is Level.OK


def test_the_kernels_log_is_read_to_its_end(tmp_path):
    log = tmp_path / "kmsg"
    log.write_text("4,1,5,-;a\n4,2,6,-;b\n")
    assert gpus.read_kernel_log(log) == ["4,1,5,-;a", "4,2,6,-;b"]
    assert gpus.read_kernel_log(tmp_path / "none") is None


def test_records_that_were_overwritten_meanwhile_do_not_end_the_kernels_log(tmp_path, monkeypatch):
    answers = iter(
        [b"4,1,5,-;a\n", BrokenPipeError(errno.EPIPE, "Broken pipe"), b"4,9,6,-;newest\n", BlockingIOError(errno.EAGAIN, "")]
    )

    def read(handle, size):
        answer = next(answers)
        if isinstance(answer, OSError):
            raise answer
        return answer

    (tmp_path / "kmsg").write_text("")
    with monkeypatch.context() as patched:
        patched.setattr(os, "read", read)
        found = gpus.read_kernel_log(tmp_path / "kmsg")
    assert found == ["4,1,5,-;a", "4,9,6,-;newest"]


# --- GPUs under load


@pytest.mark.parametrize("size", [64, 300])
def test_what_products_under_load_are_compared_with_is_exact(size):
    whole = load.factor(size).double()
    assert torch.equal(load.product(size), (whole @ whole).bfloat16())


def test_one_wrong_number_of_any_product_is_counted():
    a, right = load.factor(64), load.product(64)
    few = load.wrong_numbers(a, right)
    assert int(few) == 0
    right[3, 5] += 8
    assert int(load.wrong_numbers(a, right)) == load._PRODUCTS
    right[3, 5] = float("nan")
    assert int(load.wrong_numbers(a, right)) == load._PRODUCTS


def test_a_gpu_that_computes_something_wrong_is_named_though_it_is_alone():
    assert load.wrong_findings([0, 0, 0]) == []
    (found,) = load.wrong_findings([3])
    assert found.name == "GPU 0 (of torch)" and found.level is Level.PROBLEM and found.said.startswith("3 numbers")


def test_a_gpu_that_is_much_slower_than_its_like_is_named():
    names = ["H100"] * 3 + ["T4"]
    assert load.slower_findings(names, [700e12, 690e12, 600e12, 50e12]) == []
    (found,) = load.slower_findings(names, [700e12, 690e12, 500e12, 50e12])
    assert found.name == "GPU 2 (of torch)" and found.level is Level.PROBLEM
    assert found.said == "500 TFLOP/s, less than 0.8 of the 690 that others have"
    assert [f.name for f in load.slower_findings(["A100"] * 2, [100e12, 300e12])] == ["GPU 0 (of torch)"]


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


def test_gpus_that_torch_does_not_see_are_a_problem_unless_they_are_hidden_on_purpose(smi, monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 7)
    found = kernels.torch_finding(num_gpus=8)
    assert found.level is Level.PROBLEM and "sees 7 of 8 GPUs; check CUDA_VISIBLE_DEVICES" in str(found)
    assert kernels.torch_finding(num_gpus=7).level is Level.OK
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    fake_smi.put_smi(smi, *[fake_smi.GOOD] * 8)
    seen = _look()
    assert [doctor.usable_gpus(seen, expect=expect) for expect in (None, 4, 8, 9)] == [8, 4, 8, 8]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,3")
    assert [doctor.usable_gpus(seen, expect=expect) for expect in (None, 8)] == [2, 8]


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


def test_a_check_that_hangs_is_ended_with_all_that_it_started(tmp_path):
    body = (
        "import subprocess\nother = subprocess.Popen(['sleep', '60'])\n"
        f"open({str(tmp_path / 'pid')!r}, 'w').write(str(other.pid))\ntell('kernels', 'second', lambda: time.sleep(60))"
    )
    _, second = _child(tmp_path, body, timeout_s=3.0)
    assert "its check took too long" in second.said
    assert not _runs(int((tmp_path / "pid").read_text()))


def test_a_check_whose_descendant_outlives_it_keeps_nobody_waiting(tmp_path):
    body = (
        "import subprocess\nother = subprocess.Popen(['sleep', '60'], start_new_session=True)\n"
        f"open({str(tmp_path / 'pid')!r}, 'w').write(str(other.pid))\ntime.sleep(HOW_LONG)"
    )
    for how_long, words in (("0", None), ("60", "took too long")):
        began = time.monotonic()
        first, *others = _child(tmp_path, body.replace("HOW_LONG", how_long), timeout_s=3.0)
        os.kill(int((tmp_path / "pid").read_text()), signal.SIGKILL)
        assert first.said == "fine" and time.monotonic() - began < 10.0
        assert not others if words is None else words in others[0].said


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


# --- network


def _named(monkeypatch, address):
    def getaddrinfo(*_):
        if address is None:
            raise socket.gaierror(-2, "Name or service not known")
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, 0))]

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)


@pytest.mark.parametrize("address", ["127.0.1.1", None])
def test_a_host_name_that_others_would_not_find_is_warned_of(monkeypatch, address):
    _named(monkeypatch, address)
    (found,) = (f for f in network.network_findings({}) if f.name == "ranks use")
    assert found.level is Level.WARNING and "no other machine finds" in found.said and "GLOO_SOCKET_IFNAME=" in found.remedy


def test_the_interface_that_is_named_goes_before_the_host_name(monkeypatch):
    _named(monkeypatch, "127.0.1.1")
    eth = network.Interface(name="eth7", address="10.1.2.3", up=True, loopback=False, mbit_per_s=100_000, mtu=9000)
    assert network.rank_address({}, known=[eth]).loopback
    assert network.rank_address({"GLOO_SOCKET_IFNAME": "eth7,eth8"}, known=[eth]).address == "10.1.2.3"
    assert network.rank_address({"GLOO_SOCKET_IFNAME": "eth9"}, known=[eth]).address is None
    assert network._of_interface(eth).said == "100 Gbit/s, MTU 9000, up, 10.1.2.3"


def test_this_machine_has_a_loopback_with_an_address():
    (lo,) = (i for i in network.interfaces() if i.loopback)
    assert (lo.address, lo.up) == ("127.0.0.1", True)
    assert network.interface_finding(lo.name).level is Level.OK
    assert "there is no interface nope9" in str(network.interface_finding("nope9"))


@pytest.mark.parametrize("at", ["bind", "connect"])
def test_a_loopback_that_carries_nothing_is_a_problem_and_keeps_nobody_waiting(monkeypatch, at):
    def refuse(*args, **options):
        raise OSError(errno.ENETUNREACH, "Network is unreachable")

    monkeypatch.setattr(network, "_ANSWER_S", 0.2)
    monkeypatch.setattr(socket, {"bind": "create_server", "connect": "create_connection"}[at], refuse)
    found = network.loopback_finding()
    assert found.level is Level.PROBLEM and "127.0.0.1 can't be talked to" in found.said and "ip link set lo up" in found.remedy


def _ports(monkeypatch, folder, **states):
    for name, state in states.items():
        port = folder / "infiniband" / name / "ports/1"
        port.mkdir(parents=True, exist_ok=True)
        for file, text in (("state", state), ("rate", "400 Gb/sec (4X NDR)"), ("link_layer", "InfiniBand")):
            (port / file).write_text(text + "\n")
    monkeypatch.setattr(network, "_SYS", folder)


@pytest.mark.parametrize(
    "hcas, bad",
    [
        (None, []),
        ("mlx5_0", []),
        ("mlx5_0,mlx5_1", ["mlx5_1:1"]),
        ("mlx5", ["mlx5_1:1"]),
        ("=mlx5_1:1", ["mlx5_1:1"]),
        ("mlx5_0,mlx5_1:2", []),
        ("^mlx5_1", []),
        ("^=mlx5_0", ["mlx5_1:1"]),
        ("=mlx5", ["RDMA"]),
        ("mlx4", ["RDMA"]),
    ],
)
def test_an_rdma_port_that_is_down_is_a_problem_where_nccl_is_told_to_use_it(tmp_path, monkeypatch, hcas, bad):
    _ports(monkeypatch, tmp_path, mlx5_0="4: ACTIVE", mlx5_1="1: DOWN")
    found = network.rdma_findings(hcas)
    assert [f.name for f in found if f.level is Level.PROBLEM] == bad
    assert {f.name: f.level for f in found}["mlx5_0:1"] is Level.OK


@pytest.mark.parametrize(
    "value, level", [("lo", Level.OK), ("=lo", Level.OK), ("nope", Level.PROBLEM), ("=l", Level.PROBLEM), ("^docker", Level.OK)]
)
def test_interfaces_that_nccl_is_told_of_are_looked_for_by_its_rules(value, level):
    lo = [i for i in network.interfaces() if i.name == "lo"]
    assert network._of_nccl({"NCCL_SOCKET_IFNAME": value}, lo).level is level


def test_the_loopback_carries_something(monkeypatch):
    monkeypatch.setattr(network, "_LOOPBACK_S", 0.05)
    assert network.loopback_bytes_per_s() > 1e7


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
