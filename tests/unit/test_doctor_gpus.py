"""What ``doctor`` says of GPUs: each kind that is well, ill, slow, lost or missing, through a stand-in for nvidia-smi."""

from __future__ import annotations

import errno
import os

import fake_smi
import pytest
import torch

from opensora_dist.machine import gpus, kernels, load
from opensora_dist.machine.finding import Level
from opensora_dist.recipes import doctor


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


# --- what torch sees of them


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
