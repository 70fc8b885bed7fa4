"""Schedulers to submit to in tests: their command lines on PATH, one queue behind them, and the ways in which they fail.

This file is both: what tests import, and what runs as ``sbatch``, ``kubectl``, ``sky`` and their like.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import sys
import time
from pathlib import Path

PROGRAMS = {
    "slurm": ("sbatch", "squeue", "sacct", "scontrol", "scancel", "sinfo"),
    "k8s": ("kubectl",),
    "sky": ("sky",),
}
"""A new launcher joins with the programs that it calls, a function below that plays them, and what they say when they fail."""

UNREACHABLE = {
    "slurm": "slurm_load_jobs error: Unable to contact slurm controller (connect failure)",
    "k8s": "The connection to the server localhost:6443 was refused - did you specify the right host or port?",
    "sky": "sky.exceptions.ApiServerConnectionError: Could not connect to SkyPilot API server at http://127.0.0.1:46580.",
}
REFUSED = {
    "slurm": "sbatch: error: invalid partition specified: nix\nsbatch: error: Batch job submission failed: Invalid partition name specified",
    "k8s": 'Error from server (Forbidden): error when creating "trainjob.yaml": trainjobs.trainer.kubeflow.org is forbidden',
    "sky": "sky.exceptions.ResourcesUnavailableError: Catalog does not contain any instances satisfying the request",
}
LOST = {
    "slurm": "sbatch: error: Batch job submission failed: Socket timed out on send/recv operation",
    "k8s": "Error from server (Timeout): the server was unable to return a response in the time allotted",
    "sky": "requests.exceptions.ReadTimeout: Read timed out",
}


class Scheduler:
    """One scheduler of a test.

    ``mode`` is how it takes what is submitted: ``up``; ``unreachable`` (for everything); ``refuses``; ``hangs``; ``dies`` and ``lost``
    after accepting, without a word or with one that says nothing; ``kills`` who submits, after accepting.
    """

    def __init__(self, backend: str, folder: Path) -> None:
        self.backend, self._folder = backend, folder
        self.path = folder / "bin"
        self.path.mkdir(parents=True)
        for program in PROGRAMS[backend]:
            words = shlex.join([sys.executable, "-IS", __file__, str(folder), backend, program])
            (self.path / program).write_text(f'#!/bin/sh\nexec {words} "$@"\n')
            (self.path / program).chmod(0o755)
        self.mode = "up"
        self.set_jobs([])

    @property
    def mode(self) -> str:
        return (self._folder / "mode").read_text()

    @mode.setter
    def mode(self, mode: str) -> None:
        (self._folder / "mode").write_text(mode)

    @property
    def jobs(self) -> list[dict[str, str]]:
        """What it holds: ``id``, ``key`` (our id of the job) and ``state`` (waiting, running, done, failed, cancelled)."""
        return json.loads((self._folder / "jobs").read_text())

    def set_jobs(self, jobs: list[dict[str, str]]) -> None:
        (self._folder / "jobs").write_text(json.dumps(jobs))

    def end(self, state: str) -> None:
        """All of its jobs."""
        self.set_jobs([{**job, "state": state} for job in self.jobs])


def _main() -> int:
    folder, backend, program, args = Path(sys.argv[1]), sys.argv[2], sys.argv[3], sys.argv[4:]
    mode, jobs = (folder / "mode").read_text(), json.loads((folder / "jobs").read_text())
    if mode == "unreachable":
        print(UNREACHABLE[backend], file=sys.stderr)
        return 1
    key = _submitted(program, args)
    if key is None:
        return {"slurm": _slurm, "k8s": _k8s, "sky": _sky}[backend](program, args, jobs, folder / "jobs")
    if mode == "refuses":
        print(REFUSED[backend], file=sys.stderr)
        return 1
    if mode == "hangs":
        time.sleep(600)
    job_id = key if backend == "k8s" else str(len(jobs) + 1)
    (folder / "jobs").write_text(json.dumps([*jobs, {"id": job_id, "key": key, "state": "waiting"}]))
    if mode in ("dies", "kills"):
        os.kill(os.getpid() if mode == "dies" else os.getppid(), signal.SIGKILL)
    if mode == "lost":
        print(LOST[backend], file=sys.stderr)
        return 1
    print({"slurm": job_id, "k8s": f"trainjob.trainer.kubeflow.org/{job_id}", "sky": f"Job submitted, ID: {job_id}"}[backend])
    return 0


def _submitted(program: str, args: list[str]) -> str | None:
    """Our id of the job that a call submits; None of other calls."""
    if program == "sbatch":
        script = next(word for word in args if word.endswith(".sbatch"))
        return re.search(r"--comment=(\S+)", Path(script).read_text())[1]
    if program == "kubectl" and "create" in args:
        return re.search(r'opensora-dist/job: "(.+)"', Path(args[args.index("--filename") + 1]).read_text())[1]
    if program == "sky" and args[:2] == ["jobs", "launch"]:
        return re.search(r'^name: "(.+)"', Path(args[-1]).read_text(), re.MULTILINE)[1]
    return None


def _slurm(program: str, args: list[str], jobs: list[dict[str, str]], file: Path) -> int:
    states = {"waiting": "PENDING", "running": "RUNNING", "done": "COMPLETED", "failed": "FAILED", "cancelled": "CANCELLED"}
    if program == "sacct":
        print("Slurm accounting storage is disabled", file=sys.stderr)
        return 1
    if program == "sinfo":
        print("urgent\nbatch")
    if program == "scancel":
        file.write_text(json.dumps([{**j, "state": "cancelled"} if j["id"] in args else j for j in jobs]))
    if program != "squeue":
        return 0
    given = dict(word.partition("=")[::2] for word in args)
    asked = given["--jobs"].split(",") if "--jobs" in given else [job["id"] for job in jobs]
    if "--jobs" in given and len(asked) == 1 and asked[0] not in [job["id"] for job in jobs]:
        print("slurm_load_jobs error: Invalid job id specified", file=sys.stderr)
        return 1
    for job in jobs:
        fields = {"F": job["id"], "i": job["id"], "T": states[job["state"]], "r": "None", "N": "", "M": "0:00", "k": job["key"]}
        if job["id"] in asked:
            print(re.sub(r"%(\w)", lambda match: fields[match[1]], given["--format"]))
    return 0


def _k8s(program: str, args: list[str], jobs: list[dict[str, str]], file: Path) -> int:
    if "delete" in args:
        file.write_text(json.dumps([job for job in jobs if job["id"] not in args]))
        return 0
    selector = args[args.index("--selector") + 1].partition("=")[2] if "--selector" in args else None
    found = [job for job in jobs if (job["key"] == selector if selector else job["id"] in args)]
    items = [{"metadata": {"name": job["id"]}, "status": _trainjob_status(job["state"])} for job in found]
    if selector or len(items) > 1:
        print(json.dumps({"items": items}))
    elif items:
        print(json.dumps(items[0]))
    return 0


def _trainjob_status(state: str) -> dict[str, object]:
    kind = {"done": "Complete", "failed": "Failed", "waiting": "Suspended"}.get(state)
    active = 1 if state == "running" else 0
    conditions = [] if kind is None else [{"type": kind, "status": "True"}]
    return {"conditions": conditions, "jobsStatus": [{"name": "node", "active": active}]}


def _sky(program: str, args: list[str], jobs: list[dict[str, str]], file: Path) -> int:
    states = {"waiting": "PENDING", "running": "RUNNING", "done": "SUCCEEDED", "failed": "FAILED", "cancelled": "CANCELLED"}
    if args[:2] == ["jobs", "queue"]:
        print(json.dumps([{"job_id": int(j["id"]), "job_name": j["key"], "status": states[j["state"]]} for j in jobs]))
    if args[:2] == ["jobs", "cancel"]:
        file.write_text(json.dumps([{**j, "state": "cancelled"} if j["id"] in args else j for j in jobs]))
    return 0


if __name__ == "__main__":
    sys.exit(_main())
