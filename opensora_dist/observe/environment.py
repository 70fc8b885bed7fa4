"""What a run ran on, for ``environment.json``: enough to run it again, and no secrets."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import opensora_dist

REDACTED = "<redacted>"

_PACKAGES = (
    "torch",
    "numpy",
    "safetensors",
    "pydantic",
    "pyarrow",
    "av",
    "diffusers",
    "transformers",
    "triton",
    "flash-attn",
    "deepspeed",
    "yunchang",
    "colossalai",
    "wandb",
    "tensorboard",
)
_VARIABLES = re.compile(
    r"(NCCL|GLOO|SLURM|TORCH|PYTORCH|CUDA|OPENSORA|OMP|MKL|HF|WANDB)_\w+|(LOCAL_|GROUP_)?(RANK|WORLD_SIZE)|MASTER_(ADDR|PORT)"
)
_SECRET_NAME = re.compile(r"KEY|TOKEN|SECRET|PASSWORD|PASSWD|CREDENTIAL", re.IGNORECASE)
_USERINFO = re.compile(r"(?<=://)[^/\s@]+(?=@)")
_GIT_TIMEOUT_S = 5.0


def redact(values: Mapping[str, str]) -> dict[str, str]:
    """Environment variables without secrets: values of names that speak of one, and credentials inside URLs, are replaced."""
    return {
        name: REDACTED if _SECRET_NAME.search(name) else _USERINFO.sub(REDACTED, value) for name, value in sorted(values.items())
    }


def redact_command(args: Sequence[str]) -> list[str]:
    """A command line without secrets: ``name=value`` and ``--name value`` whose name speaks of one, and credentials in URLs.

    A number is no secret, so that ``text.max_tokens=32`` stays readable.
    """
    shown: list[str] = []
    for arg in args:
        name, equals, value = arg.partition("=")
        after_name = bool(shown) and shown[-1].startswith("--") and "=" not in shown[-1] and _SECRET_NAME.search(shown[-1])
        if equals and _SECRET_NAME.search(name) and not value.isdigit():
            shown.append(f"{name}={REDACTED}")
        elif after_name and not arg.startswith("-") and not arg.isdigit():
            shown.append(REDACTED)
        else:
            shown.append(_USERINFO.sub(REDACTED, arg))
    return shown


def _program() -> str:
    """What a user types, wherever it is installed: ``python -m opensora_dist`` has a path of this machine for it."""
    name = Path(sys.argv[0]).name
    return "opensora-dist" if name == "__main__.py" else name


def describe_environment(*, world: int = 1) -> dict[str, Any]:
    """Software, hardware, source and command of this process, as JSON values.

    Args:
        world: Number of ranks of the run.
    """
    import torch  # here, so that what asks for the commit or for versions alone is quick

    return {
        "opensora_dist": opensora_dist.__version__,
        "git": git_state(Path(opensora_dist.__file__).parent),
        "command": redact_command([_program(), *sys.argv[1:]]),
        "python": platform.python_version(),
        "packages": package_versions(),
        "platform": platform.platform(),
        "host": platform.node(),
        "cpu": cpu_name(),
        "cpu_cores": os.cpu_count(),
        "cuda": torch.version.cuda,
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        "world": world,
        "variables": redact({k: v for k, v in os.environ.items() if _VARIABLES.fullmatch(k)}),
    }


def package_versions() -> dict[str, str]:
    """Of the packages that matter to a result, as far as they are installed."""
    versions: dict[str, str] = {}
    for name in _PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue  # optional packages: their absence is told by their absence
    return versions


def cpu_name() -> str:
    """This machine's processor."""
    info = Path("/proc/cpuinfo")
    if info.is_file():
        match = re.search(r"^model name\s*:\s*(.+)$", info.read_text(errors="replace"), re.MULTILINE)
        if match:
            return match[1]
    return platform.processor() or platform.machine()


def git_state(folder: Path) -> dict[str, Any] | None:
    """Commit of the tree the package is imported from, and whether it has changes; None where it is in no git tree.

    An image holds no tree, and says in OPENSORA_COMMIT which it was made from.
    """

    def git(*args: str) -> str:
        command = ["git", "-C", str(folder), *args]
        return subprocess.run(command, capture_output=True, text=True, timeout=_GIT_TIMEOUT_S, check=True).stdout.strip()

    try:
        git("ls-files", "--error-unmatch", "__init__.py")  # an installed copy may lie inside somebody else's tree
        return {"commit": git("rev-parse", "HEAD"), "changed": bool(git("status", "--porcelain", "--", "."))}
    except (OSError, subprocess.SubprocessError):
        commit = os.environ.get("OPENSORA_COMMIT")
        return {"commit": commit, "changed": False} if commit else None
