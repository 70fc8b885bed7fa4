"""nvidia-smi as its users see it, with answers for machines good and bad, put on PATH in place of the real one. None was recorded here."""

from __future__ import annotations

import json
import sys
from pathlib import Path

# One H100 that is well, in the form that driver 535 has for it: --format=csv,noheader,nounits. Fields of --query-remapped-rows are among them.
GOOD = {
    "index": "0",
    "name": "NVIDIA H100 80GB HBM3",
    "uuid": "GPU-1d1ba4c2-0f4b-5f6e-9b8e-6a5c2b9b0a00",
    "pci.bus_id": "00000000:18:00.0",
    "driver_version": "535.129.03",
    "memory.total": "81559",
    "memory.used": "4",
    "clocks.sm": "345",
    "clocks.max.sm": "1980",
    "clocks.applications.graphics": "1980",
    "clocks_event_reasons.active": "0x0000000000000001",
    "ecc.mode.current": "Enabled",
    "ecc.errors.uncorrected.volatile.total": "0",
    "retired_pages.pending": "[N/A]",
    "persistence_mode": "Enabled",
    "remapped_rows.pending": "0",
    "remapped_rows.failure": "0",
}
# Of another kind: no ECC, no rows to remap, and a driver from before 535, which has an older name for what slows it.
OLD = {
    **{
        name: value for name, value in GOOD.items() if name not in ("clocks_event_reasons.active", "clocks.applications.graphics")
    },
    "name": "NVIDIA GeForce RTX 3090",
    "driver_version": "470.82.01",
    "clocks_throttle_reasons.active": "0x0000000000000000",
    "ecc.mode.current": "[N/A]",
    "ecc.errors.uncorrected.volatile.total": "[N/A]",
    "persistence_mode": "Disabled",
    "remapped_rows.pending": "[N/A]",
    "remapped_rows.failure": "[N/A]",
}
LOST = {name: "[GPU is lost]" if name not in ("index", "name", "uuid", "pci.bus_id") else value for name, value in GOOD.items()}

_SCRIPT = """#!{python}
import json, sys
option, _, fields = sys.argv[1].partition("=")
gpus = json.loads({gpus!r})
for field in fields.split(","):
    if field not in gpus[0] or field.startswith(("remapped_rows", "gpu_")) != (option == "--query-remapped-rows"):
        print(f'Field "{{field}}" is not a valid field to query.')
        sys.exit(2)
if option == "--query-gpu":
    print({said!r}, end="")
for gpu in gpus:
    print(", ".join(gpu[field] for field in fields.split(",")))
"""


def put_smi(folder: Path, *gpus: dict[str, str], said: str = "") -> None:
    """An nvidia-smi in ``folder`` that knows these GPUs, numbered in order, and says something besides."""
    names = [f"{gpu['uuid'][:-2]}{i:02d}" for i, gpu in enumerate(gpus)]
    # --query-remapped-rows has another name for the same.
    numbered = [{**gpu, "index": str(i), "uuid": names[i], "gpu_uuid": names[i]} for i, gpu in enumerate(gpus)]
    put_script(folder, _SCRIPT.format(python=sys.executable, gpus=json.dumps(numbered), said=said))


def put_script(folder: Path, text: str) -> None:
    """Any nvidia-smi."""
    path = folder / "nvidia-smi"
    path.write_text(text)
    path.chmod(0o755)
