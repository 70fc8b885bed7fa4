"""GPUs as their driver sees them: how many, in what state, and what the kernel's log says of them.

Asked of nvidia-smi, which works where torch does not: a GPU that fell off the bus is missed, one with memory errors is named.
"""

from __future__ import annotations

import csv
import errno
import os
import re
import shutil
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from opensora_dist.core.errors import OpensoraError
from opensora_dist.machine.children import run_child
from opensora_dist.machine.finding import Finding, Level, Subject

_SUBJECT: Final = Subject("gpus")
KERNEL_LOG: Final = Path("/dev/kmsg")
_TIMEOUT_S = 30.0  # eight GPUs without persistence mode take some seconds; a driver that hangs takes for ever
_XID_RECENT_S = 24 * 3600.0
_MUCH_USED_MIB = 1024

_FIELDS = (
    "index",
    "name",
    "uuid",
    "pci.bus_id",
    "driver_version",
    "memory.total",
    "memory.used",
    "clocks.sm",
    "clocks.max.sm",
    "clocks.applications.graphics",
    "clocks_event_reasons.active",
    "clocks_throttle_reasons.active",  # what drivers before 535 call it
    "ecc.mode.current",
    "ecc.errors.uncorrected.volatile.total",
    "retired_pages.pending",
    "persistence_mode",
)
_ROW_FIELDS = ("gpu_uuid", "remapped_rows.pending", "remapped_rows.failure")
_VITAL = ("memory.total", "memory.used", "clocks.sm", "clocks.max.sm")  # a GPU that answers at all knows these
_NO_ANSWER = "Unknown Error"

# nvml.h, nvmlClocksEventReason*: those that are no choice of an administrator and no ordinary power limit.
_SLOWED = {0x08: "hardware slowdown", 0x20: "heat (software)", 0x40: "heat (hardware)", 0x80: "power brake"}

# NVIDIA's Xid catalogue: errors of the device, the driver or a link. Those that an application causes (13, 31, 43, 45) are left out.
_XIDS = {
    48: "memory error that could not be corrected",
    62: "internal halt of a microcontroller",
    64: "a row or page could not be retired",
    74: "NVLink error",
    79: "the GPU has fallen off the bus",
    95: "memory error that was not contained",
    119: "the GPU's system processor did not answer",
    120: "error of the GPU's system processor",
    140: "memory error that could not be recovered from",
}
_XID = re.compile(r"NVRM: Xid \(PCI:([0-9a-fA-F:.]+)\): (\d+)")
# Of an NVSwitch, as the Fabric Manager's guide has it; those that aren't fatal are mended by the link itself.
_SXID = re.compile(r"nvidia-nvswitch\d*:? SXid \(PCI:([0-9a-fA-F:.]+)\): (\d+), Fatal")


class SmiError(OpensoraError):
    """nvidia-smi is there and gives no answer."""


@dataclass(frozen=True, kw_only=True)
class Gpu:
    """
    Args:
        index, name, uuid, bus_id, driver: As nvidia-smi says.
        memory_mib, used_mib: Of the device's memory.
        sm_mhz, most_sm_mhz: The clock now, and the highest there is.
        limit_sm_mhz: What applications ask for; it says little of what they get.
        slowed: Bits of what holds the clock down.
        ecc: Whether memory errors are corrected; None where the GPU can't.
        uncorrected: Memory errors since the driver was loaded.
        pages_pending, rows_pending: Memory waits for a reset of the GPU to be taken out of use.
        rows_failed: No spare row was left for one.
        persistence: Whether the driver stays loaded while nobody uses the GPU.
        lost: The driver can't reach it.
        unread: What the driver fails to read, though it reaches the GPU.

    Numbers are None where the driver does not say.
    """

    index: int
    name: str
    uuid: str
    bus_id: str
    driver: str
    memory_mib: int | None
    used_mib: int | None
    sm_mhz: int | None
    most_sm_mhz: int | None
    limit_sm_mhz: int | None
    slowed: int | None
    ecc: bool | None
    uncorrected: int | None
    pages_pending: bool
    rows_pending: bool
    rows_failed: bool
    persistence: bool | None
    lost: bool
    unread: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Seen:
    """
    Args:
        gpus: All of this machine.
        said: What nvidia-smi said besides, as of a damaged infoROM.
    """

    gpus: tuple[Gpu, ...]
    said: tuple[str, ...]


def query_gpus() -> Seen:
    """All GPUs of this machine; none where there is no nvidia-smi.

    Raises:
        SmiError: It fails, or takes longer than 30 s.
    """
    if shutil.which("nvidia-smi") is None:
        return Seen(gpus=(), said=())
    rows, said = _query("--query-gpu", _FIELDS, first=r"\d+")
    try:
        remapped = {row["gpu_uuid"]: row for row in _query("--query-remapped-rows", _ROW_FIELDS, first=r"\S+")[0]}
    except SmiError:  # GPUs before Ampere have no rows to remap
        remapped = {}
    return Seen(gpus=tuple(_gpu({**row, **remapped.get(row.get("uuid", ""), {})}) for row in rows), said=tuple(said))


def _query(option: str, fields: Sequence[str], *, first: str) -> tuple[list[dict[str, str]], list[str]]:
    """Rows by field, and the lines that are none. A field that this driver doesn't know is left out: they come and go between versions.

    Args:
        first: Pattern of the first field, by which a row is known; a driver has to have it.
    """
    fields = list(fields)
    while True:
        code, out = _smi(f"{option}={','.join(fields)}", "--format=csv,noheader,nounits")
        if code == 0:
            break
        unknown = re.search(r'Field "([\w.]+)" is not a valid field', out)
        if unknown is None or unknown[1] not in fields[1:]:
            raise SmiError(f"nvidia-smi failed with exit code {code}: {' '.join(out.split())[:300]}")
        fields.remove(unknown[1])
    rows, others = [], []
    for line in filter(str.strip, out.splitlines()):
        cells = [cell.strip() for cell in next(csv.reader([line], skipinitialspace=True))]
        if len(cells) == len(fields) and re.fullmatch(first, cells[0]):
            rows.append(dict(zip(fields, cells)))
        else:
            others.append(line.strip())
    return rows, others


def _smi(*args: str) -> tuple[int, str]:
    said = run_child(["nvidia-smi", *args], timeout_s=_TIMEOUT_S)
    if said.code is None:
        raise SmiError(f"nvidia-smi gave no answer within {_TIMEOUT_S:g} s: the driver, or a GPU, hangs")
    return said.code, f"{said.out}\n{said.err}"


def _gpu(row: dict[str, str]) -> Gpu:
    reasons = row.get("clocks_event_reasons.active", row.get("clocks_throttle_reasons.active", ""))
    return Gpu(
        index=_number(row.get("index")) or 0,
        name=row.get("name", ""),
        uuid=row.get("uuid", ""),
        bus_id=row.get("pci.bus_id", ""),
        driver=row.get("driver_version", ""),
        memory_mib=_number(row.get("memory.total")),
        used_mib=_number(row.get("memory.used")),
        sm_mhz=_number(row.get("clocks.sm")),
        most_sm_mhz=_number(row.get("clocks.max.sm")),
        limit_sm_mhz=_number(row.get("clocks.applications.graphics")),
        slowed=int(reasons, 16) if re.fullmatch(r"0x[0-9a-fA-F]+", reasons) else None,
        ecc=_switch(row.get("ecc.mode.current")),
        uncorrected=_number(row.get("ecc.errors.uncorrected.volatile.total")),
        pages_pending=_said_yes(row.get("retired_pages.pending")),
        rows_pending=_said_yes(row.get("remapped_rows.pending")),
        rows_failed=_said_yes(row.get("remapped_rows.failure")),
        persistence=_switch(row.get("persistence_mode")),
        lost=any("GPU is lost" in value for value in row.values()) or any(_NO_ANSWER in row.get(field, "") for field in _VITAL),
        unread=tuple(field for field, value in row.items() if _NO_ANSWER in value),
    )


def _number(text: str | None) -> int | None:
    return int(text) if text is not None and text.isdigit() else None


def _switch(text: str | None) -> bool | None:
    return {"Enabled": True, "Disabled": False}.get(text or "")


def _said_yes(text: str | None) -> bool:
    return text == "Yes" or bool(_number(text))


def gpu_findings(*, expect: int | None, clock_share: float) -> list[Finding]:
    """What there is to say of this machine's GPUs.

    Args:
        expect: How many there must be; None: any number will do.
        clock_share: What of its highest SM clock a GPU's applications usually ask for at least.
    """
    try:
        seen = query_gpus()
    except SmiError as error:
        way_out = "restart the driver or the machine, or take it out of service"
        return [_SUBJECT.finding("nvidia-smi", Level.PROBLEM, str(error), way_out)]
    gpus, found = seen.gpus, [_count(seen.gpus, expect=expect)]
    for gpu in gpus:
        found += _of_one(gpu, clock_share=clock_share)
    if seen.said:
        way_out = "ask NVIDIA's documentation what it means; where training fails on this node, take it out of service"
        found.append(_SUBJECT.finding("nvidia-smi", Level.WARNING, " / ".join(seen.said)[:600], way_out))
    if gpus:
        drivers = sorted({gpu.driver for gpu in gpus})
        found.append(_SUBJECT.finding("driver", Level.OK, ", ".join(drivers)))
        found.append(xid_finding(read_kernel_log(KERNEL_LOG), uptime_s=time.clock_gettime(time.CLOCK_BOOTTIME)))
    return found


def _count(gpus: Sequence[Gpu], *, expect: int | None) -> Finding:
    said = "none" if not gpus else f"{len(gpus)} x {', '.join(sorted({gpu.name for gpu in gpus}))}"
    values = {"count": len(gpus), "expected": expect}
    if expect is not None and len(gpus) != expect:
        way_out = "look for Xid 79 in `dmesg`; restart the machine, or take it out of service"
        if len(gpus) > expect:
            way_out = "ask for all of them, or hide some by CUDA_VISIBLE_DEVICES"
        level = Level.PROBLEM if len(gpus) < expect else Level.WARNING
        return _SUBJECT.finding("count", level, f"{said}, and {expect} are expected", way_out, values=values)
    return _SUBJECT.finding("count", Level.OK if gpus else Level.NOTE, said, values=values)


def _of_one(gpu: Gpu, *, clock_share: float) -> list[Finding]:
    """All that is wrong with one GPU, or one line that says it is well."""
    name = f"GPU {gpu.index}"
    swap = "take the node out of service and have it looked at"
    if gpu.lost:
        return [_SUBJECT.finding(name, Level.PROBLEM, "the driver can't reach it", f"restart the machine, or {swap}")]
    found = []
    reset = "reset it (`nvidia-smi --gpu-reset`) or restart the machine; where they come back, " + swap
    if gpu.uncorrected:
        found.append(_SUBJECT.finding(name, Level.PROBLEM, f"{gpu.uncorrected} memory errors that could not be corrected", reset))
    if gpu.rows_failed:
        found.append(_SUBJECT.finding(name, Level.PROBLEM, "memory that could not be remapped: no spare rows are left", swap))
    if gpu.rows_pending or gpu.pages_pending:
        found.append(_SUBJECT.finding(name, Level.PROBLEM, "bad memory waits for a reset to be taken out of use", reset))
    found += slowed_findings(name, gpu)
    if gpu.unread:
        said = f"the driver can't read {', '.join(gpu.unread)}"
        found.append(_SUBJECT.finding(name, Level.WARNING, said, f"restart the machine; where it comes back, {swap}"))
    if gpu.limit_sm_mhz is not None and gpu.limit_sm_mhz < clock_share * (gpu.most_sm_mhz or 0):
        said = f"applications ask for {gpu.limit_sm_mhz} of {gpu.most_sm_mhz} MHz; what they get is seen under load"
        found.append(_SUBJECT.finding(name, Level.NOTE, said, "`nvidia-smi -rac`"))
    if gpu.ecc is False:
        found.append(_SUBJECT.finding(name, Level.WARNING, "memory errors are not corrected", "`nvidia-smi -e 1`, and a reset"))
    if gpu.persistence is False:
        way_out = "`nvidia-smi -pm 1`, or run nvidia-persistenced"
        found.append(
            _SUBJECT.finding(name, Level.WARNING, "the driver is unloaded between uses, which makes each start slow", way_out)
        )
    if (gpu.used_mib or 0) > _MUCH_USED_MIB:
        way_out = "`nvidia-smi` shows what uses it"
        found.append(_SUBJECT.finding(name, Level.WARNING, f"{gpu.used_mib} MiB of its memory are in use", way_out))
    if not found:
        clocks = "" if gpu.most_sm_mhz is None else f", SM clock up to {gpu.most_sm_mhz} MHz"
        ecc = {True: ", ECC on, no uncorrected error", False: "", None: ", without ECC"}[gpu.ecc]
        found.append(_SUBJECT.finding(name, Level.OK, f"{gpu.memory_mib} MiB{clocks}{ecc}", values={"uuid": gpu.uuid}))
    return found


def slowed_findings(name: str, gpu: Gpu) -> list[Finding]:
    """A problem where something holds a GPU's clock down that no administrator chose."""
    slowed = [said for bit, said in _SLOWED.items() if (gpu.slowed or 0) & bit]
    way_out = "look at cooling and power supply, or take the node out of service and have it looked at"
    return [_SUBJECT.finding(name, Level.PROBLEM, f"slowed down by {' and '.join(slowed)}", way_out)] if slowed else []


def loaded_findings(gpu: Gpu, *, clock_share: float) -> list[Finding]:
    """What is wrong with a GPU that has been computing for a second: idle clocks say nothing.

    Args:
        clock_share: What of its highest SM clock it must run at least.
    """
    name = f"GPU {gpu.index} under load"
    if gpu.lost:
        return [
            _SUBJECT.finding(
                name, Level.PROBLEM, "the driver can't reach it any more", "restart the machine, and look for Xid 79"
            )
        ]
    found = slowed_findings(name, gpu)
    if gpu.sm_mhz is not None and gpu.sm_mhz < clock_share * (gpu.most_sm_mhz or 0):
        said = f"SM clock {gpu.sm_mhz} of {gpu.most_sm_mhz} MHz, less than preflight.clock_share={clock_share:g} of it"
        found.append(
            _SUBJECT.finding(name, Level.PROBLEM, said, "`nvidia-smi -rac`, `nvidia-smi -rgc`, and look at its power limit")
        )
    return found


def read_kernel_log(path: Path) -> list[str] | None:
    """Records of the kernel's log, as /dev/kmsg gives them; None where this user may not read it."""
    try:
        handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    except OSError:
        return None
    parts = []
    try:
        while True:
            try:
                part = os.read(handle, 1 << 16)
            except OSError as error:
                if error.errno == errno.EPIPE:  # the next record was overwritten meanwhile; the oldest that is left follows
                    continue
                break  # EAGAIN: that was the newest
            if not part:
                break
            parts.append(part)
    finally:
        os.close(handle)
    return b"".join(parts).decode(errors="replace").splitlines()


def xid_finding(log: Iterable[str] | None, *, uptime_s: float) -> Finding:
    """Errors that the driver wrote into the kernel's log during the last day.

    Args:
        log: ``priority,number,microseconds since boot,flags;text`` each.
        uptime_s: Now, since boot.
    """
    if log is None:
        way_out = "run as root, or `sysctl kernel.dmesg_restrict=0`"
        return _SUBJECT.finding("xid", Level.NOTE, "the kernel's log can't be read, so errors of the driver aren't seen", way_out)
    seen: dict[tuple[str, int], str] = {}
    for record in log:
        stamp = record.split(",", 3)
        if len(stamp) < 3 or not stamp[2].isdigit() or uptime_s - int(stamp[2]) / 1e6 >= _XID_RECENT_S:
            continue
        if (match := _XID.search(record)) and int(match[2]) in _XIDS:
            seen[match[1], int(match[2])] = f"Xid {match[2]} of {match[1]} ({_XIDS[int(match[2])]})"
        elif match := _SXID.search(record):
            seen[match[1], int(match[2])] = f"SXid {match[2]} of {match[1]} (fatal error of an NVSwitch)"
    if not seen:
        return _SUBJECT.finding("xid", Level.OK, "no error of a GPU in the kernel's log of the last day")
    # A reset of the GPU mends as much, and leaves the log as it is.
    way_out = "restart the machine, which clears its log, too; where it comes back, take the node out of service"
    return _SUBJECT.finding("xid", Level.PROBLEM, "; ".join(seen.values()), way_out, values={"xids": [list(key) for key in seen]})
