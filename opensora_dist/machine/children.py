"""Checks that may crash, hang, or load gigabytes run in a process of their own, which tells what it found line by line.

A driver that hangs or a kernel that ends its process is what such checks look for: it must not end who looks.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import IO, Any

from opensora_dist.machine.finding import Finding, Level

_TAIL_LINES = 12
_AFTER_KILL_S = 5.0


@dataclass(frozen=True, kw_only=True)
class Said:
    """
    Args:
        code: Exit code of the process, negative where a signal ended it; None: it took too long.
        out: What it wrote to its standard output.
        err: The end of what it wrote elsewhere.
    """

    code: int | None
    out: str
    err: str

    @property
    def how(self) -> str:
        """How it ended, in words."""
        if self.code is None:
            return "took too long"
        if self.code < 0:
            return f"was ended by {signal.Signals(-self.code).name}"
        return f"ended with exit code {self.code}"


def run_child(command: Sequence[str], *, timeout_s: float, variables: Mapping[str, str] | None = None) -> Said:
    """Runs a command to its end, at most ``timeout_s``; then it and all that it started are ended.

    Whatever it does, this returns within ``timeout_s`` and 5 s: one that waits within the kernel, for a driver or a dead NFS, can't be
    ended, and is left to itself.

    Args:
        variables: On top of this process's environment.
    """
    # Files, since a pipe ends only when the last process that got hold of it does.
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=err,
            env={**os.environ, **(variables or {})},
            start_new_session=True,
        )
        code: int | None
        try:
            code = process.wait(timeout=timeout_s)
        except subprocess.TimeoutExpired:
            _end(process)
            code = None
        except BaseException:  # an interrupt ends it, too
            _end(process)
            raise
        out_text, err_text = _text(out), _text(err)
    return Said(code=code, out=out_text, err="\n".join(err_text.splitlines()[-_TAIL_LINES:]))


def _end(process: subprocess.Popen[bytes]) -> None:
    os.killpg(process.pid, signal.SIGKILL)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(timeout=_AFTER_KILL_S)


def _text(file: IO[bytes]) -> str:
    file.seek(0)
    return file.read().decode(errors="replace")


def findings_of_child(
    module: str,
    *args: str,
    timeout_s: float,
    level: Level = Level.PROBLEM,
    remedy: str = "install again what it names",
    variables: Mapping[str, str] | None = None,
) -> list[Finding]:
    """What ``python -m MODULE ARGS`` found, whose ``main`` is a ``Teller``'s user; where it did not come to its end, that too.

    Args:
        timeout_s: How long it may take.
        level: Of an end before its end.
        remedy: Of the same, beside running it by hand.
        variables: On top of this process's environment.
    """
    said = run_child([sys.executable, "-m", module, *args], timeout_s=timeout_s, variables=variables)
    found, begun = [], ("checks", module)
    for line in said.out.splitlines():
        try:
            value = json.loads(line)
        except json.JSONDecodeError:  # libraries print, too
            continue
        if isinstance(value, dict) and "begun" in value:
            begun = tuple(value["begun"])
        elif isinstance(value, dict) and "level" in value:
            found.append(Finding(**{**value, "level": Level(value["level"])}))
    if said.code != 0:
        subject, name = begun
        text = f"its check {said.how}" + (f": {' '.join(said.err.split())[-600:]}" if said.err else "")
        found.append(
            Finding(
                subject=subject,
                name=name,
                level=level,
                said=text,
                remedy=f"run `python -m {' '.join([module, *args])}` to see all it says, and {remedy}",
            )
        )
    return found


class Teller:
    """In the child: runs checks, and tells what each found as soon as it is known."""

    def check(self, subject: str, name: str, call: Callable[[], Finding | Sequence[Finding]]) -> None:
        """Says that a check begins, and then what ``call`` found."""
        self._tell({"begun": [subject, name]})
        found = call()
        for finding in [found] if isinstance(found, Finding) else found:
            self._tell(asdict(finding))

    def _tell(self, value: Mapping[str, Any]) -> None:
        print(json.dumps(value), flush=True)
